"""Filters on their way to a device, against numpy's packing. On a GPU where there is one."""

import numpy as np
import pytest
import torch

from index import allowed_rows
from index.allowed_rows import Filters, as_bits, upload
from index.topk_passes import Rows

DEVICES = [
    torch.device("cpu"),
    pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "capacity"), [(0, 256), (1, 256), (255, 256), (256, 256), (100_001, 100_096)])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
def test_flags_arrive_as_they_are_and_as_numpy_packs_them(
    rows: int, capacity: int, share: float, device: torch.device
) -> None:
    usable = np.random.default_rng(rows).random(rows) < share
    usable.flags.writeable = False
    flags, count = upload(usable, device)
    assert count == np.count_nonzero(usable)
    np.testing.assert_array_equal(flags.cpu().numpy(), usable)
    packed = np.zeros(capacity // 8, np.uint8)
    packed[: -(-rows // 8)] = np.packbits(usable, bitorder="little")
    bits = as_bits(flags, capacity)
    assert (bits.dtype, bits.device.type) == (torch.int32, device.type)
    np.testing.assert_array_equal(bits.cpu().numpy().view(np.uint8), packed)


def test_a_filter_that_changes_afterwards_has_arrived_as_it_was() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: elsewhere flags are not copied")
    usable = np.random.default_rng(0).random(1_000_000) < 0.1
    expected = usable.copy()
    flags, _ = upload(usable, torch.device("cuda"))
    usable[:] = True
    np.testing.assert_array_equal(flags.cpu().numpy(), expected)


def filters(count: int) -> Filters:
    vectors = torch.arange(512).half()[:, None].expand(512, 16).contiguous()
    return Filters(Rows(vectors, count), np.empty(0, np.int64))


def every(step: int) -> np.ndarray:
    """One row in so many of 500, read-only."""
    allowed = np.arange(500) % step == 0
    allowed.flags.writeable = False
    return allowed


def test_copies_of_few_are_kept_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    made = filters(500)
    asked = [None, every(5), every(2), every(6), every(7)]
    first = [made.searched(allowed) for allowed in asked]
    assert [searched.rows.count for searched in first] == [500, 100, 500, 84, 72]
    assert [searched.origin is None for searched in first] == [True, False, True, False, False]
    assert all(made.searched(allowed) is searched for allowed, searched in zip(asked, first, strict=True))
    monkeypatch.setattr(allowed_rows, "ROOM", 3 * first[1].copied)
    newest = every(8)
    made.searched(newest)
    assert [searched.finite for _, searched in made._kept] == [250, 84, 72, 63]  # every fifth was asked for before
    assert made.searched(asked[3]) is first[3]
    monkeypatch.setattr(allowed_rows, "ROOM", first[1].copied)
    last = every(9)
    assert made.searched(last).origin is not None
    assert [searched.finite for _, searched in made._kept] == [250, 56]
    monkeypatch.setattr(allowed_rows, "ROOM", first[1].copied - 1)
    assert made.searched(every(10)).origin is None
    del newest, last
    made.searched(every(11))
    assert [searched.finite for _, searched in made._kept] == [250, 46]  # of those that are still wanted


def test_a_filter_whose_copies_find_no_memory_is_taken_as_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(allowed_rows, "_copies", full)
    searched = filters(500).searched(every(5))
    assert (searched.origin, searched.finite, searched.rows.count) == (None, 100, 500)
    assert searched.rows.mask is not None
