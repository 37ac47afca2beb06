"""Steps that come out the same to the bit each time they are taken on a device."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from cots.errors import ConfigError

_REFUSAL = "does not have a deterministic implementation"
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic_arithmetic(asked: bool) -> Iterator[None]:
    """Where `asked`, torch adds up in one order alone and chooses no kernel by timing it; else nothing changes.

    A GPU's sums come out differently from run to run for two reasons: threads that add to one place in whatever order
    they get there, and kernels that are chosen by their time. What is compiled within takes `compile_options`. The
    environment keeps a word to cuBLAS, which the process cannot take back.

    Raises:
        ConfigError: something was to be computed of which torch has no such form, or the process has multiplied
            matrices on a GPU before.
    """
    if not asked:
        yield
        return
    # torch wants this said to cuBLAS, and looks once in a process, at its first matrix product
    os.environ.setdefault(_CUBLAS, ":4096:8")
    settings: Any = torch.utils.deterministic
    with ExitStack() as stack:
        stack.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        stack.callback(setattr, settings, "fill_uninitialized_memory", settings.fill_uninitialized_memory)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        settings.fill_uninitialized_memory = False  # nothing reads such memory
        try:
            yield
        except RuntimeError as error:
            if _CUBLAS in str(error):
                raise ConfigError(
                    f"training.deterministic=true needs {_CUBLAS}=:4096:8 in the environment before a process first "
                    "computes on a GPU; set it, or train in a process of its own (cots pretrain)."
                ) from error
            if _REFUSAL not in str(error):
                raise
            what = str(error).split(_REFUSAL)[0].splitlines()[-1]
            raise ConfigError(
                f"With training.deterministic=true: {what}{_REFUSAL} on this device in torch {torch.__version__}; "
                "leave the setting out."
            ) from error


def compile_options() -> dict[str, Any] | None:
    """Options of torch.compile: in `deterministic_arithmetic`, no kernel is chosen by its time.

    They go with what is compiled, because the backward pass is compiled in a thread of its own, for which the
    compiler's settings are others.
    """
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else None
