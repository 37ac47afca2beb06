"""Exponential moving averages of a network: the momentum towers, and the slow average that is shipped."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from pretrain.sharding import local

Network = TypeVar("Network", bound=nn.Module)


class MovingAverage(Generic[Network]):
    """A copy of a network whose weights follow it: average = decay * average + (1 - decay) * network, after every step.

    The copy stays in evaluation mode (no dropout, running statistics) and needs no gradient. Floating-point buffers
    are averaged like weights; the others are copied. Of weights that are shared out, each rank averages its part.

    Args:
        twin: becomes the average, in place of a copy; it is as much shared out as the network, and equal to it.
    """

    def __init__(self, network: Network, decay: float, twin: Network | None = None) -> None:
        self.decay = decay
        self.network = (copy.deepcopy(network) if twin is None else twin).eval().requires_grad_(False)
        ours, theirs = self.network.state_dict(), network.state_dict()
        self._averaged = [(ours[name], theirs[name]) for name in ours if ours[name].is_floating_point()]
        self._copied = [(ours[name], theirs[name]) for name in ours if not ours[name].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the network by one step."""
        ours, theirs = ([local(tensor) for tensor in side] for side in zip(*self._averaged))
        torch._foreach_lerp_(ours, theirs, 1 - self.decay)
        for target, source in self._copied:
            target.copy_(source)

    @torch.no_grad()
    def reset(self) -> None:
        """Become equal to the network."""
        for target, source in [*self._averaged, *self._copied]:
            local(target).copy_(local(source))
