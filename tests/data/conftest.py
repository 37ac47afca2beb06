"""Media that several tests of this folder read."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_media import write_video


@pytest.fixture(scope="session")
def media_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def clip(media_dir: Path) -> Path:
    """Four seconds of H.264 at 10 frames a second."""
    return write_video(media_dir / "clip.mp4", faststart=True)


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A smooth picture, 320 x 240, all four corners different."""
    y, x = np.mgrid[0:240, 0:320]
    return Image.fromarray(np.stack([x * 255 // 319, y * 255 // 239, (x + y) * 255 // 558], axis=-1).astype(np.uint8))


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    def encoded(picture: Image.Image, image_format: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, image_format, **options)
        return buffer.getvalue()

    return encoded
