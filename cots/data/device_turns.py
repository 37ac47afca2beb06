"""A few streams of a device, each used by one thread at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import torch

# A process has eight queues to a GPU unless it asks for more, and streams that share one wait for each other: nvJPEG's
# seven and those of a decoder and a model are more, so that decoding waited behind whole batches of the model. It
# counts from the first use of the GPU on.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


class DeviceTurns:
    """So many threads may work on a device at once, each on a stream of its own; the others wait.

    PyTorch keeps freed memory stream by stream, so streams are few and shared: with one for each thread, each would
    keep a batch's memory to itself. On a CPU there are no streams, and a turn only limits the number.

    Args:
        urgent: their kernels come before those of other streams.
    """

    def __init__(self, device: torch.device, count: int, urgent: bool = False) -> None:
        self._free: SimpleQueue[torch.cuda.Stream | None] = SimpleQueue()
        for _ in range(count):
            self._free.put(torch.cuda.Stream(device, priority=-int(urgent)) if device.type == "cuda" else None)

    @contextmanager
    def turn(self) -> Iterator[torch.cuda.Stream | None]:
        """Wait for a stream and make it the thread's; when the turn ends, all its work is done."""
        stream = self._free.get()
        try:
            with torch.cuda.stream(stream):
                yield stream
        finally:
            try:
                if stream is not None:
                    stream.synchronize()
            finally:
                self._free.put(stream)
