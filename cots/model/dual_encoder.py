"""The two streams and the sphere on which they meet."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cots.config import ModelConfig
from cots.model.open_clip_architecture import OPEN_CLIP
from cots.model.tower import GridTower, WordTower


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


class Stream(nn.Module):
    """What the streams have in common: they are built from one configuration."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config


class ImageStream(Stream):
    """Pixels to the sphere."""

    image_center: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        image = config.image_tower
        self.image_tower = create_image_tower(config)
        self.image_projection = Projection(self.image_tower.width, config.embedding_dim, config.projection)
        self.register_buffer("image_center", torch.zeros(config.embedding_dim))
        self.register_buffer("pixel_mean", 255 * torch.tensor(image.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", 255 * torch.tensor(image.std).view(1, 3, 1, 1), persistent=False)

    def encode_image(self, pixels: Tensor, hidden: Tensor | None = None) -> EncodedBatch:
        """Encode pictures, or clips of F frames.

        Args:
            pixels: (B, 3, S, S) uint8, or (B, F, 3, S, S).
            hidden: (B, N) bool, the patches (row by row, N = grid * grid) whose pixels the tower sees as the mean
                colour; (B, F * N) of clips.

        Returns:
            The embedding of a clip is the mean of its frames' embeddings, made unit again; its tokens are those of all
            frames, (B, F * N, C).
        """
        if pixels.ndim == 4:
            output = self.image_tower(self.prepare_pixels(pixels, hidden))
            return EncodedBatch(_embed(self.image_projection, output.pooled, self.image_center), output.tokens)
        clips, frames = pixels.shape[:2]
        if hidden is not None:
            hidden = hidden.reshape(clips * frames, -1)
        single = self.encode_image(pixels.flatten(0, 1), hidden)
        embedding = F.normalize(single.embedding.unflatten(0, (clips, frames)).mean(dim=1), dim=-1)
        return EncodedBatch(embedding, single.tokens.reshape(clips, -1, single.tokens.shape[-1]))

    def prepare_pixels(self, pixels: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) uint8 -> normalised, in the tower's type; `hidden` (B, N) patches are the mean colour: zero."""
        normalised = (pixels.float() - self.pixel_mean) / self.pixel_std
        if hidden is not None:
            grid = math.isqrt(hidden.shape[1])
            patches = hidden.view(-1, 1, grid, grid).to(torch.uint8)
            normalised = normalised.masked_fill(F.interpolate(patches, pixels.shape[-2:]).bool(), 0)
        last = pixels.is_contiguous(memory_format=torch.channels_last)  # one layout, seen whole or in part: one graph
        layout = torch.channels_last if last else torch.contiguous_format
        return normalised.to(self.image_tower.dtype).contiguous(memory_format=layout)


class TextStream(Stream):
    """Captions to the sphere."""

    text_center: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.text_tower = create_text_tower(config)
        self.text_projection = Projection(self.text_tower.width, config.embedding_dim, config.projection)
        self.register_buffer("text_center", torch.zeros(config.embedding_dim))

    def encode_text(self, token_ids: Tensor) -> EncodedBatch:
        """Encode (B, L) int64 word pieces, zero-padded."""
        output = self.text_tower(token_ids)
        return EncodedBatch(_embed(self.text_projection, output.pooled, self.text_center), output.tokens)


class DualEncoder(ImageStream, TextStream):
    """An image tower and a text tower with projections to a shared unit sphere.

    Images and texts of a trained model lie in different parts of the sphere (the modality gap, Liang et al. 2022), and
    whatever lies near the middle of its part is everybody's neighbour. `image_center` and `text_center`, zero in
    training and set when a model is released, are subtracted from the unit vectors before they are made unit again.

    The towers may compute in bfloat16 (see `lower_precision`); projections and embeddings are float32 always.
    """

    def forward(self, pixels: Tensor, token_ids: Tensor) -> tuple[EncodedBatch, EncodedBatch]:
        """Both at once: the form that DistributedDataParallel wraps."""
        return self.encode_image(pixels), self.encode_text(token_ids)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep only the inputs of the towers' layers and compute the rest again in the backward pass."""
        self.image_tower.set_activation_checkpointing(enabled)
        self.text_tower.set_activation_checkpointing(enabled)


def create_image_tower(config: ModelConfig) -> GridTower:
    """The image tower that the configuration names, with random weights."""
    if config.image_tower.name.startswith(OPEN_CLIP):
        from cots.model.open_clip_towers import OpenClipImageTower

        return OpenClipImageTower(config.image_tower)
    from cots.model.image_tower import ImageTower  # imports timm, which a search by words never needs

    return ImageTower(config.image_tower)


def create_text_tower(config: ModelConfig) -> WordTower:
    """The text tower that the configuration names, with random weights."""
    if config.text_tower.name.startswith(OPEN_CLIP):
        from cots.model.open_clip_towers import OpenClipTextTower

        return OpenClipTextTower(config.text_tower)
    from cots.model.text_tower import TextTower

    return TextTower(config.text_tower)


def _embed(projection: Projection, pooled: Tensor, center: Tensor) -> Tensor:
    unit = F.normalize(projection(pooled.float()).float(), dim=-1)
    return F.normalize(unit - center, dim=-1)
