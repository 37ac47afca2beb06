"""Which rows a filter allows, on the device that searches them: brought there without waiting for it, and kept."""

import weakref
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from threading import Lock

import numpy as np
import torch

from index.exact import shared_tensor
from index.topk_passes import LARGEST_TILE, Rows

KEPT = 5  # of which one is no filter at all
ROOM = 2**30  # bytes that copies may take
FEW = 0.25  # if no larger share may be found, it is read, written and read again sooner than all vectors once
# An int64 of eight flags, of a byte each, times this has flag i in bit 56 + i; nothing is carried into these.
EIGHT_TO_BITS = 0x0102040810204080
_NO_FILTER = np.empty(0, bool)
_numbers = count(1)


@dataclass(frozen=True)
class Searched:
    """What is looked at under a filter.

    Attributes:
        number: of a filter that is kept, which no other has.
        rows: hold the vectors that are allowed and finite, `finite` many.
        origin: (M,) int64, the position of each row if they are copies.
        unusable: positions of vectors that are allowed but not finite.
    """

    number: int | None
    rows: Rows
    origin: torch.Tensor | None
    finite: int
    unusable: np.ndarray

    @property
    def copied(self) -> int:
        """Bytes of the copies."""
        return 0 if self.origin is None else self.rows.vectors.nbytes


class Filters:
    """What is looked at under each filter, as long as the vectors stay as they are.

    Where a filter allows few vectors, these are copied together; else it is taken as bits. Filters that cannot change
    are kept, the last few, with copies of at most `ROOM`.

    Args:
        rows: all vectors, without a mask.
        unusable: positions of those that are not finite.
    """

    def __init__(self, rows: Rows, unusable: np.ndarray) -> None:
        self._rows = rows
        self._unusable = unusable
        self._lock = Lock()
        self._kept: list[tuple[weakref.ref[np.ndarray], Searched]] = []

    def searched(self, allowed: np.ndarray | None) -> Searched:
        """What is looked at for a filter (N,) bool, or for none; made now or, for one that is read-only, before.

        Raises:
            torch.OutOfMemoryError: there is no room for its bits.
        """
        if allowed is not None and allowed.flags.writeable:
            return self._prepared(allowed, None)
        wanted = _NO_FILTER if allowed is None else allowed
        with self._lock:
            for place, (known, searched) in enumerate(self._kept):
                if known() is wanted:
                    self._kept.append(self._kept.pop(place))
                    return searched
            self._kept = [kept for kept in self._kept if kept[0]() is not None][1 - KEPT :]
            searched = self._prepared(allowed, next(_numbers))
            self._kept.append((weakref.ref(wanted), searched))
            return searched

    def _prepared(self, allowed: np.ndarray | None, number: int | None) -> Searched:
        """All vectors, all of them with a mask, or a copy of the few that may be found and where these come from."""
        vectors, total = self._rows.vectors, self._rows.count
        if allowed is None and not len(self._unusable):
            return Searched(number, self._rows, None, total, self._unusable)
        usable = np.ones(total, bool) if allowed is None else allowed
        unusable = self._unusable[usable[self._unusable]]
        if len(unusable):
            usable = usable.copy()
            usable[unusable] = False
        flags, finite = upload(usable, vectors.device)
        size = vectors[:1].nbytes * _whole_tiles(finite)
        if finite <= FEW * total and size <= ROOM:
            if number is not None:
                self._make_room(size)
            with suppress(torch.OutOfMemoryError):  # else bits will do
                return Searched(number, *_copies(vectors, flags, finite), finite, unusable)
        rows = Rows(vectors, total, as_bits(flags, len(vectors)))
        return Searched(number, rows, None, finite, unusable)

    def _make_room(self, size: int) -> None:
        """Forget the copies asked for longest ago, until those that are left and one of so many bytes fit `ROOM`."""
        kept = []
        for known, searched in reversed(self._kept):
            if not searched.copied or size + searched.copied <= ROOM:
                size += searched.copied
                kept.append((known, searched))
        self._kept = kept[::-1]


def _copies(vectors: torch.Tensor, flags: torch.Tensor, count: int) -> tuple[Rows, torch.Tensor]:
    """The vectors whose flags are set, so many, and the position of each."""
    origin = flags.nonzero_static(size=count).flatten()
    few = vectors.new_empty(_whole_tiles(count), vectors.shape[1])
    torch.index_select(vectors, 0, origin, out=few[:count])
    few[count:] = 0
    return Rows(few, count), origin


def _whole_tiles(count: int) -> int:
    return -(-count // LARGEST_TILE) * LARGEST_TILE


def upload(usable: np.ndarray, device: torch.device) -> tuple[torch.Tensor, int]:
    """Flags (N,) on the device, and how many are set, counted here while they are on their way.

    Out of pageable memory the driver would copy them piece by piece, and wait: 0.7 ms for ten million, where several
    threads move them to pinned memory in 0.1, from which the device fetches them in 0.2 (a table in
    benchmarks/results/README.md). Both stay for a moment: a byte a row in pinned memory, and on the device.
    """
    flags = shared_tensor(usable)
    if device.type != "cuda":
        return flags.to(device), int(flags.count_nonzero())
    staged = torch.empty(len(usable), dtype=torch.bool, pin_memory=True).copy_(flags)
    return staged.to(device, non_blocking=True), int(flags.count_nonzero())


def as_bits(flags: torch.Tensor, capacity: int) -> torch.Tensor:
    """Flags (N,) as the mask of `index.topk_passes.Rows`: (capacity / 32,) int32, bit i % 32 of word i // 32 being flag
    i, and 0 behind the last."""
    bytes_of_flags = flags.new_zeros(capacity)
    bytes_of_flags[: len(flags)] = flags
    gathered = bytes_of_flags.view(torch.int64) * EIGHT_TO_BITS
    return gathered.bitwise_right_shift_(56).to(torch.uint8).view(torch.int32)
