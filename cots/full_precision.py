"""Islands of float32 in whatever precision surrounds them."""

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast. The meta device, on which shapes alone are computed, knows none to begin with."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
