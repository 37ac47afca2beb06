"""Items come in order, are read only a little ahead, and an error comes where its item would."""

import threading
from collections.abc import Iterator

import pytest

from cots.errors import MediaError
from pretrain.read_all import AHEAD, read_all


class Numbers:
    def __init__(self, count: int, bad: int = -1) -> None:
        self.count, self.bad = count, bad
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        if index == self.bad:
            raise MediaError(str(index), "it is bad")
        return index * index


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_items_come_in_order_and_none_is_left_out(threads: int) -> None:
    assert list(read_all(Numbers(300), threads)) == [number * number for number in range(300)]
    assert list(read_all(Numbers(0), threads)) == []


def test_items_are_read_only_a_little_ahead_and_threads_end_with_their_reader() -> None:
    numbers = Numbers(1000)
    items = read_all(numbers, 2)
    assert isinstance(items, Iterator)
    for _ in range(10):
        next(items)
    assert max(numbers.read) <= 10 + 2 * AHEAD
    items.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


def test_an_error_comes_where_its_item_would() -> None:
    items = read_all(Numbers(50, bad=20), 3)
    assert [next(items) for _ in range(20)] == [number * number for number in range(20)]
    with pytest.raises(MediaError, match="it is bad"):
        next(items)
