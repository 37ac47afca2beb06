"""The adaptive momentum filter: pairs that do not belong together teach nothing.

The momentum towers' similarities of past pairs are kept in a queue; a pair whose own similarity lies more than some
deviations below the queue's mean is taken for noise (COTS, Lu et al. 2022, section 3.3). The threshold moves with the
towers: what is unusual is measured against what is usual at that time.

Some pairs are always so many deviations below the mean, also where all belong together. The other rule is ours: pairs
are left out only if the similarities form two hills, of which the lower one is the smaller and lies where the
similarities of pictures with captions of others lie, and the higher one does not; then those that are of it. (Two
sources, one of them harder than the other, make two hills as well; the lower of these is far above what a caption of
another picture has.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cots.config import NoiseFilterConfig
from cots.objectives.two_normals import TwoNormals

_HILLS = 2.0  # `TwoNormals.apart` of two hills
_ODDS = 9.0  # with which a pair is of the lower one
_REACH = 2.0  # deviations above the mean of strangers that the lower one's mean lies at most


@dataclass
class Judgement:
    """Attributes:
    kept: (B,) bool, the pairs of the global batch that teach.
    scalars: () float32 values for the log.
    """

    kept: Tensor
    scalars: dict[str, Tensor]


class NoiseFilter(nn.Module):
    """Similarities of past pairs of all ranks, and the threshold drawn from them.

    Attributes:
        similarities: (Q,) float32.
        pointer: () int64, the place that is written next.
        fill: () int64, places written so far, at most Q.
    """

    similarities: Tensor
    pointer: Tensor
    fill: Tensor

    def __init__(self, config: NoiseFilterConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("similarities", torch.zeros(config.queue_size))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fill", torch.zeros((), dtype=torch.int64))

    @property
    def enabled(self) -> bool:
        return self.config.queue_size > 0

    @torch.no_grad()
    def judge(self, image: Tensor, text: Tensor, progress: float) -> Judgement:
        """Which pairs of the global batch teach.

        Args:
            image, text: (B, D) momentum features of all ranks, unit norm: every rank decides alike. Captions of one
                picture stand beside each other.
            progress: share of the training done. Before `start`, and while the queue is not full, all pairs teach.
        """
        similarity = (image * text).sum(dim=1)
        if progress < self.config.start:
            kept, scalars = torch.ones_like(similarity, dtype=torch.bool), {}
        elif self.config.rule == "mixture":
            strangers = (image * text.roll(len(text) // 2, dims=0)).sum(dim=1)
            found, end = self.lower_hill(strangers)
            kept, scalars = ~found | (similarity >= end), {"filter_two_hills": found.float()}
        else:
            threshold = self.threshold()
            kept, scalars = similarity >= threshold, {"filter_threshold": threshold}
        kept = kept | (self.fill < len(self.similarities))
        return Judgement(kept, {"filter_kept": kept.float().mean(), **scalars})

    def threshold(self) -> Tensor:
        """() float32: mean - deviations * standard deviation of the queue."""
        written = torch.arange(len(self.similarities), device=self.similarities.device) < self.fill
        count = self.fill.clamp_min(1)
        mean = (self.similarities * written).sum() / count
        variance = ((self.similarities - mean).square() * written).sum() / count
        return mean - self.config.deviations * variance.sqrt()

    def lower_hill(self, strangers: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the queue, which is full, has a hill of pairs that do not belong together, () bool, and where it
        ends, () float32.

        Args:
            strangers: (B,), similarities of pictures with captions of others.
        """
        fitted = TwoNormals.fit(self.similarities)
        (low, high), end = fitted.means, fitted.end_of_lower(_ODDS)
        mean, deviation = strangers.mean(), strangers.std(correction=0)
        strange = (fitted.shares[0] < 0.5) & (low < mean + _REACH * deviation)
        # before the towers tell pairs from strangers, two hills are but older similarities and newer ones
        deviations = torch.stack([deviation, fitted.deviations[1]])
        told = TwoNormals(fitted.shares, torch.stack([mean, high]), deviations).apart > _HILLS
        return (fitted.apart > _HILLS) & strange & told & ~end.isnan(), end

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor) -> None:
        """Write the similarities of a global batch over the oldest ones."""
        size = len(self.similarities)
        new = (image * text).sum(dim=1)[-size:]
        places = (self.pointer + torch.arange(len(new), device=new.device)) % size
        self.similarities[places] = new.to(self.similarities.dtype)
        self.pointer.copy_((self.pointer + len(new)) % size)
        self.fill.copy_((self.fill + len(new)).clamp_max(size))
