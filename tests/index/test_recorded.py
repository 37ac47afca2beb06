"""What becomes of searches that cannot be recorded. Those that can are tested on a GPU, in
test_exact_on_a_gpu.py."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from index.recorded import MOST_RECORDINGS, RecordedSearches

QUERIES = np.arange(6, dtype=np.float32).reshape(3, 2)


class RefusingDevice:
    """Stands for a GPU, whose part the CPU plays, and which begins to record and then fails, as torch would leave it.

    Attributes:
        stream: of the thread.
        begun, ended: how many recordings were, and how many pools were given back.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream: object = "the thread's"
        self.begun = self.ended = 0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        own = SimpleNamespace(device=torch.device("cuda", 0), wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_pool, raising=False)
        monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph", self._record)

    def _end_pool(self, device: int, pool: object) -> None:
        self.ended += 1
        raise RuntimeError("not currently recording to mempool_id")  # as of torch 2.13, which does so itself

    @contextmanager
    def _record(self, graph: object, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        self.begun += 1
        self.stream = stream
        yield
        raise RuntimeError("operation not permitted when stream is capturing")


def search(asked: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of each query, of width 4."""
    return asked.sum(dim=1, keepdim=True), torch.zeros(len(asked), 1, dtype=torch.int64)


def test_what_cannot_be_recorded_is_tried_once_and_answered_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    device = RefusingDevice(monkeypatch)
    searches = RecordedSearches(4, torch.device("cpu"))
    for turn in range(5):
        scores, places = searches.answer(QUERIES, "sums", search)
        np.testing.assert_array_equal(scores, QUERIES.sum(axis=1, keepdims=True))
        assert places.shape == (3, 1)
        assert device.begun == device.ended == min(turn, 1)
        assert device.stream == "the thread's"


def test_what_was_asked_for_longest_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    device = RefusingDevice(monkeypatch)
    searches = RecordedSearches(4, torch.device("cpu"))
    for kind in range(MOST_RECORDINGS):
        searches.answer(QUERIES, kind, search)
    searches.answer(QUERIES, 0, search)
    assert device.begun == 1
    searches.answer(QUERIES, "one more", search)
    searches.answer(QUERIES, 0, search)
    searches.answer(QUERIES, 2, search)
    assert device.begun == 2
    searches.answer(QUERIES, 1, search)  # forgotten, so run as for the first time
    assert device.begun == 2
