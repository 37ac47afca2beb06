"""The COTS objective: the weighted sum of its levels over one batch, and the state (temperature, queues) they share.

The instance and the task level are computed here from the embeddings of a batch, under the noise filter; the token
level needs the towers' token outputs and comes in as losses. A level whose weight is 0 is not computed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cots.config import TEMPERATURES, ObjectiveConfig
from cots.objectives.contrastive import contrastive_losses
from cots.objectives.feature_queue import FeatureQueue
from cots.objectives.noise_filter import NoiseFilter
from cots.objectives.retrieval import PairFeatures, RetrievalTasks, momentum_tasks, retrieval_tasks
from cots.objectives.task_alignment import agreement, alignment_losses, momentum_alignment_losses


@dataclass
class ObjectiveOutput:
    """Attributes:
    loss: () float32, to be differentiated: its mean over the ranks is that of the global batch.
    scalars: detached () values for the log: each loss by name, temperature, similarities, queue fill, share kept.
    """

    loss: Tensor
    scalars: dict[str, Tensor]


class CollaborativeObjective(nn.Module):
    def __init__(self, config: ObjectiveConfig, dimension: int) -> None:
        super().__init__()
        self.config = config
        self.queue = FeatureQueue(config.contrastive.queue_size, dimension)
        self.filter = NoiseFilter(config.noise_filter)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(config.temperature)), requires_grad=config.learn_temperature
        )

    @property
    def uses_momentum(self) -> bool:
        """Whether any level looks at the momentum towers; if none does, they need not be computed."""
        alignment = self.config.task_alignment
        soft_targets = alignment.weight > 0 and alignment.target == "momentum"
        candidates = self.config.contrastive.in_batch != "online" or self.queue.size > 0
        return self.compares and (candidates or self.filter.enabled or soft_targets)

    @property
    def compares(self) -> bool:
        """Whether the instance or the task level is on."""
        return self.config.contrastive.weight > 0 or self.config.task_alignment.weight > 0

    @property
    def temperature(self) -> Tensor:
        """() float32."""
        return self.log_temperature.exp()

    @torch.no_grad()
    def bound_temperature(self) -> None:
        """Put a learned temperature that a step took out of `TEMPERATURES` back onto the bound.

        The parameter itself, not what is computed from it: that would have no gradient beyond a bound, and never come
        back.
        """
        if self.config.learn_temperature:
            low, high = map(math.log, TEMPERATURES)
            self.log_temperature.clamp_(low, high)

    def forward(self, batch: PairFeatures, progress: float = 1.0) -> ObjectiveOutput:
        """Sum the instance and the task level over a batch.

        The queues are not touched; call `enqueue` after the step's backward pass. `progress` is the share of the
        training that is done, in [0, 1].
        """
        scalars: dict[str, Tensor] = {}
        loss = (batch.image.sum() + batch.text.sum()) * 0  # with both levels off, something to differentiate
        if self.compares:
            contrastive, alignment = self.config.contrastive, self.config.task_alignment
            temperature = self.temperature
            tasks = retrieval_tasks(batch, self.queue, temperature, contrastive.in_batch)
            kept: Tensor | None = None  # (W*B,) bool of the global batch
            if self.filter.enabled:
                judgement = self.filter.judge(batch.by_momentum.image, batch.by_momentum.text, progress)
                kept = judgement.kept
                scalars |= judgement.scalars
            if contrastive.weight:
                losses = _mean([contrastive_losses(task, contrastive.label_smoothing) for task in tasks])
                mean = _mean_of_kept(losses, batch, kept)
                loss = loss + contrastive.weight * mean
                scalars["loss_contrastive"] = mean.detach()
            if alignment.weight:
                losses = self._alignment(batch, tasks)
                mean = _mean_of_kept(losses, batch, kept)
                loss = loss + alignment.weight * mean
                scalars["loss_alignment"] = mean.detach()
                scalars["direction_agreement"] = _mean([agreement(task) for task in tasks])
            scalars |= {
                "temperature": temperature.detach(),
                "positive_similarity": _mean([task.positive for task in tasks]),
                "negative_similarity": _mean([task.negative for task in tasks]),
            }
            if self.queue.size:
                scalars["queue_fill"] = self.queue.fill.float() / self.queue.size
        return ObjectiveOutput(loss, scalars)

    def _alignment(self, batch: PairFeatures, tasks: list[RetrievalTasks]) -> Tensor:
        """The task level's loss of every pair (B,)."""
        config = self.config.task_alignment
        if config.target == "online":
            return _mean([alignment_losses(task, config.gradient) for task in tasks])
        targets = momentum_tasks(batch, self.queue, self.temperature, self.config.contrastive.in_batch)
        return _mean([momentum_alignment_losses(*pair) for pair in zip(tasks, targets, strict=True)])

    def enqueue(self, batch: PairFeatures) -> None:
        """Make this global batch the newest rows of the queues, on every rank alike."""
        if batch.momentum is None:
            return
        self.queue.enqueue(batch.momentum.image, batch.momentum.text, batch.all_item_ids)
        if self.filter.enabled:
            self.filter.enqueue(batch.momentum.image, batch.momentum.text)


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(dim=0)


def _mean_of_kept(losses: Tensor, batch: PairFeatures, kept: Tensor | None) -> Tensor:
    """This rank's part of the mean over the kept pairs of the global batch, so scaled that the ranks' mean is it."""
    if kept is None:
        return losses.mean()
    ranks = len(kept) // len(losses)
    return (losses * kept[batch.own_rows]).sum() * ranks / kept.sum().clamp_min(1)
