"""Small WebP stills of what a gallery holds: a picture, or the frame that stands for a video's moment."""

import io
import os
import threading
from collections import OrderedDict
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from cots.data.image_io import open_image
from cots.data.video_io import read_frames
from index.gallery import Gallery

Size = Literal["tile", "large"]
TILE_SIDE = 440
LARGE_SIDE = 1600
KEPT_BYTES = 96 * 2**20
_SIDES: dict[Size, int] = {"tile": TILE_SIDE, "large": LARGE_SIDE}
_MARGIN = 0.1
_WHITE = 246


class Thumbnails:
    """Makes thumbnails and keeps the latest used in memory."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, Size], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._makers = threading.Semaphore(os.cpu_count() or 1)  # decoding more at once only makes every one late

    def get(self, gallery: Gallery, mark: str, id: int, size: Size) -> bytes:
        """The thumbnail of a row as WebP.

        Args:
            gallery: holds the row.
            mark: tells this version of the gallery from others.
            id: the row.
            size: "tile", a square for the grid, or "large", the whole picture for the viewer.

        Raises:
            GalleryError: there is no such row.
            MediaError: the file is gone or cannot be read.
        """
        key = (mark, id, size)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        with self._makers:
            content = make_thumbnail(gallery, id, size)
        with self._lock:
            self._bytes += len(content) - len(self._kept.pop(key, b""))
            self._kept[key] = content
            while self._bytes > KEPT_BYTES:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return content


def make_thumbnail(gallery: Gallery, id: int, size: Size) -> bytes:
    """Decode a row's picture or frame and scale it; errors as in `Thumbnails.get`."""
    row = gallery.row(id)
    media, _ = gallery.media(id)
    if row["kind"] == "video":
        time = row["frame_time"] if row["frame_time"] is not None else (row["duration"] or 0.0) / 2
        picture = read_frames(media, times=[time], short_side=_SIDES[size], name=row["path"]).images[0]
    else:
        picture = open_image(media, name=row["path"], target_size=_SIDES[size])
    if size == "large":
        picture.thumbnail((LARGE_SIDE, LARGE_SIDE), Image.Resampling.LANCZOS)
    elif row["kind"] == "image" and has_plain_ground(picture):
        picture = centre_cutout(picture)
    else:
        side = min(TILE_SIDE, *picture.size)
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    return to_webp(picture)


def to_webp(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82, method=2)
    return buffer.getvalue()


def has_plain_ground(picture: Image.Image) -> bool:
    """Whether a picture is a drawing or a cut-out on white: most of its rim is white.

    A subject may touch the rim; a photograph's white sky covers less than half of it.
    """
    small = np.asarray(picture.resize((32, 32), Image.Resampling.BOX)).min(axis=2)
    rim = np.concatenate([small[0], small[-1], small[1:-1, 0], small[1:-1, -1]])
    return float((rim >= _WHITE).mean()) >= 0.6


def centre_cutout(picture: Image.Image) -> Image.Image:
    """Trim the white around a cut-out and centre it in a white square; cropping would cut into it."""
    box = picture.convert("L").point(lambda value: 255 * (value < _WHITE)).getbbox()
    subject = picture.crop(box) if box else picture
    side = min(TILE_SIDE, round(max(subject.size) / (1 - 2 * _MARGIN)))
    inner = round(side * (1 - 2 * _MARGIN))
    scale = inner / max(subject.size)
    width, height = (max(1, round(scale * length)) for length in subject.size)  # a thin line keeps a pixel
    subject = subject.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), "white")
    square.paste(subject, ((side - subject.width) // 2, (side - subject.height) // 2))
    return square
