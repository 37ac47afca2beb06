"""Weights shared out among two real processes, against the same training with a copy on each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from killed import assert_unfinished, first_steps

from cots.config import PretrainConfig
from cots.model.pretrained import load_model
from pretrain.trainer import pretrain

MakeConfig = Callable[..., PretrainConfig]
ROOT = Path(__file__).parents[2]
OBJECTIVE = {
    "momentum": 0.9,
    "learn_temperature": True,
    "contrastive": {"queue_size": 50, "in_batch": "online"},
    "task_alignment": {"weight": 0.3},
    "noise_filter": {"queue_size": 16, "start": 0.0},
}


def _command(config: PretrainConfig, *overrides: str) -> list[str]:
    path = Path(config.training.output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pretrain"]
    return [*launcher, str(path), *overrides]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _train(config: PretrainConfig, *overrides: str) -> str:
    """What the training wrote to stderr."""
    done = subprocess.run(
        _command(config, *overrides), cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def _rows(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_a_sharded_training_takes_the_steps_of_a_replicated_one(make_config: MakeConfig) -> None:
    common = {"objective": OBJECTIVE, "data": {"captions_per_item": 2}}
    training = {"averaging": 0.9, "epochs": 1}
    copies = make_config("copies", **common, training=training)
    parts = make_config("parts", **common, training={**training, "sharding": "sharded"})
    _train(copies)
    _train(parts)
    first, second = _rows(Path(copies.training.output)), _rows(Path(parts.training.output))
    assert len(first) == 6
    for name in ("loss", "loss_alignment", "filter_kept", "temperature", "gradient_norm"):
        assert [row[name] for row in second] == pytest.approx([row[name] for row in first], rel=1e-3, abs=1e-4)
    # what leaves the training is whole
    texts = ["a red ball on black", "a yellow boat"]
    one, two = (load_model(c.training.output, device="cpu").encode_texts(texts) for c in (copies, parts))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)
    last = "checkpoints/step-00000006.pt"
    states = [torch.load(Path(c.training.output) / last) for c in (copies, parts)]
    for part in ("network", "momentum", "average"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, value in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], value, rtol=1e-2, atol=1e-3)


def test_a_sharded_training_that_was_killed_goes_on_as_if_it_had_not_been(make_config: MakeConfig) -> None:
    training = {"sharding": "sharded", "averaging": 0.9, "checkpoint_steps": 2, "epochs": 2, "accumulation": 2}
    training["activation_checkpointing"] = True
    whole = make_config("whole", objective=OBJECTIVE, training=training)
    stopped = make_config("stopped", objective=OBJECTIVE, training=training)
    _train(whole)
    process = subprocess.Popen(_command(stopped), cwd=ROOT, env=_environment(), stderr=subprocess.DEVNULL)
    checkpoints = Path(stopped.training.output) / "checkpoints"
    while not list(checkpoints.glob("step-*.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    for pid in (process.pid, *map(int, ranks.split())):  # a launcher that is killed leaves its ranks behind
        os.kill(pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert_unfinished(Path(stopped.training.output))
    _train(stopped, "training.resume=true")
    assert first_steps(Path(stopped.training.output))[1] > 0
    steps = [{row["step"]: row["loss"] for row in _rows(Path(c.training.output))} for c in (whole, stopped)]
    assert steps[1] == pytest.approx(steps[0], rel=1e-5)


def test_another_number_of_processes_goes_on_from_a_checkpoint(
    make_config: MakeConfig, capsys: pytest.CaptureFixture
) -> None:
    """Of two processes that share out the weights by one, and of one by two, as if nothing had changed."""
    training = {"sharding": "sharded", "averaging": 0.9, "checkpoint_steps": 6, "keep_checkpoints": 9}

    def config(name: str, **more: object) -> PretrainConfig:
        return make_config(name, objective=OBJECTIVE, training={**training, **more})

    whole = pretrain(config("whole"))
    fewer, more = whole.with_name("fewer"), whole.with_name("more")
    _train(config("fewer"))
    shutil.copytree(whole, more)
    for run in (fewer, more):
        assert torch.load(run / "checkpoints" / "step-00000006.pt")["samples"] == [48, 0]
        (run / "checkpoints" / "step-00000012.pt").unlink()
    capsys.readouterr()
    pretrain(config("fewer", resume=True))
    assert "Resuming with 1 process instead of 2: the order of samples is" in capsys.readouterr().err
    assert "Resuming with 2 processes instead of 1: the order of samples is" in _train(config("more", resume=True))
    for run in (fewer, more):
        assert first_steps(run)[1] == 6
        later = _rows(run)[-6:]
        for name in ("loss", "loss_alignment", "filter_kept", "queue_fill", "temperature", "gradient_norm"):
            wanted = [row[name] for row in _rows(whole)[-6:]]
            assert [row[name] for row in later] == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_towers_with_batch_norms_are_not_sharded(make_config: MakeConfig) -> None:
    model = make_config().model.model_dump()
    model["image_tower"] |= {"name": "test_efficientnet", "pooling": "mean", "architecture": {}}
    config = make_config("norms", model=model, training={"sharding": "sharded"})
    done = subprocess.run(_command(config), cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "training.sharding=sharded is for towers without batch norms" in done.stderr
