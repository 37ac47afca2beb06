"""A folder of pictures and animations, and a gallery of it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gallery_media import write_animation, write_picture

from cots.cli import main
from cots.model.retrieval_model import RetrievalModel
from index.build import build
from index.gallery import Gallery, open_gallery

PICTURES, VIDEOS = 12, 3


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder `photos` of 12 pictures and, in its folder `clips`, 3 animations of 9 seconds."""
    folder = tmp_path / "photos"
    for seed in range(PICTURES):
        write_picture(folder / f"{seed:02}.png", seed)
    for seed in range(VIDEOS):
        write_animation(folder / "clips" / f"{seed}.gif", 100 + seed)
    return folder


@pytest.fixture
def gallery(photos: Path, tmp_path: Path, tiny_model: RetrievalModel) -> Gallery:
    build([photos], tmp_path / "gallery", tiny_model)
    return open_gallery(tmp_path / "gallery")


@pytest.fixture
def cots_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `cots ARGUMENTS...`, which must succeed, and gives what it prints."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["cots", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        assert not end.value.code, captured.err
        return captured.out

    return run
