import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cots.config import PretrainConfig
from cots.errors import CotsError
from cots.model.pretrained import load_model
from pretrain.pair_sources import open_source
from pretrain.release import centers, release
from pretrain.trainer import pretrain

ROOT = Path(__file__).parents[2]


def test_a_released_model_is_small_centred_and_has_a_measured_card(
    make_config: Callable[..., PretrainConfig], shards: Path, tmp_path: Path
) -> None:
    config = make_config(training={"epochs": 1})
    run, out = pretrain(config), tmp_path / "released"
    fingerprint = release(run, out, [str(shards / "val-0.tar")], "What it is for.")
    trained, released = load_model(str(run)), load_model(str(out))
    assert released.fingerprint == fingerprint
    weights = [directory / "model.safetensors" for directory in (out, run / "best")]
    assert weights[0].stat().st_size < 0.5 * weights[1].stat().st_size
    card = (out / "MODEL_CARD.md").read_text()
    assert "| text to image |" in card
    assert "What it is for." in card
    assert "shifted by 1 times the training pairs' means" in card
    sources = [open_source(source) for source in config.data.train]
    for before, after in zip(centers(trained, sources), centers(released, sources), strict=True):
        assert torch.linalg.vector_norm(after) < torch.linalg.vector_norm(before)


def test_what_cannot_be_released_is_told_in_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pretrain.release", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--validation", "val.tar"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "holds no model (no config.json, no best/)" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def run(make_config: Callable[..., PretrainConfig]) -> Path:
    return pretrain(make_config(training={"epochs": 1}))


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_release_that_fails_leaves_the_model_that_was_there(run: Path, shards: Path, tmp_path: Path) -> None:
    out, damaged = tmp_path / "released", tmp_path / "damaged.jsonl"
    release(run, out, [str(shards / "val-0.tar")], "Good.")
    (tmp_path / "picture.png").write_bytes(b"none")
    damaged.write_text('{"image": "picture.png", "captions": ["a red ball"]}\n')
    before, beside = _contents(out), sorted(tmp_path.iterdir())
    for validation in (tmp_path / "nonesuch.jsonl", damaged):
        with pytest.raises(CotsError):
            release(run, out, [str(validation)])
        assert _contents(out) == before
        assert sorted(tmp_path.iterdir()) == beside


def test_an_older_release_is_replaced(run: Path, shards: Path, tmp_path: Path) -> None:
    out, validation = tmp_path / "models" / "best", [str(shards / "val-0.tar")]
    before = release(run, out, validation, "The older.", centering=0.0)
    beside = list(out.parent.iterdir())
    after = release(run, out, validation, "The newer.", centering=0.5)
    assert load_model(str(out)).fingerprint == after != before
    card = (out / "MODEL_CARD.md").read_text()
    assert "The newer." in card
    assert "The older." not in card
    assert "shifted by 0.5 times" in card
    assert list(out.parent.iterdir()) == beside


def test_only_a_released_model_is_replaced(run: Path, shards: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    model, validation = load_model(str(run)).fingerprint, [str(shards / "val-0.tar")]
    for out, reason in ((run, "holds a run"), (run / "best", "a run's own model"), (notes, "holds mine.txt")):
        with pytest.raises(CotsError, match=reason):
            release(run, out, validation)
    assert load_model(str(run)).fingerprint == model
    assert [path.name for path in notes.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("centering", [-0.1, 1.5, float("nan")])
def test_a_centering_that_is_no_share_is_refused(run: Path, shards: Path, tmp_path: Path, centering: float) -> None:
    with pytest.raises(CotsError, match="between 0 and 1"):
        release(run, tmp_path / "released", [str(shards / "val-0.tar")], centering=centering)
    assert not (tmp_path / "released").exists()


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_notes_that_cannot_be_read_are_told_in_a_sentence(tmp_path: Path, content: bytes | None) -> None:
    notes = tmp_path / "notes.md"
    if content:
        notes.write_bytes(content)
    command = [sys.executable, "-m", "pretrain.release", str(tmp_path), "--out", str(tmp_path / "out")]
    command += ["--validation", "val.tar", "--notes", str(notes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: The notes {notes}")
    assert done.stderr.count("\n") == 1
