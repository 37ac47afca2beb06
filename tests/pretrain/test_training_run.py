"""What both kinds of training share, where it can be seen without training for long."""

import gzip
import io
import json
import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from cots.config import PretrainConfig
from cots.errors import ConfigError, TrainingError
from cots.tokenizer_config import VisualTokenizerTrainingConfig
from pretrain.step_trace import FILE
from pretrain.tokenizer_training import train_visual_tokenizer
from pretrain.trainer import Run, pretrain
from pretrain.trial import try_out

MakeConfig = Callable[..., PretrainConfig]


def _shard(path: Path, items: int, bad: int) -> Path:
    """Pictures of one colour each, of which every so many-th is none."""
    with tarfile.open(path, "w") as tar:
        for number in range(items):
            content = io.BytesIO()
            Image.new("RGB", (16, 16), (number % 256, number // 256, 0)).save(content, "PNG")
            picture = b"no picture" if number % (items // bad) == 3 else content.getvalue()
            for name, content_of in ((f"{number:05}.png", picture), (f"{number:05}.txt", b"a red ball")):
                member = tarfile.TarInfo(name)
                member.size = len(content_of)
                tar.addfile(member, io.BytesIO(content_of))
    return path


def _tokenizer_config(shard: Path, output: Path) -> VisualTokenizerTrainingConfig:
    shape = {"codebook_size": 16, "code_dim": 4, "width": 8, "min_width": 8, "blocks": 1, "image_size": 16}
    return VisualTokenizerTrainingConfig.model_validate(
        {
            "visual_tokenizer": shape,
            "data": {"train": [str(shard)], "cache_side": 16, "workers": 0},
            "training": {"output": str(output), "epochs": 0.1, "batch_size": 64, "device": "cpu"},
        }
    )


@pytest.mark.parametrize("kind", ["model", "visual tokenizer"])
@pytest.mark.parametrize(("bad", "stops"), [(15, False), (25, True)])
def test_unreadable_items_of_a_cache_are_judged_among_all(
    make_config: MakeConfig, tmp_path: Path, kind: str, bad: int, stops: bool
) -> None:
    """Of 2,000 items one in a hundred may be unreadable, twenty; a step has but 64 of them."""
    shard = _shard(tmp_path / "pairs.tar", 2000, bad)

    def train() -> None:
        if kind == "model":
            data = {"train": [{"path": str(shard)}], "validation": [], "cache_side": 64}
            pretrain(make_config(data=data, training={"epochs": 0.1, "batch_size": 64}))
        else:
            train_visual_tokenizer(_tokenizer_config(shard, tmp_path / "tokenizer"))

    if not stops:
        train()
        return
    with pytest.raises(TrainingError, match=f"{bad} of 2000 samples could not be read, more than"):
        train()


@pytest.mark.parametrize("moment", ["building", "decoding"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_before_the_first_step_ends_at_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, moment: str, ranks: int
) -> None:
    """With 0; a rank of several with the code of a killed process, or torchrun would take it for one that is done."""
    before = signal.getsignal(signal.SIGTERM)

    def stop(*_: object) -> Iterator[None]:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not heeded")

    monkeypatch.setattr(Run, "_open_sources" if moment == "building" else "_samples", stop)
    with pytest.raises(SystemExit) as ended:
        pretrain(make_config())
    assert ended.value.code == (0 if ranks == 1 else 143)
    assert "Stopped before the first step; there was nothing to save." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("first", "traced"), [(2, 3), (6, 1), (7, 0)])
def test_steps_are_traced_where_it_is_asked_for(
    make_config: MakeConfig, capsys: pytest.CaptureFixture, first: int, traced: int
) -> None:
    """Of six steps; where the run ends before three are taken, there are fewer."""
    run = pretrain(make_config(training={"trace_step": first, "epochs": 1}))
    said = capsys.readouterr().err
    assert not torch._C._autograd._profiler_enabled()
    if not traced:
        assert "No step is traced: training.trace_step=7 is not among the steps to come." in said
        assert not (run / FILE).exists()
        return
    with gzip.open(run / FILE, "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step") for event in events) == traced
    assert f"A trace of {traced} step{'s' if traced > 1 else ''} is in {run / FILE}." in said


def test_a_check_traces_nothing(make_config: MakeConfig) -> None:
    try_out(make_config(training={"trace_step": 1}))
    assert not torch._C._autograd._profiler_enabled()


def test_a_checkpoint_of_an_earlier_version_is_refused(make_config: MakeConfig) -> None:
    run = pretrain(make_config(training={"epochs": 1, "checkpoint_steps": 3}))
    (checkpoint,) = run.glob("checkpoints/*3.pt")
    max(run.glob("checkpoints/*.pt")).unlink()
    state = torch.load(checkpoint)
    del state["format"]
    torch.save(state, checkpoint)
    with pytest.raises(ConfigError, match="is of an earlier version of COTS, whose steps to come had other samples"):
        pretrain(make_config(training={"epochs": 1, "checkpoint_steps": 3, "resume": True}))
