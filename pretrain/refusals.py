"""Settings that no training can do with, alone or together, told before anything is built or read."""

import math
from collections.abc import Iterator
from typing import Any

from cots.config import DataConfig, OptimizerConfig, PretrainConfig, TrainingConfig
from cots.errors import ConfigError


def refuse_settings(config: PretrainConfig) -> None:
    """Raises ConfigError if a training of the two towers would fail, or learn nothing, by its settings alone."""
    refuse_shared_settings(config.data, config.optimizer, config.training)
    _refuse_infinite(config.model_dump())
    std = config.model.image_tower.std
    if min(std) <= 0:
        raise ConfigError(f"model.image_tower.std {list(std)} is divided by; give numbers above 0.")
    objective = config.objective
    alone = objective.contrastive.in_batch == "none" and not objective.contrastive.queue_size
    if objective.task_alignment.weight and alone:
        raise ConfigError(
            "objective.task_alignment has but one candidate for each pair and nothing to align; set "
            "objective.contrastive.in_batch=online or a queue_size."
        )
    if objective.learn_temperature and not 0.01 <= objective.temperature <= 0.5:
        raise ConfigError(
            f"objective.temperature {objective.temperature:g} lies outside of [0.01, 0.5], in which a learned one is "
            "kept; start it within."
        )


def refuse_shared_settings(data: DataConfig, optimizer: OptimizerConfig, training: TrainingConfig) -> None:
    """Raises ConfigError for what is wrong in the sections of every training."""
    _refuse_infinite(
        {"data": data.model_dump(), "optimizer": optimizer.model_dump(), "training": training.model_dump()}
    )
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ConfigError(f"optimizer.betas {list(optimizer.betas)} are decays; give numbers from 0 to below 1.")
    if not 0 <= training.seed < 2**63:
        raise ConfigError(f"training.seed {training.seed} is no seed; give a whole number from 0 to below 2**63.")
    low, high = data.augmentation.crop_scale
    if not 0 < low <= high <= 1:
        raise ConfigError(
            f"data.augmentation.crop_scale {[low, high]} is no range of shares; give two numbers above 0 and up to "
            "1, the smaller first."
        )
    low, high = data.augmentation.crop_ratio
    if not 0 < low <= high:
        raise ConfigError(
            f"data.augmentation.crop_ratio {[low, high]} is no range of aspects; give two numbers above 0, the smaller "
            "first."
        )


def _refuse_infinite(settings: dict[str, Any]) -> None:
    for name, value in _numbers(settings):
        if not math.isfinite(value):
            raise ConfigError(f"{name} is {value}; give a finite number.")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers below nested settings, with their dotted names."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _numbers(below, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _numbers(below, name)
    elif isinstance(value, float):
        yield name, value
