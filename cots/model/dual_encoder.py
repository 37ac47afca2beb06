"""The two streams and the sphere on which they meet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cots.model.open_clip_architecture import OPEN_CLIP
from cots.model.temporal import TemporalTransformer, pool_clips
from cots.model.tower import GridTower, WordTower
from cots.model_config import ModelConfig


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
        self.image_temporal = (
            TemporalTransformer(config.embedding_dim, config.temporal)
            if config.temporal.kind == "transformer"
            else None
        )
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
            The embedding of a clip is pooled from its frames' (see `pool_frames`); its tokens are those of all frames,
            (B, F * N, C).
        """
        if pixels.ndim == 4:
            output = self.image_tower(self.prepare_pixels(pixels, hidden))
            return EncodedBatch(_embed(self.image_projection, output.pooled, self.image_center), output.tokens)
        clips, frames = pixels.shape[:2]
        if hidden is not None:
            hidden = hidden.reshape(clips * frames, -1)
        single = self.encode_image(pixels.flatten(0, 1), hidden)
        embedding = self.pool_frames(single.embedding.unflatten(0, (clips, frames)))
        return EncodedBatch(embedding, single.tokens.reshape(clips, -1, single.tokens.shape[-1]))

    def encode_video(self, pixels: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Encode pictures and clips together, each of as many frames as it has: (B, D) float32, unit norm.

        Only frames that are there go through the tower, as one flat batch: a picture costs one pass, not F. The flat
        batch is filled up with repeated frames, whose embeddings are dropped, to a multiple of a quarter of B: its
        size then takes a few values only, for each of which a compiled tower is compiled once, and how the items of
        a step happen to fall costs an eighth of B on average. All else is as without the filling; ranks of one step
        may differ in the size.

        Args:
            pixels: (B, F, 3, S, S) uint8.
            counts: B numbers (no tensor of a device: shapes depend on them), how many of an item's F frames are there,
                at least 1; None: all.
        """
        clips, most = pixels.shape[:2]
        if counts is None:
            return self.pool_frames(self.encode_image(pixels.flatten(0, 1)).embedding.unflatten(0, (clips, most)))
        there = torch.tensor(counts)
        rows = (torch.arange(most) < there[:, None]).flatten().nonzero().flatten()
        step = max(1, clips // 4)
        size = -(-len(rows) // step) * step
        filled = _send(rows[torch.arange(size) % len(rows)], pixels.device)
        single = self.encode_image(pixels.flatten(0, 1)[filled]).embedding[: len(rows)]
        embeddings = single.new_zeros(clips * most, single.shape[1]).index_copy(0, filled[: len(rows)], single)
        return self.pool_frames(embeddings.unflatten(0, (clips, most)), _send(there, pixels.device))

    def pool_frames(self, frames: Tensor, counts: Tensor | None = None) -> Tensor:
        """(B, F, D) embeddings of frames, the first `counts` (B,) of them, -> (B, D), unit norm; see `pool_clips`."""
        if counts is None:
            counts = torch.full((len(frames),), frames.shape[1], device=frames.device)
        return pool_clips(frames, counts, self.image_center, self.image_temporal)

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


def _send(numbers: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU's on the device, without waiting until it is there."""
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


def _embed(projection: Projection, pooled: Tensor, center: Tensor) -> Tensor:
    unit = F.normalize(projection(pooled.float()).float(), dim=-1)
    return F.normalize(unit - center, dim=-1)
