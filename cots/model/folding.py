"""Batch normalisation folded into the convolution before it: the same function, with fewer passes over memory."""

import copy
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn

from cots.model.tower import GridTower

AnyTower = TypeVar("AnyTower", bound=GridTower)


def fold_batch_norms(network: AnyTower, sample: torch.Tensor, tolerance: float = 1e-3) -> AnyTower:
    """A copy of an image tower, each batch norm that directly follows a convolution folded into it.

    Modules are paired by the order of their definition; since a network may compute in another order, the copy is
    compared with the original on `sample`, and the original is returned if they differ by more than `tolerance` (of the
    norm).

    Args:
        network: in evaluation mode.
        sample: (B, 3, S, S) normalised pixels.
    """
    folded = copy.deepcopy(network)
    for parent in list(folded.modules()):
        children = list(parent.named_children())
        for (_, first), (name, second) in pairwise(children):
            if (
                isinstance(first, nn.Conv2d)
                and isinstance(second, nn.BatchNorm2d)
                and first.out_channels == second.num_features
            ):
                _fold(first, second)
                # timm's BatchNormAct2d holds what comes after the normalisation as `drop` and `act`
                rest = [getattr(second, part) for part in ("drop", "act") if hasattr(second, part)]
                setattr(parent, name, nn.Sequential(*rest) if rest else nn.Identity())
    with torch.inference_mode():
        expected, found = network(sample).pooled, folded(sample).pooled
    return folded if (expected - found).norm() <= tolerance * expected.norm() else network


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean * scale
    if norm.affine:
        shift = norm.weight * shift + norm.bias
        scale = norm.weight * scale
    if convolution.bias is not None:
        shift = shift + scale * convolution.bias
    convolution.weight = nn.Parameter(
        convolution.weight.detach() * scale.detach().view(-1, 1, 1, 1), requires_grad=False
    )
    convolution.bias = nn.Parameter(shift.detach(), requires_grad=False)
