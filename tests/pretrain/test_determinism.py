"""What a deterministic run asks of torch. That GPUs then do it is asked in test_gpu_training.py."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cots.config import PretrainConfig
from cots.errors import ConfigError
from cots.tokenizer_config import VisualTokenizerTrainingConfig
from pretrain.determinism import deterministic_arithmetic
from pretrain.step import TrainingStep
from pretrain.tokenizer_check import check_tokenizer_training
from pretrain.tokenizer_training import TokenizerRun
from pretrain.trainer import pretrain
from pretrain.trial import try_out

MakeConfig = Callable[..., PretrainConfig]
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, "")  # so that it is put back
    monkeypatch.delenv(CUBLAS)


def _losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_torch_is_told_and_is_afterwards_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory: Any = torch.utils.deterministic
    try:
        with deterministic_arithmetic(True):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert not torch.backends.cudnn.benchmark
            assert not memory.fill_uninitialized_memory
            assert os.environ[CUBLAS] == ":4096:8"
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.benchmark
        assert memory.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_takes_the_same_steps_deterministically(
    make_config: MakeConfig, every_level: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU; asked for when a run goes on, too."""
    asked = _watch(TrainingStep, "take", monkeypatch)
    training = {"accumulation": 2, "checkpoint_steps": 4, "epochs": 1}
    plain = pretrain(make_config("plain", objective=every_level, training=training))
    assert asked == [False] * 6
    max(plain.glob("checkpoints/*.pt")).unlink()
    training |= {"deterministic": True}
    again = pretrain(make_config("again", objective=every_level, training=training))
    went_on = pretrain(make_config("plain", objective=every_level, training={**training, "resume": True}))
    assert asked[6:] == [True] * 8
    assert not torch.are_deterministic_algorithms_enabled()
    losses = _losses(plain)
    assert went_on == plain
    assert losses[:6] == _losses(again)
    assert losses[6:] == losses[4:6]


def _watch(kind: type, name: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether torch is deterministic, at each call of a method."""
    asked: list[bool] = []
    method = getattr(kind, name)

    def watched(*arguments: Any) -> Any:
        asked.append(torch.are_deterministic_algorithms_enabled())
        return method(*arguments)

    monkeypatch.setattr(kind, name, watched)
    return asked


def test_a_check_is_deterministic_too(
    make_config: MakeConfig, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _watch(TrainingStep, "losses", monkeypatch)
    try_out(make_config(training={"deterministic": True}))
    shape = {"codebook_size": 16, "code_dim": 4, "width": 8, "min_width": 8, "blocks": 1, "image_size": 16}
    config = VisualTokenizerTrainingConfig.model_validate(
        {
            "visual_tokenizer": shape,
            "data": {"train": [str(shards / "train-0.tar")], "workers": 0},
            "training": {"output": str(tmp_path), "batch_size": 8, "device": "cpu", "deterministic": True},
        }
    )
    asked_of_tokenizer = _watch(TokenizerRun, "take_step", monkeypatch)
    check_tokenizer_training(config)
    assert asked
    assert asked_of_tokenizer
    assert all(asked + asked_of_tokenizer)


@pytest.mark.parametrize("deterministic", [False, True])
def test_all_that_is_compiled_is_told(
    make_config: MakeConfig, every_level: dict, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    """With the compilation itself: the backward pass is compiled in another thread, whose settings are others."""
    told: list[dict | None] = []
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **options: told.append(options["options"]))

    def compile_nothing(function: Callable, **options: Any) -> Callable:
        told.append(options["options"])
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    training = {"compile": True, "epochs": 0.2, "deterministic": deterministic}
    pretrain(make_config(objective=every_level, training=training))
    assert len(told) == 9  # both towers and their pixels, twice; two heads; the visual tokenizer's encoder
    assert told == [{"deterministic": True} if deterministic else None] * 9


def test_what_has_no_deterministic_form_is_named(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(*_: object) -> dict[str, torch.Tensor]:
        return {"loss": torch.zeros(2).put_(torch.tensor([0]), torch.ones(1)).sum()}

    monkeypatch.setattr(TrainingStep, "take", take)
    sentence = r"true: put_ does not have a deterministic implementation on this device in torch [^ ]*; leave"
    with pytest.raises(ConfigError, match=sentence):
        pretrain(make_config(training={"deterministic": True}))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("said", "kind", "sentence"),
    [
        ("you must set CUBLAS_WORKSPACE_CONFIG=:4096:8", ConfigError, "needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the"),
        ("out of memory", RuntimeError, "^out of memory$"),
    ],
)
def test_other_errors(said: str, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence), deterministic_arithmetic(True):
        raise RuntimeError(said)
