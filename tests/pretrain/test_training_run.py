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
from PIL import Image

from cots.config import PretrainConfig
from cots.errors import TrainingError
from cots.tokenizer_config import VisualTokenizerTrainingConfig
from pretrain import training_run
from pretrain.tokenizer_training import train_visual_tokenizer
from pretrain.trainer import Run, pretrain

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
def test_sigterm_before_the_first_step_ends_with_0(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, moment: str
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def stop(*_: object) -> Iterator[None]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not heeded")

    monkeypatch.setattr(Run, "_open_sources" if moment == "building" else "_samples", stop)
    with pytest.raises(SystemExit) as ended:
        pretrain(make_config())
    assert ended.value.code == 0
    assert "Stopped before the first step; there was nothing to save." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_steps_are_traced_where_it_is_asked_for(make_config: MakeConfig, capsys: pytest.CaptureFixture) -> None:
    run = pretrain(make_config(training={"trace_step": 3, "epochs": 3}))
    with gzip.open(run / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = [event for event in events if event.get("name", "").startswith("Optimizer.step")]
    assert len(steps) == training_run.STEPS
    assert "trace.json.gz" in capsys.readouterr().err
    assert not (pretrain(make_config("plain")) / "trace.json.gz").exists()
