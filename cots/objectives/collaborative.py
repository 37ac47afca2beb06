"""The COTS objective: the weighted sum of its levels over one batch, and the state (temperature, queues) they share.

Masked modelling (token level), task alignment and the noise filter join here; a level whose weight is 0 must skip its
compute.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cots.config import ObjectiveConfig
from cots.objectives.contrastive import MomentumContrastive, PairFeatures
from cots.objectives.feature_queue import FeatureQueue


@dataclass
class ObjectiveOutput:
    """Attributes:
    loss: () float32, to be differentiated: the mean over this rank's pairs.
    scalars: detached () values for the log: each loss by name, temperature, similarities, queue fill.
    """

    loss: Tensor
    scalars: dict[str, Tensor]


class CollaborativeObjective(nn.Module):
    def __init__(self, config: ObjectiveConfig, dimension: int) -> None:
        super().__init__()
        self.config = config
        self.contrastive = MomentumContrastive(config.contrastive)
        self.queue = FeatureQueue(config.contrastive.queue_size, dimension)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(config.temperature)), requires_grad=config.learn_temperature
        )

    @property
    def uses_momentum(self) -> bool:
        """Whether any level looks at the momentum towers; if none does, they need not be computed."""
        return self.config.contrastive.in_batch != "online" or self.queue.size > 0

    @property
    def temperature(self) -> Tensor:
        """() float32, kept in [0.01, 0.5] when it is learned."""
        if not self.config.learn_temperature:
            return self.log_temperature.exp()
        return self.log_temperature.clamp(math.log(0.01), math.log(0.5)).exp()

    def forward(self, batch: PairFeatures) -> ObjectiveOutput:
        """Sum the levels over a batch. The queues are not touched; call `enqueue` after the step's backward pass."""
        temperature = self.temperature
        output = self.contrastive(batch, self.queue, temperature)
        contrastive = output.losses.mean()
        loss = self.config.contrastive.weight * contrastive
        scalars = {
            "loss": loss.detach(),
            "loss_contrastive": contrastive.detach(),
            "temperature": temperature.detach(),
            "positive_similarity": output.positive,
            "negative_similarity": output.negative,
            "queue_fill": self.queue.fill.float() / max(1, self.queue.size),
        }
        return ObjectiveOutput(loss, scalars)

    def enqueue(self, batch: PairFeatures) -> None:
        """Make this global batch the newest rows of the queues, on every rank alike."""
        self.queue.enqueue(batch.image_momentum, batch.text_momentum, batch.all_item_ids)
