"""A real gallery of a few pictures and clips, and the real application served over it."""

import io
import json
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import uvicorn
from PIL import Image

from cots.model.retrieval_model import RetrievalModel
from demo.app import build_app, listen
from demo.engine import Engine
from index.build import build

INJECTION = '<img src=x onerror="window.broken=1"> & \'quotes\' "too" <script>window.broken=1</script>'


def write_clip(path: Path, seconds: int) -> None:
    """An H.264 clip whose picture tells its second: brightness rises with time."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.time_base = Fraction(1, 8)
        for index in range(8 * seconds):
            level = 40 + 200 * index // (8 * seconds)
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    rows = []
    for colour in ("red", "green", "blue", "yellow", "black", "white"):
        Image.new("RGB", (90, 60), colour).save(folder / f"{colour}.png")
        rows.append({"path": f"{colour}.png", "captions": [f"a {colour} square"], "source": "paints", "licence": "CC0"})
    rows[0]["captions"] = [INJECTION]
    rows[0]["source"] = rows[0]["licence"] = INJECTION
    write_clip(folder / "rising.mp4", 9)
    rows.append({"path": "rising.mp4", "captions": ["it grows bright"], "source": "clips"})
    flicker = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    flicker[0].save(folder / "flicker.gif", save_all=True, append_images=flicker[1:], duration=500, loop=0)
    rows.append({"path": "flicker.gif", "captions": ["red and blue"], "source": "clips"})
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for colour in ("orange", "purple"):
            buffer = io.BytesIO()
            Image.new("RGB", (50, 70), colour).save(buffer, "PNG")
            for name, content in ((f"{colour}.png", buffer.getvalue()), (f"{colour}.txt", b"a painted square")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    (folder / "secret.txt").write_text("not for the page")
    Image.new("RGB", (30, 30), "pink").save(folder / "left_out.png")
    return folder


@pytest.fixture(scope="session")
def gallery(media_folder: Path, tiny_model: RetrievalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gallery")
    report = build([media_folder / "items.jsonl", media_folder / "shard.tar"], directory, tiny_model)
    assert report.items == 10
    return directory


@pytest.fixture(scope="session")
def engine(gallery: Path, tiny_model: RetrievalModel) -> Engine:
    return Engine(gallery, tiny_model)


@contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """The application on a free port, for clients that need a real server; gives its address."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build_app(engine), log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)
    listener.close()


@pytest.fixture(scope="session")
def address(engine: Engine) -> Iterator[str]:
    with serving(engine) as address:
        yield address
