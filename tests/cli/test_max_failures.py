"""Files that cannot be read: how many there were, and that too many of them stop a command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

Cots = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixteen pictures and four files that are none: two are no media at all, two break off. These come last."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(16):
        Image.effect_noise((64, 64), 10 + 5 * number).save(folder / f"{number:02}.png")
    for name in ("y1.jpg", "y2.jpg"):
        (folder / name).write_text("no picture")
    for name in ("z1.png", "z2.png"):
        (folder / name).write_bytes((folder / "00.png").read_bytes()[:200])
    return folder


def test_embed_ends_with_how_many_files_were_left_out(
    cots: Cots, folder: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    arguments = ("embed", folder, "--out", tmp_path / "v.parquet", "--model", tiny_model_dir)
    outcome = cots(*arguments)
    assert outcome.code == 0
    assert outcome.out.endswith("v.parquet; 4 files could not be read.\n")
    assert len(pq.read_table(tmp_path / "v.parquet")) == 16
    assert cots(*arguments, "--max-failures", 0.2).code == 0
    for name in ("y1.jpg", "y2.jpg", "z1.png"):
        (folder / name).unlink()
    assert cots(*arguments).out.endswith("; 1 file could not be read.\n")
    (folder / "z2.png").unlink()
    assert cots(*arguments).out.endswith("v.parquet.\n")


def test_too_many_unreadable_files_leave_no_vectors(
    cots: Cots, folder: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    arguments = ("embed", folder, "--out", tmp_path / "v.parquet", "--model", tiny_model_dir, "--max-failures", 0.15)
    outcome = cots(*arguments)
    assert (outcome.code, outcome.out) == (1, "")
    assert "Error: 4 of 20 files could not be read, more than the allowed share of 0.15 (the last one: " in outcome.err
    assert "v.parquet is not written: mend the files, or allow more (--max-failures)." in outcome.err
    assert not list(tmp_path.glob("*.parquet*"))


@pytest.mark.parametrize("workers", [(), ("--workers", 1)])
def test_a_build_that_too_many_unreadable_files_stop_keeps_what_it_has(
    cots: Cots, folder: Path, tiny_model_dir: Path, tmp_path: Path, workers: tuple
) -> None:
    gallery = ("--gallery", tmp_path / "g")
    arguments = ("index", "build", folder, *gallery, "--model", tiny_model_dir, "--batch-size", 1, *workers)
    stopped = cots(*arguments, "--max-failures", 0.15)
    assert (stopped.code, stopped.out) == (1, "")
    assert "Error: 4 of 20 files could not be read, more than the allowed share of 0.15 (the last one: " in stopped.err
    assert "the next build goes on from there: mend the files, or allow more (--max-failures)." in stopped.err
    kept = cots("index", "info", *gallery, "--json").document["items"]
    assert 0 < kept <= 16
    assert cots("index", "check", *gallery).code == 0
    more = cots(*arguments, "--max-failures", 0.2)
    assert more.code == 0
    assert f"{kept} unchanged, 4 unreadable" in more.out
    assert "it holds 16 items" in more.out
    again = cots(*arguments, "--max-failures", 0.2)  # a share of all files, though only the bad ones are read again
    assert (again.code, "16 unchanged, 4 unreadable" in again.out) == (0, True)
    assert cots(*arguments, "--max-failures", 0.09).code == 1


def test_a_share_is_no_percentage(cots: Cots, folder: Path, tmp_path: Path) -> None:
    outcome = cots("index", "build", folder, "--gallery", tmp_path / "g", "--max-failures", 15)
    assert (outcome.code, "'--max-failures'" in outcome.err) == (2, True)
