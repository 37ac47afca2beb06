"""From the embeddings of a clip's frames to one: their mean, or the mean plus what a transformer over them adds.

The mean of frame embeddings is a strong clip embedding (CLIP4Clip, Luo et al. 2021, meanP), but it is the same for a
clip played backwards. A transformer over the frames sees their order (seqTransf there); here its output is a residual
on the mean, zero before training, so that fine-tuning starts from exactly what the mean can do.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cots.model_config import TemporalConfig


class TemporalTransformer(nn.Module):
    """Frame embeddings (B, F, D) -> what is added to their mean, (B, D).

    A frame's place is counted in shares of its clip, so a clip may be seen in more or fewer frames than in training:
    the embeddings of places are interpolated.
    """

    def __init__(self, dimension: int, config: TemporalConfig) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(config.positions, dimension))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dimension, config.heads, 2 * dimension, config.dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dimension)
        self.residual = nn.Linear(dimension, dimension)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)

    def forward(self, frames: Tensor, counts: Tensor) -> Tensor:
        """Frames are (B, F, D) float32 of unit norm, of which the first `counts` (B,) int64 of a clip are there."""
        present = _present(frames, counts)
        # unit vectors of D numbers are scaled to numbers of unit size, like the embeddings of places
        hidden = frames * frames.shape[-1] ** 0.5 + self._places(frames.shape[1], counts)
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=~present)
        return self.residual(masked_mean(self.norm(hidden), counts))

    def _places(self, frames: int, counts: Tensor) -> Tensor:
        """(B, F, D) embeddings of the places (f + 0.5) / count, linear between the rows of `positions`."""
        rows = len(self.positions)
        share = (torch.arange(frames, device=counts.device) + 0.5) / counts[:, None]
        place = (share * rows - 0.5).clamp(0, rows - 1)
        low = place.long().clamp_max(rows - 2)
        weight = (place - low)[..., None]
        return self.positions[low] * (1 - weight) + self.positions[low + 1] * weight


def pool_clips(frames: Tensor, counts: Tensor, center: Tensor, transformer: TemporalTransformer | None) -> Tensor:
    """Pool the embeddings of clips.

    A clip of one frame keeps that frame's embedding to the last bit: photographs cost nothing.

    Args:
        frames: (B, F, D) float32, unit norm.
        counts: (B,) int64, how many of a clip's F frames are there; the others are ignored.
        center: (D,), what was subtracted from the unit vectors of frames; see `DualEncoder`. Transformers are trained
            on frames without it, so they see the frames as they were before, and the centre is subtracted afterwards.
        transformer: None for the mean.

    Returns:
        (B, D) float32, unit norm.
    """
    if transformer is None:
        pooled = F.normalize(masked_mean(frames, counts), dim=-1)
    else:
        # a frame is normalize(u - center) of a unit vector u: u = s * frame + center, with the s that makes it unit
        along = frames @ center
        scale = (along.square() + 1 - center.square().sum()).sqrt() - along
        uncentred = frames * scale[..., None] + center
        clips = masked_mean(uncentred, counts) + transformer(uncentred, counts)
        pooled = F.normalize(F.normalize(clips, dim=-1) - center, dim=-1)
    return torch.where(counts[:, None] == 1, frames[:, 0], pooled)


def masked_mean(values: Tensor, counts: Tensor) -> Tensor:
    """(B, F, D) -> (B, D), over the first `counts` (B,) of each row."""
    kept = values.masked_fill(~_present(values, counts)[..., None], 0)
    return kept.sum(dim=1) / counts[:, None]


def _present(values: Tensor, counts: Tensor) -> Tensor:
    """(B, F) bool."""
    return torch.arange(values.shape[1], device=values.device) < counts[:, None]
