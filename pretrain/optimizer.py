"""AdamW with parameter groups, and learning-rate schedules as pure functions of the step."""

import math

import torch
from torch import nn

from cots.config import OptimizerConfig
from cots.model.dual_encoder import DualEncoder


def create_optimizer(encoder: DualEncoder, objective: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Groups by peak rate, each split into decayed matrices, undecayed vectors and undecayed numbers.

    The peak rate of a tower's layer is the tower's rate times its layer decay once for every layer above it (Clark et
    al. 2020, ELECTRA); a tower of rate 0 is frozen. Biases, norms, embeddings of single tokens and the temperature are
    not decayed. Every group carries its peak rate as `peak`.

    Args:
        objective: whatever else learns.
    """
    tower_rates = _tower_rates(encoder, config)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in [*encoder.named_parameters(), *objective.named_parameters()]:
        if not parameter.requires_grad:
            continue
        peak = tower_rates.get(name, config.learning_rate)
        decay = config.weight_decay if sum(side > 1 for side in parameter.shape) >= 2 else 0.0
        # a number is never shared out among ranks, and a fused kernel takes only parts or only wholes
        groups.setdefault((peak, decay, parameter.ndim == 0), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay}
            for (peak, decay, _), parameters in groups.items()
        ],
        betas=config.betas,
        eps=config.epsilon,
        fused=all(parameter.is_cuda for parameters in groups.values() for parameter in parameters),
    )


def _tower_rates(encoder: DualEncoder, config: OptimizerConfig) -> dict[str, float]:
    """The peak rate of every parameter of the towers, by its name; a tower that is not to learn is frozen."""
    rates = {}
    for prefix, tower, rate, layer_decay in (
        ("image_tower", encoder.image_tower, config.image_tower_rate, config.image_layer_decay),
        ("text_tower", encoder.text_tower, config.text_tower_rate, config.text_layer_decay),
    ):
        if rate == 0:
            tower.freeze()
            continue
        top_rate = config.learning_rate if rate is None else rate
        depths = tower.layer_depths()
        top = max(depths.values())
        rates.update({f"{prefix}.{name}": top_rate * layer_decay ** (top - depth) for name, depth in depths.items()})
    return rates


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
