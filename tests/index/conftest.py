"""A folder of pictures and animations, a gallery of it, and one whose table lies in an object store."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from gallery_media import write_animation, write_picture

from cots.cli import main
from cots.model.retrieval_model import RetrievalModel
from index import writer
from index.build import build
from index.gallery import Gallery, open_gallery

if TYPE_CHECKING:
    from object_store import ObjectStore

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


@pytest.fixture(scope="session")
def server() -> "Iterator[ObjectStore]":
    from object_store import ObjectStore  # not where no test needs it

    server = ObjectStore()
    yield server
    server.stop()


@pytest.fixture
def store(server: "ObjectStore", monkeypatch: pytest.MonkeyPatch) -> "ObjectStore":
    """An object store of one empty bucket that LanceDB finds by the environment."""
    server.reset()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(writer, "WAITS", (0.01, 0.02))
    return server


@pytest.fixture
def remote(store: "ObjectStore", photos: Path, tmp_path: Path, tiny_model: RetrievalModel) -> Gallery:
    """The gallery of `photos`, with its table in the store."""
    build([photos], tmp_path / "remote", tiny_model, table="s3://pictures/galleries/one")
    return open_gallery(tmp_path / "remote")


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
