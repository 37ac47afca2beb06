"""Threads of one core each leave the others' cores alone."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from cots.single_core import single_core_threads


def test_only_its_own_threads_use_one_core() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    later: list[int] = []
    with single_core_threads(3, "test") as pool:
        assert {pool.submit(torch.get_num_threads).result() for _ in range(9)} == {1}
        assert torch.get_num_threads() == 2
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    assert later == [2]
    torch.set_num_threads(before)


def test_ctrl_c_while_they_begin_leaves_none_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    submit, asked = ThreadPoolExecutor.submit, []

    def interrupted(pool: ThreadPoolExecutor, *arguments: Any) -> Any:
        asked.append(submit(pool, *arguments))
        if len(asked) == 2:
            signal.raise_signal(signal.SIGINT)
        return asked[-1]

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    cores = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        single_core_threads(3, "test")
    for begun in asked:
        assert isinstance(begun.exception(timeout=60), threading.BrokenBarrierError)
    assert torch.get_num_threads() == cores
