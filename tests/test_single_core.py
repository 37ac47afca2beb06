"""Threads of one core each leave the others' cores alone."""

import threading

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
