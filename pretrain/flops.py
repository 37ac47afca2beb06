"""Model FLOPs of a training step and the matrix rate of the device: their ratio is the utilisation (MFU).

Counted is the maths that must be done, so that a trick which computes more to save memory does not look like speed:
what activation checkpointing computes a second time is left out, and attention counts as its two matrix products
(forward) and four (backward), whichever kernel runs. Only matrix products and convolutions count, at two FLOPs a
multiply-add (PaLM, Chowdhery et al. 2022, appendix B).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

_SIDE = 8192
_TINY = (2, 4, 6)


def count_flops(work: Callable[[], Any]) -> int:
    """FLOPs of what `work` computes, forward and backward, on any device.

    `work` runs once, eagerly, whatever is compiled. Kernels that torch does not know (a Triton kernel, for one) count
    as nothing.
    """
    registry = {operator: _unless_repeated(formula) for operator, formula in flop_registry.items()}
    counter = FlopCounterMode(display=False, custom_mapping=registry)
    with _countable_kernels(), counter:
        work()
    return counter.get_total_flops()


def flops_per_pair(step: Callable[[int], Any], batch_size: int) -> float:
    """FLOPs of a training step, divided by its pairs.

    Args:
        step: takes one step (forward of the towers and the momentum towers, losses, backward) on as many pairs as it
            is given, in one part: with gradient caching the second forward pass would count.
        batch_size: pairs that a rank really takes per step.

    Three tiny steps are counted and the parabola through them is followed to `batch_size`, which is exact: the towers
    and the comparison with the queues grow with the batch, the comparison of the batch with itself with its square.
    """
    counts = [count_flops(partial(step, size)) for size in _TINY]
    total = 0.0
    for size, count in zip(_TINY, counts):
        others = [other for other in _TINY if other != size]
        weight = 1.0
        for other in others:
            weight *= (batch_size - other) / (size - other)
        total += weight * count
    return total / batch_size


def matrix_rate(device: torch.device) -> float | None:
    """FLOP/s of a bf16 product of two 8192 x 8192 matrices, measured in about 0.3 s; None where there is no GPU."""
    if device.type != "cuda":
        return None
    drawn = torch.Generator(device)  # a training that goes on must find the device's own where it was
    left, right = (torch.randn(_SIDE, _SIDE, generator=drawn, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    started = time.perf_counter()
    while time.perf_counter() - started < 0.1:  # until the clocks have risen
        torch.mm(left, right, out=out)
        torch.cuda.synchronize(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    products = 100
    first.record()
    for _ in range(products):
        torch.mm(left, right, out=out)
    last.record()
    torch.cuda.synchronize(device)
    return products * 2 * _SIDE**3 / (first.elapsed_time(last) / 1000)


@contextmanager
def _countable_kernels() -> Iterator[None]:
    """Attention as plain matrix products, and nothing compiled.

    On a CPU torch has no formula for its fused attention, and on a GPU the formula of the backward pass includes the
    scores that it computes again. The fused inference path of nn.MultiheadAttention has no formula either.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _unless_repeated(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula that gives 0 inside activation checkpointing's second forward pass.

    That pass is the only one in which a backward pass is under way and operations record their gradient.
    """

    def count(*args: Any, **kwargs: Any) -> int:
        repeated = torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
        return 0 if repeated else formula(*args, **kwargs)

    count._get_raw = True  # type: ignore[attr-defined]  # the formula itself turns tensors into shapes
    return count
