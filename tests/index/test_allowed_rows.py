"""Filters on their way to a device, against numpy's packing. On a GPU where there is one."""

import numpy as np
import pytest
import torch

from index.allowed_rows import as_bits, upload

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
