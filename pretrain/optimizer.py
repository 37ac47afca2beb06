"""AdamW with parameter groups, and learning-rate schedules as pure functions of the step."""

import math

import torch
from torch import nn

from cots.config import OptimizerConfig


def create_optimizer(encoder: nn.Module, objective: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Groups of image tower, text tower and the rest, each split into decayed matrices and undecayed vectors.

    Every group carries its peak rate as `peak`; what has a peak rate of 0 is frozen. Biases, norms, embeddings of
    single tokens and the temperature are not decayed.
    """
    rates = {"image_tower": config.image_tower_rate, "text_tower": config.text_tower_rate}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in [*encoder.named_parameters(), *objective.named_parameters()]:
        if not parameter.requires_grad:
            continue
        given = rates.get(name.partition(".")[0])
        peak = config.learning_rate if given is None else given
        if peak == 0:
            parameter.requires_grad_(False)
            continue
        decay = config.weight_decay if parameter.squeeze().ndim >= 2 else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay}
            for (peak, decay), parameters in groups.items()
        ],
        betas=config.betas,
        fused=all(parameter.is_cuda for parameters in groups.values() for parameter in parameters),
    )


def rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """The share of the peak rate at which step `step` of `steps` is taken."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return config.final_rate + (1 - config.final_rate) * (1 + math.cos(math.pi * progress)) / 2
    cooldown = max(1, round(config.cooldown * steps))
    return config.final_rate + (1 - config.final_rate) * min(1.0, (steps - step) / cooldown)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give each group `factor` times its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
