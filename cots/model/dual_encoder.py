"""The two streams and the sphere on which they meet."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cots.config import ModelConfig
from cots.model.image_tower import ImageTower
from cots.model.text_tower import TextTower


@dataclass
class EncodedBatch:
    """Attributes:
    embedding: (B, D) float32, unit norm.
    tokens: (B, N, C) the tower's token-level outputs.
    """

    embedding: Tensor
    tokens: Tensor


class Projection(nn.Module):
    """Pooled token (B, C) -> (B, D). `mlp` adds a hidden layer beside the linear map."""

    def __init__(self, width: int, dimension: int, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dimension)
        self.mlp: nn.Module | None = None
        if kind == "mlp":
            self.mlp = nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.GELU(),
                nn.Dropout(0.1),
                nn.Linear(2 * width, dimension),
            )

    def forward(self, pooled: Tensor) -> Tensor:
        projected = self.linear(pooled)
        return projected if self.mlp is None else projected + self.mlp(pooled)


class DualEncoder(nn.Module):
    """An image tower and a text tower with projections to a shared unit sphere.

    Images and texts of a trained model lie in different parts of the sphere (the modality gap, Liang et al. 2022), and
    whatever lies near the middle of its part is everybody's neighbour. `image_center` and `text_center`, zero in
    training and set when a model is released, are subtracted from the unit vectors before they are made unit again.
    """

    image_center: Tensor
    text_center: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.image_tower = ImageTower(config.image_tower)
        self.text_tower = TextTower(config.text_tower)
        self.image_projection = Projection(self.image_tower.width, config.embedding_dim, config.projection)
        self.text_projection = Projection(self.text_tower.width, config.embedding_dim, config.projection)
        self.register_buffer("image_center", torch.zeros(config.embedding_dim))
        self.register_buffer("text_center", torch.zeros(config.embedding_dim))
        self.register_buffer(
            "pixel_mean", 255 * torch.tensor(config.image_tower.mean).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer("pixel_std", 255 * torch.tensor(config.image_tower.std).view(1, 3, 1, 1), persistent=False)

    def encode_image(self, pixels: Tensor) -> EncodedBatch:
        """Encode (B, 3, S, S) uint8 pixels."""
        output = self.image_tower((pixels.float() - self.pixel_mean) / self.pixel_std)
        return EncodedBatch(_embed(self.image_projection(output.pooled), self.image_center), output.tokens)

    def encode_text(self, token_ids: Tensor) -> EncodedBatch:
        """Encode (B, L) int64 word pieces, zero-padded."""
        output = self.text_tower(token_ids)
        return EncodedBatch(_embed(self.text_projection(output.pooled), self.text_center), output.tokens)

    def forward(self, pixels: Tensor, token_ids: Tensor) -> tuple[EncodedBatch, EncodedBatch]:
        """Both at once: the form that DistributedDataParallel wraps."""
        return self.encode_image(pixels), self.encode_text(token_ids)


def _embed(projected: Tensor, center: Tensor) -> Tensor:
    unit = F.normalize(projected.float(), dim=-1)
    return F.normalize(unit - center, dim=-1)
