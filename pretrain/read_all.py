"""All items of a data set once, read by threads ahead of whoever uses them."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

AHEAD = 16  # items that each thread may be ahead
T_co = TypeVar("T_co", covariant=True)


class Items(Protocol[T_co]):
    """What can be counted and read by number, by several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> T_co: ...


def read_all(items: Items[T_co], threads: int) -> Iterator[T_co]:
    """Every item, in order, read by at least one thread of its own.

    Decoders work without the interpreter's lock, so that threads are as quick as processes, which would have to be
    started, and would send what they read through descriptors.
    """
    with ThreadPoolExecutor(max(threads, 1), "read") as pool:
        ahead: deque[Future[T_co]] = deque()
        try:
            for index in range(len(items)):
                ahead.append(pool.submit(items.__getitem__, index))
                if len(ahead) > AHEAD * max(threads, 1):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()
