"""Instance level: momentum contrastive learning across the two towers.

Each image is told apart from the texts of other items, and each text from their images (InfoNCE, van den Oord et al.
2018), the candidates being momentum features: the pair's own and the queue's (COTS, Lu et al. 2022, equations 1 to 3;
MoCo, He et al. 2020).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cots.config import ContrastiveConfig
from cots.objectives.feature_queue import FeatureQueue
from cots.objectives.gathering import gather_with_gradient, rank_offset


@dataclass
class PairFeatures:
    """A batch of pairs on one rank, with the momentum features of the whole global batch.

    Attributes:
        image, text: (B, D) float32, unit norm, with gradient.
        item_ids: (B,) int64.
        image_momentum, text_momentum, all_item_ids: (W*B, D), (W*B, D), (W*B,), gathered in rank order, without
            gradient.
    """

    image: Tensor
    text: Tensor
    item_ids: Tensor
    image_momentum: Tensor
    text_momentum: Tensor
    all_item_ids: Tensor

    @property
    def own_rows(self) -> slice:
        """This rank's rows of the gathered features."""
        start = rank_offset(len(self.item_ids))
        return slice(start, start + len(self.item_ids))


@dataclass
class ContrastiveOutput:
    """Attributes:
    losses: (B,) one for each pair, both directions averaged; float32.
    positive, negative: () mean similarity to the pair's own and to other items' features, for the log.
    """

    losses: Tensor
    positive: Tensor
    negative: Tensor


class MomentumContrastive(nn.Module):
    """InfoNCE of both directions over the queue's momentum features and, if configured, the other pairs of the
    batch."""

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.in_batch = config.in_batch
        self.label_smoothing = config.label_smoothing

    def forward(self, batch: PairFeatures, queue: FeatureQueue, temperature: Tensor) -> ContrastiveOutput:
        with torch.autocast(batch.image.device.type, enabled=False):
            text_candidates, image_candidates = batch.text_momentum, batch.image_momentum
            if self.in_batch == "online":
                text_candidates, image_candidates = gather_with_gradient(batch.text), gather_with_gradient(batch.image)
            others = batch.item_ids[:, None] != batch.all_item_ids
            allowed = queue.negatives_of(batch.item_ids)
            if self.in_batch != "none":
                allowed = torch.cat([others, allowed], dim=1)
            to_text = self._direction(batch.image, text_candidates, queue.text, batch.own_rows, allowed, temperature)
            to_image = self._direction(batch.text, image_candidates, queue.image, batch.own_rows, allowed, temperature)
        return ContrastiveOutput(*((first + second) / 2 for first, second in zip(to_text, to_image)))

    def _direction(
        self, anchors: Tensor, batch: Tensor, queue: Tensor, own: slice, allowed: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        negatives = queue if self.in_batch == "none" else torch.cat([batch, queue])
        positive = (anchors * batch[own]).sum(dim=1)
        similarity = anchors @ negatives.T
        losses = info_nce(positive / temperature, similarity / temperature, allowed, self.label_smoothing)
        mean_negative = (similarity.detach() * allowed).sum() / allowed.sum().clamp_min(1)
        return losses, positive.detach().mean(), mean_negative


def info_nce(positive: Tensor, negatives: Tensor, allowed: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log softmax of the positive among the allowed candidates.

    Args:
        positive: (B,) logits of the positives.
        negatives: (B, N) logits of the negatives.
        allowed: (B, N) bool; a row may allow none (its loss is then 0).
        label_smoothing: probability mass spread evenly over the allowed negatives.

    Returns:
        (B,) losses.
    """
    logits = torch.cat([positive[:, None], negatives.masked_fill(~allowed, float("-inf"))], dim=1)
    log_probabilities = F.log_softmax(logits, dim=1)
    losses = -log_probabilities[:, 0]
    if label_smoothing:
        spread = log_probabilities[:, 1:].masked_fill(~allowed, 0).sum(dim=1) / allowed.sum(dim=1).clamp_min(1)
        losses = (1 - label_smoothing) * losses - label_smoothing * spread
    return losses
