"""Batch norms that learn gather the statistics of whole pictures, once a step, whatever else a step encodes."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from cots.config import PretrainConfig
from pretrain.distributed import Ranks
from pretrain.trainer import Run

MakeConfig = Callable[..., PretrainConfig]


def _statistics(config: PretrainConfig) -> list[torch.Tensor]:
    """Running means, variances and counts after one step of the whole batch."""
    run = Run(config, Ranks(0, 1, torch.device("cpu")))
    run.stepper.parallel.train()
    run.stepper.take(next(run._batches()), 0, 10)
    run.telemetry.close()
    norms = [module for module in run.stepper.network.modules() if isinstance(module, _BatchNorm)]
    assert norms
    return [buffer.clone() for norm in norms for buffer in norm.buffers()]


@pytest.fixture
def make_convolutional(make_config: MakeConfig) -> MakeConfig:
    model = make_config().model.model_dump()
    model["image_tower"] = {"name": "test_efficientnet", "image_size": 64, "pooling": "mean"}
    return lambda name, **sections: make_config(name, model=model, **sections)


def test_hidden_patches_leave_no_trace_in_them(make_convolutional: MakeConfig, every_level: dict) -> None:
    plain = _statistics(make_convolutional("plain", objective={**every_level, "masked_modeling": {}}))
    masked = _statistics(make_convolutional("masked", objective=every_level))
    for one, other in zip(plain, masked, strict=True):
        torch.testing.assert_close(other, one)


def test_a_part_that_is_encoded_twice_counts_once(make_convolutional: MakeConfig) -> None:
    statistics = _statistics(make_convolutional("parts", training={"accumulation": 2}))
    assert {int(count) for count in statistics if not count.is_floating_point()} == {2}
