"""Both retrieval tasks of a batch as probability distributions: what the instance level and the task level share.

For every pair, the image chooses among texts and the text among images. Candidate 0 is the pair's own; the others are
the rest of the global batch (if configured) and the queue. Candidate j of both directions comes from the same pair.

All candidates of a choice come from the same towers, the learning ones or the momentum ones. The latter lag behind, and
where a positive of today stood among negatives of a hundred steps ago, the age alone would tell it from them: measured
on Flickr8k, that costs 4 points of R@1. With online features and a queue there are therefore two choices.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cots.full_precision import full_precision
from cots.objectives.feature_queue import FeatureQueue
from cots.objectives.gathering import gather_with_gradient, rank_offset

# the logit of what is no candidate: its probability is exactly 0, and 0 * log(0) stays a number
_EXCLUDED = -1e4


@dataclass
class MomentumFeatures:
    """What the momentum towers make of the whole global batch, gathered in rank order, without gradient.

    Attributes:
        image, text: (W*B, D) float32, unit norm.
    """

    image: Tensor
    text: Tensor


@dataclass
class PairFeatures:
    """A batch of pairs on one rank, and what it needs to know of the global batch.

    Attributes:
        image, text: (B, D) float32, unit norm, with gradient.
        item_ids: (B,) int64.
        all_item_ids: (W*B,) int64, gathered in rank order.
        momentum: None if no level looks at it.
    """

    image: Tensor
    text: Tensor
    item_ids: Tensor
    all_item_ids: Tensor
    momentum: MomentumFeatures | None = None

    @property
    def by_momentum(self) -> MomentumFeatures:
        """The momentum features, where a level needs them."""
        assert self.momentum is not None
        return self.momentum

    @property
    def own_rows(self) -> slice:
        """This rank's rows of the gathered features."""
        start = rank_offset(len(self.item_ids))
        return slice(start, start + len(self.item_ids))


@dataclass
class RetrievalTasks:
    """Attributes:
    image_to_text, text_to_image: (B, 1 + N) float32 log-probabilities, column 0 the pair's own candidate.
    allowed: (B, N) bool, which of the others are candidates: written rows of other items.
    positive, negative: () mean similarity to the pair's own and to other items' features, for the log.
    """

    image_to_text: Tensor
    text_to_image: Tensor
    allowed: Tensor
    positive: Tensor
    negative: Tensor


def retrieval_tasks(
    batch: PairFeatures, queue: FeatureQueue, temperature: Tensor, in_batch: str
) -> list[RetrievalTasks]:
    """Both directions over the queue and, by `in_batch` (see ContrastiveConfig), the other pairs of the batch.

    Returns:
        one choice among momentum features, or one among the batch's online features; with both online features and a
        queue, the two of them.
    """
    with full_precision(batch.image.device):
        others_in_batch = batch.item_ids[:, None] != batch.all_item_ids
        tasks = []
        if in_batch == "online":
            images, texts = gather_with_gradient(batch.image), gather_with_gradient(batch.text)
            tasks.append(_tasks(batch, (images, texts), images, texts, others_in_batch, temperature))
        if in_batch != "online" or queue.size:
            positives = batch.by_momentum.image, batch.by_momentum.text
            images, texts, allowed = queue.image, queue.text, queue.negatives_of(batch.item_ids)
            if in_batch == "momentum":
                images, texts = torch.cat([positives[0], images]), torch.cat([positives[1], texts])
                allowed = torch.cat([others_in_batch, allowed], dim=1)
            tasks.append(_tasks(batch, positives, images, texts, allowed, temperature))
        return tasks


@torch.no_grad()
def momentum_tasks(
    batch: PairFeatures, queue: FeatureQueue, temperature: Tensor, in_batch: str
) -> list[RetrievalTasks]:
    """The same choices over the same pairs as `retrieval_tasks` gives, as the momentum towers make them."""
    rows = batch.own_rows
    asked = replace(batch, image=batch.by_momentum.image[rows], text=batch.by_momentum.text[rows])
    return retrieval_tasks(asked, queue, temperature, in_batch)


def _tasks(
    batch: PairFeatures,
    positives: tuple[Tensor, Tensor],
    images: Tensor,
    texts: Tensor,
    allowed: Tensor,
    temperature: Tensor,
) -> RetrievalTasks:
    """Both directions among the pairs' own features, (W*B, D) of images and of texts, and others (N, D) of which
    `allowed` (B, N) says which are candidates."""

    def similarities(anchors: Tensor, partners: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        return (anchors * partners[batch.own_rows]).sum(dim=1, keepdim=True), anchors @ others.T

    def log_probabilities(positive: Tensor, others: Tensor) -> Tensor:
        logits = torch.cat([positive, others], dim=1) / temperature
        logits[:, 1:].masked_fill_(~allowed, _EXCLUDED)
        return torch.log_softmax(logits, dim=1)

    to_text, to_image = similarities(batch.image, positives[1], texts), similarities(batch.text, positives[0], images)
    negative = sum((others.detach() * allowed).sum() for _, others in (to_text, to_image))
    return RetrievalTasks(
        log_probabilities(*to_text),
        log_probabilities(*to_image),
        allowed,
        (to_text[0].detach().mean() + to_image[0].detach().mean()) / 2,
        negative / (2 * allowed.sum()).clamp_min(1),
    )
