"""Joining the ranks' features into the global batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(local: Tensor) -> Tensor:
    """(B, ...) on each rank -> (W*B, ...) in rank order on every rank, without gradient."""
    if not (dist.is_available() and dist.is_initialized()):
        return local.detach()
    if local.is_meta:  # nothing but a shape, as FLOPs are counted with
        return torch.cat([local.detach()] * dist.get_world_size())
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(local: Tensor) -> Tensor:
    """As `gather`; the gradient of every rank's loss flows back to the rank that owns the row.

    With the losses averaged over local rows and the parameters' gradients averaged over ranks
    (DistributedDataParallel), the result is the gradient of the joined batch.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return local
    return _Gather.apply(local)


def rank_offset(local_rows: int) -> int:
    """The row of the global batch at which this rank's rows begin."""
    return dist.get_rank() * local_rows if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, local: Tensor) -> Tensor:
        context.rows = len(local)
        return gather(local)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may share the one that it passes
        if not gradient.is_meta:
            dist.all_reduce(gradient)
        start = rank_offset(context.rows)
        return gradient[start : start + context.rows]
