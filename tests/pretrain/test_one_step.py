"""What a step does with rates, gradients, averages and the filter, against plain torch."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from cots.config import PretrainConfig
from cots.model.model_directory import read_model
from pretrain.distributed import Ranks
from pretrain.optimizer import rate_factor
from pretrain.step import TrainingStep
from pretrain.trainer import Run

MakeConfig = Callable[..., PretrainConfig]
ALONE = Ranks(0, 1, torch.device("cpu"))


@contextmanager
def _run(config: PretrainConfig) -> Iterator[Run]:
    """A training before its first step, its networks in training mode."""
    run = Run(config, ALONE)
    run.trained.train()
    yield run
    run.telemetry.close()


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_each_group_learns_at_its_share_of_its_peak(make_config: MakeConfig, schedule: str) -> None:
    rates = {"learning_rate": 1e-3, "text_tower_rate": 1e-4, "image_layer_decay": 0.5, "schedule": schedule}
    config = make_config(optimizer={**rates, "warmup": 0.2, "cooldown": 0.5})
    with _run(config) as run:
        batch, groups = next(run._batches()), run.stepper.optimizer.param_groups
        assert {1e-3, 1e-4, 5e-4} <= {group["peak"] for group in groups}
        factors = []
        for step in (0, 3, 8):
            run.stepper.take(batch, step, 10)
            factors.append(rate_factor(step, 10, config.optimizer))
            for group in groups:
                assert group["lr"] == pytest.approx(group["peak"] * factors[-1])
    assert len(set(factors)) == 3


@pytest.mark.parametrize("clip_norm", [0.5, 0.0])
def test_a_step_is_one_of_adamw_with_torchs_clipping(
    make_config: MakeConfig, every_level: dict, clip_norm: float
) -> None:
    """Three steps of different rates, with all levels on; a clip_norm of 0 clips nothing."""
    optimizer = {"learning_rate": 1e-3, "text_tower_rate": 5e-4, "betas": [0.8, 0.9], "weight_decay": 0.1}
    common = {"objective": every_level, "optimizer": {**optimizer, "clip_norm": clip_norm, "warmup": 0.2}}
    with _run(make_config("ours", **common)) as run, _run(make_config("plain", **common)) as twin:
        ours, plain = run.stepper, twin.stepper  # the second one computes losses, but learns by plain torch
        adamw = _plain_adamw(plain)
        for step, batch in zip(range(3), run._batches()):
            plain.draws.begin(step)
            losses = plain.losses(batch, step / 10)
            losses.total.backward()
            norm = nn.utils.clip_grad_norm_(plain.parameters, clip_norm or math.inf)
            assert norm > 2 * clip_norm
            for group in adamw.param_groups:
                group["lr"] = group["peak"] * rate_factor(step, 10, plain.config.optimizer)
            adamw.step()
            adamw.zero_grad()
            plain.momentum.update()
            plain.objective.enqueue(losses.features)
            assert ours.take(batch, step, 10)["gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
            for learned, expected in ((ours.network, plain.network), (ours.objective, plain.objective)):
                torch.testing.assert_close(_state(learned), _state(expected), rtol=1e-4, atol=1e-6)


def _plain_adamw(stepper: TrainingStep) -> torch.optim.AdamW:
    """An optimizer of the same groups, of which it is told peak and decay alone."""
    names = ("params", "peak", "weight_decay")
    groups = [{name: group[name] for name in names} for group in stepper.optimizer.param_groups]
    return torch.optim.AdamW(groups, betas=stepper.config.optimizer.betas)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_filter_begins_at_its_share_of_the_steps(
    make_config: MakeConfig, every_level: dict, accumulation: int
) -> None:
    """Half of the pairs are less alike than those of the queue; up to `start` they teach as well."""
    every_level["noise_filter"] = {"queue_size": 16, "start": 0.5}
    kept = []
    with _run(make_config(objective=every_level, training={"accumulation": accumulation})) as run:
        stepper, batch = run.stepper, next(run._batches())
        for step in (0, 4, 5, 9):
            seen = stepper.losses(batch, 0.0).features.by_momentum
            stepper.objective.filter.similarities.fill_((seen.image * seen.text).sum(dim=1).sort().values[3:5].mean())
            stepper.objective.filter.fill.fill_(16)
            kept.append(stepper.take(batch, step, 10)["filter_kept"].item())
    assert kept == [1, 1, 0.5, 0.5]


@pytest.mark.parametrize(("precision", "accumulation"), [("fp32", 1), ("bf16", 1), ("fp32", 2)])
def test_momentum_towers_see_without_dropout(make_config: MakeConfig, precision: str, accumulation: int) -> None:
    """What goes into the queue is what they make of the batch in evaluation mode, after a validation too."""
    model = make_config().model.model_dump()
    model["text_tower"]["dropout"] = model["image_tower"]["drop_path"] = 0.5
    training = {"precision": precision, "accumulation": accumulation}
    with _run(make_config(model=model, training=training)) as run:
        stepper, queue, batch = run.stepper, run.stepper.objective.queue, next(run._batches())
        for step in range(2):
            momentum = copy.deepcopy(stepper.momentum_working.network).eval()
            with torch.no_grad():
                image = momentum.encode_image(batch.pixels).embedding
                text = momentum.encode_text(batch.token_ids).embedding
            stepper.take(batch, step, 10)
            newest = slice(8 * step, 8 * (step + 1))
            torch.testing.assert_close(queue.image[newest], image)
            torch.testing.assert_close(queue.text[newest], text)
            with stepper.shipped_encoder():
                pass
        first, second = (stepper.losses(batch, 0.0).features for _ in range(2))
        assert torch.equal(first.by_momentum.text, second.by_momentum.text)
        assert torch.equal(first.by_momentum.image, second.by_momentum.image)
        assert not torch.allclose(first.text, second.text, atol=1e-2)  # of towers that learn, dropout is on
        assert not torch.allclose(first.image, second.image, atol=1e-2)


def test_averages_follow_the_weights_by_their_decays(make_config: MakeConfig) -> None:
    """The momentum towers from the first step on; the slow average is the weights until it begins."""
    training = {"averaging": 0.6, "averaging_start": 0.2}
    with _run(make_config(objective={"momentum": 0.8}, training=training)) as run:
        stepper, batch = run.stepper, next(run._batches())
        momentum = average = _state(stepper.network.encoder)
        for step in range(4):
            stepper.take(batch, step, 10)
            learned = _state(stepper.network.encoder)
            momentum = {name: 0.8 * momentum[name] + 0.2 * value for name, value in learned.items()}
            if step < 2:
                average = learned
            average = {name: 0.6 * average[name] + 0.4 * value for name, value in learned.items()}
            torch.testing.assert_close(_state(stepper.momentum.network), momentum, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(_state(stepper.average.network), average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("averaging", [0.8, 0.0])
def test_the_model_that_is_kept_is_the_slow_average(make_config: MakeConfig, averaging: float) -> None:
    """If there is one, and else the weights; in evaluation mode, while what learns goes on in training mode."""
    config = make_config(training={"averaging": averaging, "epochs": 1, "validate_every": 0})
    with _run(config) as run:
        run.train()
        with run.stepper.shipped_encoder() as encoder:
            shipped = _state(encoder)
            assert not any(module.training for module in encoder.modules())
        assert all(module.training for module in run.stepper.network.encoder.modules())
    checkpoint = torch.load(max(run.directory.glob("checkpoints/*.pt")))
    prefix = "encoder."
    learned = {
        name.removeprefix(prefix): value for name, value in checkpoint["network"].items() if name.startswith(prefix)
    }
    wanted = dict(checkpoint["average"]) if averaging else learned
    kept = _state(read_model(run.directory / "best")[0])
    for state in (shipped, kept):
        torch.testing.assert_close(state, wanted, rtol=0, atol=0)
    if averaging:
        name = "image_projection.linear.weight"
        assert not torch.equal(wanted[name], learned[name])
