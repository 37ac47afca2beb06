"""The command in this process, as a shell would call it, and media to call it on."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from cots.cli import main
from cots.model.retrieval_model import RetrievalModel
from index.build import build

COLOURS = ("red", "green", "blue", "yellow", "black", "white")


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """All of stdout as one JSON document."""
        return json.loads(self.out)


@pytest.fixture
def cots(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `cots ARGUMENTS...` through its entry point."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["cots", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Outcome(int(end.value.code or 0), captured.out, captured.err)

    return run


def write_clip(path: Path, seconds: int, seed: int = 0) -> Path:
    """H.264, two frames a second, noise in large blocks."""
    random = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = Fraction(1, 2)
        for _ in range(2 * seconds):
            pixels = random.integers(0, 256, (3, 4, 3), dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures and a clip of nine seconds, a table of all of them, one of the pictures, and a shard of two more."""
    folder = tmp_path_factory.mktemp("media")
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (60, 40), colour).save(folder / f"{colour}.png")
        rows.append({"image": f"{colour}.png", "captions": [f"a {colour} square", f"{colour}"], "source": "paints"})
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_clip(folder / "clip.mp4", 9)
    rows.append({"video": "clip.mp4", "captions": ["many squares"], "source": "clips"})
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for colour in ("orange", "purple"):
            content = io.BytesIO()
            Image.new("RGB", (50, 50), colour).save(content, "PNG")
            for name, part in ((f"{colour}.png", content.getvalue()), (f"{colour}.txt", b"a painted square")):
                member = tarfile.TarInfo(name)
                member.size = len(part)
                shard.addfile(member, io.BytesIO(part))
    return folder


@pytest.fixture(scope="session")
def gallery(media: Path, tiny_model: RetrievalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures and the clip of `items.jsonl`; not to be written to."""
    directory = tmp_path_factory.mktemp("gallery")
    build([media / "items.jsonl"], directory, tiny_model)
    return directory


@pytest.fixture
def other_model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with other weights."""
    from cots.model.model_directory import read_model, save_model

    encoder, tokenizer, _ = read_model(tiny_model_dir)
    encoder.image_projection.linear.bias.data += 1
    save_model(tmp_path / "other_model", encoder, tokenizer)
    return tmp_path / "other_model"
