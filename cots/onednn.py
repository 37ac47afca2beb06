"""Matrix products on a CPU by oneDNN, where that is quicker than what PyTorch would take, and in bfloat16.

PyTorch gives products in float32 to MKL, which on AMD's processors uses half of their vectors' width: on an EPYC it
makes 105 GFLOP/s a core where oneDNN, which PyTorch has for convolutions, makes 235. Both sum in float32; their results
differ by some 1e-7 of the norm. A processor with instructions for bfloat16 (Zen 4) multiplies that nearly twice as
fast as oneDNN float32.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

WORTH_IT = 1.15  # times as quick
BFLOAT16_WORTH_IT = 1.3
TOLERANCE = 1e-4
FEW = 4  # rows, of which MKL is as quick


def quick_linears(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, networks on a CPU take `linear` for their linear maps."""
    return _OneDnnLinears() if device.type == "cpu" and _is_quicker() else nullcontext()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, by oneDNN if that is quicker: without gradient, in float32, of more than a few rows, on a CPU.

    Args:
        input: (..., I).
        weight: (O, I).
        bias: (O,).

    Returns:
        (..., O).
    """
    few = input.numel() < FEW * input.shape[-1]
    if few or input.dtype != torch.float32 or not input.is_cpu or torch.is_grad_enabled() or not _is_quicker():
        return F.linear(input, weight, bias)
    return _by_onednn(input, weight, bias)


class _OneDnnLinears(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _by_onednn(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


@cache
def _is_quicker() -> bool:
    """Both tried on a small product, once."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    random = torch.Generator().manual_seed(0)
    rows, weight, bias = (torch.randn(shape, generator=random) for shape in ((64, 384), (384, 384), (384,)))
    with torch.inference_mode():
        try:
            difference = F.linear(rows, weight, bias) - _by_onednn(rows, weight, bias)
        except RuntimeError:  # PyTorch's builds differ
            return False
        if difference.norm() > TOLERANCE * rows.norm():
            return False
        theirs, ours = (_seconds(partial(product, rows, weight, bias)) for product in (F.linear, _by_onednn))
    return theirs > WORTH_IT * ours


@cache
def bfloat16_is_quicker() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32, tried once on a product of a tower's size."""
    rows, weight = torch.ones(256, 768), torch.ones(768, 768)
    half_rows, half_weight = rows.bfloat16(), weight.bfloat16()
    with torch.inference_mode():
        full = _seconds(partial(linear, rows, weight))
        half = _seconds(partial(F.linear, half_rows, half_weight))
    return full > BFLOAT16_WORTH_IT * half


def _seconds(call: Callable[[], object]) -> float:
    """The least of some."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return min(taken)
