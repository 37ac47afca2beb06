"""The engine: every fast or thrifty way of taking a step against the plain one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from killed import first_steps, kill_at

from cots.config import PretrainConfig
from cots.errors import ConfigError, TrainingError
from cots.model.pretrained import load_model
from cots.objectives.retrieval import MomentumFeatures, PairFeatures
from pretrain.distributed import Ranks
from pretrain.loader import Batch
from pretrain.step_cost import StepCost, step_flops
from pretrain.trainer import Run, pretrain

MakeConfig = Callable[..., PretrainConfig]
ROOT = Path(__file__).parents[2]
ALONE = Ranks(0, 1, torch.device("cpu"))


def _rows(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def _losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in _rows(run)}


def _with_dropout(config: PretrainConfig) -> dict:
    model = config.model.model_dump()
    model["text_tower"]["dropout"] = 0.1
    return model


def test_every_level_is_trained_and_logged_by_name(make_config: MakeConfig, every_level: dict) -> None:
    run = pretrain(make_config(objective=every_level, data={"captions_per_item": 2}, training={"epochs": 4}))
    rows = _rows(run)
    names = {"contrastive", "alignment", "masked_image", "masked_text"}
    assert {f"loss_{name}" for name in names} | {"queue_fill", "filter_kept", "gradient_norm"} <= rows[-1].keys()
    for name in ("masked_image", "masked_text"):
        losses = [row[f"loss_{name}"] for row in rows]
        assert sum(losses[-5:]) < sum(losses[:5])
    total = sum(
        weight * rows[-1][f"loss_{name}"]
        for name, weight in (("contrastive", 1), ("alignment", 0.3), ("masked_image", 0.5), ("masked_text", 0.5))
    )
    assert rows[-1]["loss"] == pytest.approx(total, rel=1e-4)
    assert load_model(str(run)).encode_texts(["a red ball"]).shape == (1, 32)  # the heads stay behind


def test_towers_that_no_level_looks_at_are_not_kept(make_config: MakeConfig) -> None:
    """By in-batch negatives alone there is no momentum encoder, in memory, in a step or in a checkpoint."""
    contrastive = {"queue_size": 0, "in_batch": "online"}
    run = Run(make_config(objective={"contrastive": contrastive}, training={"epochs": 1}), ALONE)
    assert run.stepper.momentum is None
    assert run.stepper.losses(next(run._batches()), 0.5).features.momentum is None
    run.train()
    run.telemetry.close()
    checkpoint = torch.load(max(run.directory.glob("checkpoints/*.pt")))
    assert checkpoint["momentum"] is None
    again = Run(make_config(objective={"contrastive": contrastive}, training={"epochs": 1, "resume": True}), ALONE)
    again.telemetry.close()
    assert again.step == run.step


def test_a_level_of_weight_0_is_neither_computed_nor_logged(make_config: MakeConfig, every_level: dict) -> None:
    every_level["masked_modeling"] = {"image_weight": 0, "text_weight": 0.5, "visual_tokenizer": "nowhere"}
    every_level["contrastive"]["weight"] = 0
    row = _rows(pretrain(make_config(objective=every_level, training={"epochs": 0.2})))[-1]
    assert {name for name in row if name.startswith("loss")} == {"loss", "loss_alignment", "loss_masked_text"}


@pytest.mark.parametrize("in_batch", ["online", "none"])
def test_accumulation_keeps_the_negatives_and_the_gradient(
    make_config: MakeConfig, every_level: dict, in_batch: str
) -> None:
    """In four parts, with all levels, every weight gets the gradient that it gets in one."""
    every_level["contrastive"]["in_batch"] = in_batch
    gradients: list[dict[str, torch.Tensor]] = []
    losses = []
    for parts in (1, 4):
        config = make_config(f"parts{parts}", objective=every_level, training={"accumulation": parts})
        config = config.model_copy(update={"data": config.data.model_copy(update={"captions_per_item": 2})})
        run = Run(config, ALONE)
        run.stepper.objective.enqueue(_pairs_of_others(run))

        def keep(*_: object, run: Run = run) -> None:
            named = [*run.stepper.network.named_parameters(), *run.stepper.objective.named_parameters()]
            gradients.append({name: value.grad.clone() for name, value in named if value.grad is not None})

        run.stepper.optimizer.register_step_pre_hook(keep)
        losses.append(run.stepper.take(next(run._batches()), 5, 10)["loss"].item())
        run.telemetry.close()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, four = gradients
    assert one.keys() == four.keys()
    for name in one:
        torch.testing.assert_close(four[name], one[name], rtol=1e-3, atol=1e-6)


def _pairs_of_others(run: Run) -> PairFeatures:
    torch.manual_seed(3)
    unit = torch.nn.functional.normalize(torch.randn(2, 20, 32), dim=2)
    ids = torch.arange(1000, 1020)
    return PairFeatures(unit[0], unit[1], ids, ids, MomentumFeatures(unit[0], unit[1]))


@pytest.mark.parametrize(("image_size", "crop"), [(65, None), (100, 70), (96, 64)])
def test_hidden_patches_are_those_of_the_tower(
    make_config: MakeConfig, every_level: dict, image_size: int, crop: int | None
) -> None:
    """A convolutional network rounds its map up: 65 px, 32 to a token, are three tokens a side."""
    model = make_config().model.model_dump()
    model["image_tower"] = {"name": "test_efficientnet", "image_size": image_size, "pooling": "mean"}
    run = Run(make_config(model=model, objective=every_level, data={"image_size": crop}), ALONE)
    batch = next(run._batches())
    patches = run.stepper.hide(batch).patches
    tokens = run.stepper.network.encoder.encode_image(batch.pixels).tokens
    run.telemetry.close()
    assert patches is not None
    assert patches.grid**2 == tokens.shape[1]


def test_both_encodings_of_a_part_draw_the_same_dropout(make_config: MakeConfig) -> None:
    """The embeddings that gave the gradient are those that it is applied to."""
    run = Run(make_config(model=_with_dropout(make_config()), training={"accumulation": 2}), ALONE)
    seen: list[torch.Tensor] = []
    network = run.stepper.working.network
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.text.detach()))
    network.train()
    run.stepper.take(next(run._batches()), 0, 10)
    run.telemetry.close()
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_a_step_leaves_a_learned_temperature_within_its_bounds(make_config: MakeConfig) -> None:
    run = Run(make_config(objective={"learn_temperature": True}), ALONE)
    run.stepper.objective.log_temperature.data.fill_(5.0)
    run.stepper.take(next(run._batches()), 0, 10)
    run.telemetry.close()
    assert run.stepper.objective.temperature.item() == pytest.approx(0.5)


def test_activation_checkpointing_changes_nothing(make_config: MakeConfig, every_level: dict) -> None:
    common = {"model": _with_dropout(make_config()), "objective": every_level}
    plain = pretrain(make_config("plain", **common))
    thrifty = pretrain(make_config("thrifty", **common, training={"activation_checkpointing": True}))
    assert _losses(thrifty) == pytest.approx(_losses(plain), rel=1e-5)


def test_bf16_copies_follow_fp32_weights(make_config: MakeConfig, every_level: dict) -> None:
    common = {"objective": every_level, "optimizer": {"learning_rate": 1e-4}}
    exact = pretrain(make_config("fp32", **common))
    config = make_config("bf16", **common, training={"precision": "bf16"})
    rounded = Run(config, ALONE)
    rounded.train()
    rounded.telemetry.close()
    assert _losses(rounded.directory) == pytest.approx(_losses(exact), rel=0.03)
    stepper = rounded.stepper
    for original, copy in zip(stepper.network.parameters(), stepper.working.network.parameters()):
        assert original.dtype == torch.float32
        torch.testing.assert_close(copy.float(), original, rtol=2**-8, atol=1e-6)
    assert next(stepper.working.network.encoder.image_tower.parameters()).dtype == torch.bfloat16


def test_pixels_kept_in_memory_train_as_well(make_config: MakeConfig, every_level: dict) -> None:
    data = {"cache_side": 72, "captions_per_item": 2}
    run = pretrain(
        make_config(
            objective={"contrastive": {"queue_size": 0, "in_batch": "online"}},
            data=data,
            optimizer={"learning_rate": 5e-3},
            training={"epochs": 12, "batch_size": 16},
        )
    )
    losses = list(_losses(run).values())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(("cache_side", "log_every"), [(None, 1), (72, 5)])
def test_a_killed_run_with_every_level_goes_on_bit_identically(
    make_config: MakeConfig, every_level: dict, cache_side: int | None, log_every: int
) -> None:
    """Killed without warning between two checkpoints; queues, filter, averages, optimizer and randomness come back.

    So do rows of the log that are the mean of several steps: a row is never begun before a checkpoint and ended after.
    """
    common = {
        "model": _with_dropout(make_config()),
        "objective": every_level,
        "data": {"cache_side": cache_side},
        "training": {"averaging": 0.9, "checkpoint_steps": 2, "keep_checkpoints": 2, "log_every": log_every},
    }
    whole, parts = make_config("whole", **common), make_config("parts", **common)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    _run(whole, environment)
    # the checkpoint of step 2 is there when the row of step 4 is
    kill_at(4, Path(parts.training.output), _command(parts), delay=Random(log_every).uniform(0, 0.05))
    _run(parts, environment, "training.resume=true")
    begun = first_steps(Path(parts.training.output))
    assert begun[0] == 0 < begun[1] < 12
    assert _losses(Path(parts.training.output)) == _losses(Path(whole.training.output))
    last = max((Path(whole.training.output) / "checkpoints").glob("*.pt")).name
    states = [torch.load(Path(c.training.output) / "checkpoints" / last) for c in (whole, parts)]
    for part in ("network", "momentum", "average", "objective"):
        assert all(torch.equal(states[0][part][name], states[1][part][name]) for name in states[0][part])


@pytest.mark.parametrize(
    ("way", "workers"), [({"accumulation": 2}, 2), ({"activation_checkpointing": True}, 0)], ids=["parts", "recomputed"]
)
def test_a_bf16_run_goes_on_bit_identically_with_other_workers(
    make_config: MakeConfig, every_level: dict, way: dict, workers: int
) -> None:
    """All that is random is on: two kinds of dropout, every augmentation, captions, masks."""
    model = _with_dropout(make_config())
    model["image_tower"]["drop_path"] = 0.2
    model["projection"] = "mlp"
    every_level["task_alignment"]["target"] = "momentum"
    augmentation = {"color": 0.4, "grayscale": 0.2, "rand_augment": 2, "erase": 0.3, "drop_words": 0.2}
    data = {"captions_per_item": 2, "augmentation": augmentation}
    training = {"averaging": 0.9, "averaging_start": 0.3, "precision": "bf16", "epochs": 1, "checkpoint_steps": 3}

    def config(name: str, workers: int, resume: bool) -> PretrainConfig:
        sections = {"model": model, "objective": every_level, "data": {**data, "workers": workers}}
        return make_config(name, **sections, training={**training, **way, "resume": resume})

    whole = pretrain(config("whole", workers, False))
    parts = whole.with_name("parts")
    shutil.copytree(whole, parts)
    last = "step-00000006.pt"
    (parts / "checkpoints" / last).unlink()
    torch.manual_seed(99)
    pretrain(config("parts", 0, True))
    assert first_steps(parts) == [0, 3]
    states = [torch.load(run / "checkpoints" / last) for run in (whole, parts)]
    for part in ("network", "momentum", "average", "objective"):
        assert all(torch.equal(states[0][part][name], states[1][part][name]) for name in states[0][part]), part


def test_sigterm_saves_and_exits_0(make_config: MakeConfig) -> None:
    config = make_config(training={"epochs": 2000})
    process = subprocess.Popen(_command(config), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = Path(config.training.output) / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    last = max(_losses(Path(config.training.output)))
    assert (Path(config.training.output) / "checkpoints" / f"step-{last:08d}.pt").exists()


def test_sigterm_to_torchrun_saves_what_can_be_gone_on_from(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("two", training={"epochs": 2000})
    run, command = Path(config.training.output), _command(config)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said.txt").open("w") as said:
        process = subprocess.Popen([*launcher, *command[1:]], cwd=ROOT, env=environment, stderr=said)
    while not ((run / "log.jsonl").exists() and (run / "log.jsonl").read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    last = max(_losses(run))
    assert f"Stopped at step {last}; resume with training.resume=true" in (tmp_path / "said.txt").read_text()
    assert torch.load(run / "checkpoints" / f"step-{last:08d}.pt")["step"] == last


def test_when_one_rank_dies_the_others_end_with_a_sentence(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("two", training={"epochs": 5000})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = tmp_path / "said.txt"
    with said.open("wb") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*command, *_command(config)[1:]], cwd=ROOT, env=environment, stderr=file)
    log = Path(config.training.output) / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert "Error: Process 0 of the run lost touch with another one" in said.read_text()


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_items(make_config: MakeConfig) -> None:
    run = Run(make_config(training={"log_every": 2}), ALONE)
    with torch.no_grad():
        next(run.stepper.network.encoder.image_projection.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"no longer a number at step 2.*last-items-rank0\.jsonl"):
        run.train()
    run.telemetry.close()
    lines = [json.loads(line) for line in (run.directory / "last-items-rank0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all("train-" in name for name in lines[0]["items"])


def test_weights_that_are_no_numbers_are_not_saved(make_config: MakeConfig) -> None:
    """The loss of the step that breaks them is a number still; its gradient is none."""
    run = Run(make_config(training={"log_every": 100, "checkpoint_steps": 1}), ALONE)
    weight = next(run.stepper.network.encoder.image_projection.parameters())
    weight.register_hook(lambda gradient: gradient * (float("nan") if run.step == 2 else 1))
    with pytest.raises(TrainingError, match=r"The gradient is no longer a number at step 3"):
        run.train()
    run.telemetry.close()
    saved = sorted((run.directory / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step-00000001.pt", "step-00000002.pt"]
    weights = torch.load(saved[-1])["network"].values()
    assert all(bool(value.isfinite().all()) for value in weights if value.is_floating_point())


def test_settings_that_do_not_fit_are_refused(make_config: MakeConfig, every_level: dict) -> None:
    with pytest.raises(ConfigError, match="is not divisible by 3 accumulation parts"):
        pretrain(make_config(training={"accumulation": 3}))
    with pytest.raises(ValueError, match="without negatives there is nothing to learn"):
        make_config(objective={"contrastive": {"queue_size": 0}})
    with pytest.raises(ValueError, match="every loss has weight 0"):
        make_config(objective={"contrastive": {"weight": 0}})
    with pytest.raises(ConfigError, match=r"data\.image_size is 48, but vit_tiny_patch16_224 takes pictures of 64 px"):
        pretrain(make_config(data={"image_size": 48}))
    with pytest.raises(ConfigError, match=r"drop_words needs the captions' text"):
        pretrain(make_config(data={"cache_side": 64, "augmentation": {"drop_words": 0.1}}))


def test_a_run_counts_its_flops_without_learning(make_config: MakeConfig, every_level: dict) -> None:
    run = Run(make_config(objective=every_level), ALONE)
    before = {name: value.clone() for name, value in run.stepper.network.state_dict().items()}
    random = torch.get_rng_state()
    everything = step_flops(run.stepper, 8)
    run.telemetry.close()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in run.stepper.network.state_dict().items())
    assert all(parameter.grad is None for parameter in run.stepper.working.network.parameters())
    alone = Run(make_config("alone", objective={"contrastive": {"queue_size": 0, "in_batch": "online"}}), ALONE)
    contrastive = step_flops(alone.stepper, 8)
    alone.telemetry.close()
    # a second pass of both towers, and a forward pass of the momentum towers: 2 + 1/3 times the work, and the heads
    assert 2 < everything / contrastive < 3.5


def test_a_batch_of_pictures_and_clips_costs_what_each_of_them_does(make_config: MakeConfig) -> None:
    run = Run(make_config(data={"frames_per_item": 3}), ALONE)
    cost = StepCost(run.stepper, 4)
    run.telemetry.close()
    size = run.config.model.image_tower.image_size
    clips = torch.zeros(4, 3, 3, size, size, dtype=torch.uint8)

    def flops(pixels: torch.Tensor, counts: tuple[int, ...] | None) -> float:
        return cost.flops(Batch(pixels, torch.ones(4, 8, dtype=torch.int64), torch.arange(4), counts=counts))

    assert flops(clips[:, 0], None) == pytest.approx(step_flops(run.stepper, 4, 1))
    assert flops(clips, (1, 1, 1, 1)) == pytest.approx(step_flops(run.stepper, 4, 1))
    assert flops(clips, None) == pytest.approx(step_flops(run.stepper, 4, 3))
    assert flops(clips, (3, 1, 3, 1)) == pytest.approx((flops(clips, None) + flops(clips[:, 0], None)) / 2)


def _command(config: PretrainConfig) -> list[str]:
    path = Path(config.training.output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return [sys.executable, "-m", "pretrain", str(path)]


def _run(config: PretrainConfig, environment: dict[str, str], *overrides: str) -> None:
    subprocess.run([*_command(config), *overrides], cwd=ROOT, env=environment, check=True)
