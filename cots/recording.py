"""Work of a GPU recorded as CUDA graphs, so that one call starts all of its kernels.

A network's forward pass is some hundred kernels. To start them one after another takes Python milliseconds, in which
it holds the interpreter's lock, and for a single sentence the GPU waits for it most of the time.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
CALLS_BEFORE = 3
MOST_RECORDINGS = 32
log = logging.getLogger("cots")
_one_at_a_time = Lock()  # in the process: to begin waits for the whole device, which spoils another recording


def record(work: Callable[[], T], stream: torch.cuda.Stream, pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph that does again, on the same memory, what `work` starts, and what `work` returned.

    Args:
        work: waits for nothing, and was done before: what libraries prepare for a kernel (cuBLAS for a thread and a
            stream) cannot be recorded.
        stream: of the recordings that share a pool; torch's own is one for all, and of the device that was first.
        pool: `torch.cuda.graph_pool_handle()`, of graphs that are never replayed at the same time.

    Raises:
        RuntimeError: there is no memory for it (torch.OutOfMemoryError), or the device does not allow it.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(stream.device):
        before = torch.cuda.current_stream()
        try:
            # other threads may go on allocating and copying meanwhile
            with _one_at_a_time, torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError:
            _clear_up(stream.device.index, pool)
            raise
        finally:
            torch.cuda.set_stream(before)  # which torch does not do for a recording that fails
    return graph, result


def _clear_up(device: int, pool: Any) -> None:
    """What torch leaves behind before 2.13 when a recording fails: the allocator goes on taking memory from the pool,
    and the generator of random numbers believes that it is recorded."""
    with suppress(RuntimeError):  # the pool is no longer in use
        torch._C._cuda_endAllocateToPool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())


@dataclass
class _Recording:
    """A graph that computes `result` of what lies in `given`."""

    graph: torch.cuda.CUDAGraph
    given: Tensor
    result: Tensor


class RecordedFunction:
    """A function of one tensor on a GPU, without memory or chance; several threads may call it, on any streams.

    Shapes that come again and again are recorded at their fourth call: to record takes as long as some tens of calls
    save. A call that cannot be recorded is made as it is from then on. The recordings used last are kept, and share
    what memory they need beside their results.

    Args:
        function: a tensor in, a tensor out, waiting for nothing. It is called in inference mode.
        device: a GPU.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._lock = Lock()
        self._calls: Counter[torch.Size] = Counter()
        self._kept: OrderedDict[torch.Size, _Recording | None] = OrderedDict()  # None: cannot be recorded
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # torch has no public name for its type

    @torch.inference_mode()
    def __call__(self, given: Tensor) -> Tensor:
        """What the function makes of a tensor, of a dtype that is always the same; ready on the current stream."""
        with self._lock:
            recording = self._recording(given)
            if recording is not None:
                return self._replay(recording, given)
        return self._function(given)

    def _recording(self, given: Tensor) -> _Recording | None:
        shape = given.shape
        if shape not in self._kept:
            self._calls[shape] += 1
            if self._calls[shape] <= CALLS_BEFORE:
                return None
            del self._calls[shape]
            self._kept[shape] = self._record(given)
            if len(self._kept) > MOST_RECORDINGS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(shape)
        return self._kept[shape]

    def _record(self, given: Tensor) -> _Recording | None:
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
        try:
            own = given.clone()
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._function(own)
            graph, result = record(lambda: self._function(own), self._stream, self._pool)
        except RuntimeError as error:  # of which running out of memory is one
            log.debug("a call for %s could not be recorded: %s", tuple(given.shape), error)
            self._pool = torch.cuda.graph_pool_handle()  # for the next, whatever became of this one
            return None
        return _Recording(graph, own, result)

    def _replay(self, recording: _Recording, given: Tensor) -> Tensor:
        """All replays follow each other on one stream, so that none overwrites what another still reads."""
        assert self._stream is not None
        current = torch.cuda.current_stream(self._device)
        result = torch.empty_like(recording.result)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            recording.given.copy_(given)
            recording.graph.replay()
            result.copy_(recording.result)
        current.wait_stream(self._stream)
        return result
