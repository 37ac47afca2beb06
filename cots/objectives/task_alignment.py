"""Task level: image-to-text and text-to-image retrieval are two views of one task, and should agree.

Over the same candidates (the pair itself and the queue, whose rows are aligned), the image's distribution over texts
and the text's distribution over images are pulled together by a symmetric Kullback-Leibler divergence (COTS, Lu et
al. 2022, equations 8 to 10). Or both are pulled towards what the momentum towers make of the same choice.
"""

import math

import torch
from torch import Tensor

from cots.objectives.retrieval import RetrievalTasks


def alignment_losses(tasks: RetrievalTasks, gradient: str = "prediction") -> Tensor:
    """(KL(i2t || t2i) + KL(t2i || i2t)) / 2 of every pair: (B,) float32.

    Args:
        tasks: log-probabilities of both directions over aligned candidates.
        gradient: `both`, or `prediction`, which holds the first argument (the target) of each divergence constant.
    """
    first, second = tasks.image_to_text, tasks.text_to_image
    if gradient == "both":
        # KL(p || q) + KL(q || p) = sum (p - q)(log p - log q)
        return ((first.exp() - second.exp()) * (first - second)).sum(dim=1) / 2
    return (kl_divergence(first.detach(), second) + kl_divergence(second.detach(), first)) / 2


def momentum_alignment_losses(tasks: RetrievalTasks, by_momentum: RetrievalTasks) -> Tensor:
    """(KL(m || i2t) + KL(m || t2i)) / 2 of every pair, m the mean of both directions by the momentum towers: (B,)."""
    target = torch.logaddexp(by_momentum.image_to_text, by_momentum.text_to_image) - math.log(2)
    return (kl_divergence(target, tasks.image_to_text) + kl_divergence(target, tasks.text_to_image)) / 2


def kl_divergence(target: Tensor, prediction: Tensor) -> Tensor:
    """KL(target || prediction) of log-probabilities (B, N): (B,)."""
    return (target.exp() * (target - prediction)).sum(dim=1)


def agreement(tasks: RetrievalTasks) -> Tensor:
    """() share of the pairs for which both directions rank the same candidate first, for the log."""
    with torch.no_grad():
        return (tasks.image_to_text.argmax(dim=1) == tasks.text_to_image.argmax(dim=1)).float().mean()
