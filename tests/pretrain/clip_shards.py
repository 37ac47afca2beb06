"""Clips that a tiny model can learn: coloured squares that cross the picture, and shards of them and of pictures."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from cots.data.video_info import VideoInfo
from cots.data.video_io import Frames
from pretrain.frame_cache import animated

COLORS = {"red": (220, 30, 30), "green": (30, 180, 50), "blue": (40, 60, 220), "yellow": (235, 220, 40)}


def crossing(color: str, seconds: float, ground: int, backwards: bool = False) -> bytes:
    """A square that crosses the picture from left to right in four frames a second."""
    count = round(4 * seconds)
    images = []
    for place in range(count):
        pixels = np.full((48, 64, 3), ground, np.uint8)
        left = round(48 * place / (count - 1))
        pixels[16:32, left : left + 16] = COLORS[color]
        images.append(Image.fromarray(pixels))
    if backwards:
        images.reverse()
    times = [(place + 0.5) / 4 for place in range(count)]
    return animated(Frames(images, times, seconds, VideoInfo(seconds, 4.0, 64, 48, count)), quality=80)


def picture(color: str, ground: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (64, 48), COLORS[color]).save(content, "PNG")
    return content.getvalue()


def write_shard(path: Path, items: list[tuple[str, bytes, dict]]) -> Path:
    """Items are (file name, content, fields of the .json)."""
    with tarfile.open(path, "w") as tar:
        for name, content, fields in items:
            for member, data in ((name, content), (f"{name.partition('.')[0]}.json", json.dumps(fields).encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def clip_items(seed: int) -> list[tuple[str, bytes, dict]]:
    """12 clips of one to five seconds; clips of one colour are a group and share their caption."""
    random = np.random.default_rng(seed)
    items = []
    for number in range(12):
        color = list(COLORS)[number % 4]
        clip = crossing(color, float(random.choice([1, 2, 3, 5])), int(random.integers(0, 255)))
        items.append((f"clip{number:02}.webp", clip, {"captions": [f"a {color} square"], "group": color}))
    return items


def picture_items() -> list[tuple[str, bytes, dict]]:
    return [
        (f"picture{number}.png", picture(color, 0), {"captions": [f"{color} picture {number}"]})
        for number, color in enumerate([*COLORS] * 3)
    ]


def mp4() -> bytes:
    """Two seconds of H.264."""
    import av

    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(16):
            pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return content.getvalue()
