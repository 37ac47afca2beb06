"""Memory of any origin made known to a GPU's driver, which then fetches from it while the processor goes on."""

from collections.abc import Callable
from contextlib import suppress

import torch


def pin(memory: memoryview, device: torch.device) -> Callable[[], None]:
    """Keep memory that can be written to where it is; returns what lets it go, which must be called before it goes
    away. Where the driver of the device refuses, all goes on as before, only slower."""
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    runtime = torch.cuda.cudart()

    def let_go() -> None:
        with torch.cuda.device(device):
            runtime.cudaHostUnregister(start)

    with torch.cuda.device(device):
        if int(runtime.cudaHostRegister(start, len(memory), 0)) == 0:
            return let_go
        with suppress(RuntimeError):
            torch.zeros(1, device=device)  # the next kernel would be told of the refusal
    return lambda: None
