"""Which rows a filter allows, brought to the device that searches them without ever waiting for it."""

import warnings

import numpy as np
import torch

# torch.from_numpy complains of arrays that cannot be written to; nothing is written here.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)

# An int64 of eight flags, of a byte each, times this has flag i in bit 56 + i; nothing is carried into these.
EIGHT_TO_BITS = 0x0102040810204080


def upload(usable: np.ndarray, device: torch.device) -> tuple[torch.Tensor, int]:
    """Flags (N,) on the device, and how many are set, counted here while they are on their way.

    Out of pageable memory the driver would copy them piece by piece, and wait: 0.7 ms for ten million, where several
    threads move them to pinned memory in 0.1, from which the device fetches them in 0.2 (a table in
    benchmarks/results/README.md). Both stay for a moment: a byte a row in pinned memory, and on the device.
    """
    flags = torch.from_numpy(usable)
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
