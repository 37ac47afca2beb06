"""Instance level: momentum contrastive learning across the two towers.

Each image is told apart from the texts of other items, and each text from their images (InfoNCE, van den Oord et al.
2018), the candidates being momentum features: the pair's own and the queue's (COTS, Lu et al. 2022, equations 1 to 3;
MoCo, He et al. 2020).
"""

from torch import Tensor

from cots.objectives.retrieval import RetrievalTasks


def contrastive_losses(tasks: RetrievalTasks, label_smoothing: float = 0.0) -> Tensor:
    """InfoNCE of every pair, both directions averaged: (B,) float32."""
    to_text = info_nce(tasks.image_to_text, tasks.allowed, label_smoothing)
    to_image = info_nce(tasks.text_to_image, tasks.allowed, label_smoothing)
    return (to_text + to_image) / 2


def info_nce(log_probabilities: Tensor, allowed: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The negative log-probability of candidate 0.

    Args:
        log_probabilities: (B, 1 + N) over the positive and the negatives.
        allowed: (B, N) bool, which negatives take part; a row may allow none (its loss is then 0).
        label_smoothing: probability mass of the target that is spread evenly over the allowed negatives.

    Returns:
        (B,) losses.
    """
    losses = -log_probabilities[:, 0]
    if label_smoothing:
        spread = log_probabilities[:, 1:].masked_fill(~allowed, 0).sum(dim=1) / allowed.sum(dim=1).clamp_min(1)
        losses = (1 - label_smoothing) * losses - label_smoothing * spread
    return losses
