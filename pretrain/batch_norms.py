"""Batch norms that are learning: which pictures their running statistics are of."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def still_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norms that are learning go by the batch, as ever, but their running statistics do not follow it: those are
    of whole pictures, each seen once, as a model meets them that is not trained any more."""
    learning = _learning(network)
    before = [module.momentum for module in learning]
    for module in learning:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum in zip(learning, before):
            module.momentum = momentum


@torch.no_grad()
def average_statistics(network: nn.Module) -> None:
    """Give the running statistics of batch norms that are learning the mean over all ranks.

    Each rank gathers them from its own part of the batch; one that went on by its own would drift apart, and come back
    as another one from a checkpoint.
    """
    buffers = [buffer for module in _learning(network) for buffer in (module.running_mean, module.running_var)]
    found = [buffer for buffer in buffers if buffer is not None]
    if not found:
        return
    joined = torch.cat(found)
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    torch._foreach_copy_(found, list(joined.split([len(buffer) for buffer in found])))


def _learning(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
