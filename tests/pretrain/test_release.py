import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from cots.config import PretrainConfig
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
    sources = [open_source(source) for source in config.data.train]
    for before, after in zip(centers(trained, sources), centers(released, sources), strict=True):
        assert torch.linalg.vector_norm(after) < torch.linalg.vector_norm(before)


def test_what_cannot_be_released_is_told_in_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pretrain.release", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--validation", "val.tar"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: The configuration")
    assert done.stderr.count("\n") == 1
