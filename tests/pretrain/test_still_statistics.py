"""Batch norms that learn gather the statistics of whole pictures, each seen once, whatever else a step encodes."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from cots.config import PretrainConfig
from pretrain.distributed import Ranks
from pretrain.trainer import Run

MakeConfig = Callable[..., PretrainConfig]


def _statistics(network: torch.nn.Module) -> list[torch.Tensor]:
    """Running means and variances."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    return [buffer.clone() for norm in norms for buffer in (norm.running_mean, norm.running_var)]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_they_are_of_each_part_once(make_config: MakeConfig, every_level: dict, recomputed: bool, parts: int) -> None:
    """Hidden patches, a first encoding of parts and layers that are computed again leave no trace in them."""
    model = make_config().model.model_dump()
    model["image_tower"] = {"name": "test_efficientnet", "image_size": 64, "pooling": "mean"}
    training = {"accumulation": parts, "activation_checkpointing": recomputed}
    run = Run(make_config(model=model, objective=every_level, training=training), Ranks(0, 1, torch.device("cpu")))
    run.telemetry.close()
    stepper, batch = run.stepper, next(run._batches())
    stepper.parallel.train()
    before = _statistics(stepper.network)
    assert before
    weights = {name: value.clone() for name, value in stepper.network.state_dict().items()}
    stepper.take(batch, 0, 10)
    taken = _statistics(stepper.network)
    stepper.network.load_state_dict(weights)
    with torch.no_grad():
        for pixels in batch.pixels.chunk(parts):
            stepper.network.encoder.encode_image(pixels)
    for one, expected, unseen in zip(taken, _statistics(stepper.network), before, strict=True):
        torch.testing.assert_close(one, expected)
        assert not torch.equal(one, unseen)
