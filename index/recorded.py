"""Searches recorded as CUDA graphs, so that one call starts all of a search's kernels.

A search of few queries is thirty kernels, of which one takes a millisecond and the others some microseconds each. To
start them one after another takes Python a third of a millisecond, which the GPU waits for.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cots.recording import record

MOST_RECORDINGS = 16
log = logging.getLogger("cots")


@dataclass
class _Recording:
    """A graph that searches for what lies in `queries` (Q, width) and leaves scores and positions (Q, k)."""

    graph: torch.cuda.CUDAGraph
    queries: Tensor
    scores: Tensor
    places: Tensor


class RecordedSearches:
    """Answers to a few queries at a time; several threads may ask, and one after another is answered.

    A search of a kind (see `answer`) is run as it is the first time, and prepared and recorded the second time; one
    that cannot be recorded is run as it is from then on. The recordings used last are kept, and share what memory they
    need beside their results.

    Args:
        width: of queries on the device.
        device: a GPU.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._width = width
        self._device = device
        self._lock = Lock()
        self._kept: OrderedDict[Hashable, _Recording | Literal["run once", "not recordable"]] = OrderedDict()
        self._pool: Any = None  # torch has no public name for its type
        self._stream: torch.cuda.Stream | None = None

    def answer(
        self, queries: np.ndarray, kind: Hashable, search: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions (Q, k) that `search` finds for queries.

        Args:
            queries: (Q, D) float32, D at most the width.
            kind: of equal kind are searches with the same answer for the same queries, which they find in the same
                tensors. The caller holds these: a recording only knows where they lie.
            search: takes queries (R, width) float32 on the device and waits for nothing; R is Q or somewhat more.
        """
        size = 1 << (len(queries) - 1).bit_length()
        key = (kind, size)
        with self._lock:
            if self._kept.get(key) == "run once":
                self._kept[key] = self._record(size, search) or "not recordable"
            recording = self._kept.setdefault(key, "run once")
            self._kept.move_to_end(key)
            if len(self._kept) > MOST_RECORDINGS:
                self._kept.popitem(last=False)
            if not isinstance(recording, _Recording):
                asked = torch.zeros(size, self._width, device=self._device)
                asked[: len(queries), : queries.shape[1]] = torch.from_numpy(queries)
                scores, places = search(asked)
            else:
                recording.queries[: len(queries), : queries.shape[1]] = torch.from_numpy(queries)
                recording.graph.replay()
                scores, places = recording.scores, recording.places
            return scores[: len(queries)].cpu().numpy(), places[: len(queries)].cpu().numpy()

    def _record(self, size: int, search: Callable[[Tensor], tuple[Tensor, Tensor]]) -> _Recording | None:
        """None if there is no memory for it, or the device does not allow it."""
        try:
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
            queries = torch.zeros(size, self._width, device=self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                search(queries)
            graph, (scores, places) = record(lambda: search(queries), self._stream, self._pool)
        except RuntimeError as error:  # of which running out of memory is one
            log.debug("a search for %d queries could not be recorded: %s", size, error)
            self._pool = torch.cuda.graph_pool_handle()  # for the next, whatever became of this one
            return None
        return _Recording(graph, queries, scores, places)
