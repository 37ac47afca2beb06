"""What a training step costs, in model FLOPs (see flops.py), counted without a kernel or a byte of the device."""

from typing import TYPE_CHECKING

import torch

from pretrain.flops import flops_per_pair
from pretrain.loader import Batch

if TYPE_CHECKING:
    from pretrain.step import TrainingStep

META = torch.device("meta")  # where tensors have a shape and nothing else


class StepCost:
    """FLOPs of a rank's steps.

    Args:
        stepper: takes them; it is left as it is.
        batch_size: items of a rank per step.

    Attributes:
        per_item: FLOPs of an item that is a picture, with all its captions.
        per_frame: of each further frame of a clip.
    """

    def __init__(self, stepper: "TrainingStep", batch_size: int) -> None:
        frames = stepper.config.data.frames_per_item
        self.per_item = step_flops(stepper, batch_size, 1) / batch_size
        self.per_frame = 0.0
        if frames > 1:
            clips = step_flops(stepper, batch_size, frames) / batch_size
            self.per_frame = (clips - self.per_item) / (frames - 1)

    def flops(self, batch: Batch) -> float:
        """Of one step. A batch of pictures and clips costs what each of them costs."""
        items = len(batch.pixels)
        frames = batch.pixels.shape[1] if batch.pixels.ndim == 5 else 1
        further = frames * items - items if batch.counts is None else sum(batch.counts) - items
        return items * self.per_item + further * self.per_frame


def step_flops(stepper: "TrainingStep", batch_size: int, frames: int = 1) -> float:
    """Model FLOPs of a step on `batch_size` items of `frames` frames each, without the optimizer's."""
    data, model = stepper.config.data, stepper.config.model
    size = stepper.config.crop_size
    twin = stepper.outlined()
    stored = stepper.config.objective.masked_modeling.stored_tokens

    def take(count: int) -> None:
        shape = (count, frames, 3, size, size) if frames > 1 else (count, 3, size, size)
        token_ids = torch.ones(count * data.captions_per_item, model.text_tower.max_length, dtype=torch.int64)
        named = torch.zeros(count, twin.grid**2, dtype=torch.int64) if stored else None
        batch = Batch(torch.zeros(shape, dtype=torch.uint8), token_ids, torch.arange(count), visual_tokens=named)
        twin.losses(batch.to(META), progress=1.0).total.backward()

    return batch_size * flops_per_pair(take, batch_size)
