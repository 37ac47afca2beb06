"""What every tower is: a network that makes tokens of a batch, and one vector of them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass
class TowerOutput:
    """What a tower makes of a batch.

    Attributes:
        pooled: (B, C) the token that the global embedding is projected from.
        tokens: (B, N, C) one vector a patch or word piece, without [CLS] for images, with it for text.
    """

    pooled: Tensor
    tokens: Tensor


class Tower(nn.Module):
    """A network from one modality to a TowerOutput.

    Attributes:
        width: C of its outputs.
        freeze_norms: batch norms stay in evaluation mode in training too; their scales and shifts still learn.
        frozen: nothing of it learns, and it stays in evaluation mode.
    """

    width: int

    def __init__(self) -> None:
        super().__init__()
        self.freeze_norms = False
        self.frozen = False

    @property
    def dtype(self) -> torch.dtype:
        """The type of its matrices, and so of the pixels it takes."""
        return next(parameter for parameter in self.parameters() if parameter.ndim > 1).dtype

    def freeze(self) -> None:
        """Learn nothing from here on, neither weights nor statistics."""
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Tower":
        super().train(mode and not self.frozen)
        if self.freeze_norms:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep only the inputs of the layers and compute the rest again in the backward pass, or keep everything."""
        raise NotImplementedError

    def layer_depths(self) -> dict[str, int]:
        """The layer of every parameter by its name, counted from the input: 0 is the embedding of patches or words.

        What follows the last layer counts as part of it. For rates that decay towards the input (Clark et al. 2020).
        """
        raise NotImplementedError


class GridTower(Tower):
    """A tower of pictures, whose tokens form a square.

    Attributes:
        grid: its side, for a picture of the configured size.
        stride: pixels between two neighbouring tokens.
    """

    grid: int
    stride: int


class WordTower(Tower):
    """A tower of captions."""

    @property
    def word_embeddings(self) -> Tensor:
        """(vocabulary, C), by which hidden word pieces are also decoded."""
        raise NotImplementedError


def lower_precision(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Cast the matrices and vectors of an encoder's towers in place, for arithmetic in `dtype` without autocast.

    Batch norms keep float32, in which their statistics are summed, and so does all outside of the towers: projections,
    centres and the normalisation of pixels and embeddings. Buffers keep their type: tables of rotary positions lose
    their meaning in 8 bits of mantissa.
    """
    for tower in (module for module in encoder.children() if isinstance(module, Tower)):
        for module in tower.modules():
            if not isinstance(module, _BatchNorm):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
