"""The adaptive momentum filter: pairs that do not belong together teach nothing.

The momentum towers' similarities of past pairs are kept in a queue; a pair whose own similarity lies more than some
deviations below the queue's mean is taken for noise (COTS, Lu et al. 2022, section 3.3). The threshold moves with the
towers: what is unusual is measured against what is usual at that time.

Some pairs are always so many deviations below the mean, also where all belong together. The other rule is ours: pairs
are left out only if the similarities form two hills, and then those that are of the lower one.
"""

import torch
from torch import Tensor, nn

from cots.config import NoiseFilterConfig
from cots.objectives.two_normals import TwoNormals

_HILLS = 2.0  # `TwoNormals.apart` of two hills
_ODDS = 9.0  # with which a pair is of the lower one
_NONE = -1.0  # no similarity is lower


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
    def threshold(self) -> Tensor:
        """() float32, of the queue: mean - deviations * standard deviation, or where the lower hill ends.

        -1 if there are no two hills, or the queue, which they are looked for in, is not full.
        """
        if self.config.rule == "mixture":
            found = TwoNormals.fit(self.similarities)
            end = found.end_of_lower(_ODDS).nan_to_num(_NONE)
            return torch.where((found.apart > _HILLS) & (self.fill == len(self.similarities)), end, _NONE)
        written = torch.arange(len(self.similarities), device=self.similarities.device) < self.fill
        count = self.fill.clamp_min(1)
        mean = (self.similarities * written).sum() / count
        variance = ((self.similarities - mean).square() * written).sum() / count
        return mean - self.config.deviations * variance.sqrt()

    @torch.no_grad()
    def keep(self, image: Tensor, text: Tensor, threshold: Tensor, progress: float) -> Tensor:
        """Which pairs of the global batch teach.

        Args:
            image, text: (B, D) momentum features of all ranks, unit norm: every rank decides alike.
            threshold: ().
            progress: share of the training done. Before `start`, and while the queue is not full, all pairs teach.

        Returns:
            (B,) bool.
        """
        similarity = (image * text).sum(dim=1)
        if progress < self.config.start:
            return torch.ones_like(similarity, dtype=torch.bool)
        return (similarity >= threshold) | (self.fill < len(self.similarities))

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor) -> None:
        """Write the similarities of a global batch over the oldest ones."""
        size = len(self.similarities)
        new = (image * text).sum(dim=1)[-size:]
        places = (self.pointer + torch.arange(len(new), device=new.device)) % size
        self.similarities[places] = new.to(self.similarities.dtype)
        self.pointer.copy_((self.pointer + len(new)) % size)
        self.fill.copy_((self.fill + len(new)).clamp_max(size))
