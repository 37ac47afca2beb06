"""What a training step costs, in model FLOPs (see flops.py), counted without a kernel or a byte of the device."""

import copy
from typing import TYPE_CHECKING

import torch

from cots.data.sample_draws import SampleDraws
from pretrain.flops import flops_per_pair
from pretrain.loader import Batch

if TYPE_CHECKING:
    from pretrain.step import TrainingStep


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
    size = data.image_size or model.image_tower.image_size
    meta = torch.device("meta")
    twin = copy.copy(stepper)
    twin.device, twin.draws = meta, SampleDraws(0, meta)
    twin.objective = copy.deepcopy(stepper.objective).to(meta)
    twin.visual_tokenizer = copy.deepcopy(stepper.visual_tokenizer)
    if twin.visual_tokenizer is not None:
        twin.visual_tokenizer.to(meta)
    network = copy.deepcopy(stepper.outline)
    for outlined, parameter in zip(network.parameters(), stepper.network.parameters()):
        outlined.requires_grad_(parameter.requires_grad)
    momentum = copy.deepcopy(network.encoder).eval()

    stored = stepper.config.objective.masked_modeling.stored_tokens

    def take(count: int) -> None:
        shape = (count, frames, 3, size, size) if frames > 1 else (count, 3, size, size)
        token_ids = torch.ones(count * data.captions_per_item, model.text_tower.max_length, dtype=torch.int64)
        batch = Batch(torch.zeros(shape, dtype=torch.uint8), token_ids, torch.arange(count)).to(meta)
        named = torch.zeros(count, twin.grid**2, dtype=torch.int64, device=meta) if stored else None
        patches, words = twin.hide(batch.pixels, batch.token_ids, named)
        output = network(batch.pixels, batch.token_ids, patches, words)
        loss = twin.objective(twin.pair_features(output, batch, momentum=momentum)).loss
        if output.masked_losses is not None:
            loss = loss + output.masked_losses.mean()
        loss.backward()

    return batch_size * flops_per_pair(take, batch_size)
