"""What is told from a JPEG's header, against Pillow, and which files are left to Pillow."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from cots.data.image_io import open_image
from cots.data.jpeg_header import read_baseline

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def encoded(picture: Image.Image = PICTURE, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(exif=exif)


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_upright_size_is_pillows(orientation: int) -> None:
    content = with_orientation(orientation)
    header = read_baseline(content)
    assert header is not None
    assert header.upright_size == open_image(content).size
    assert (header.width, header.height, header.pixels) == (64, 48, 64 * 48)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_grey_colour_and_comments_are_plain(subsampling: int) -> None:
    assert read_baseline(encoded(PICTURE.convert("L"))) is not None
    assert read_baseline(encoded(subsampling=subsampling, comment=b"a\xff\xd9b", dpi=(300, 300))) is not None


def test_bytes_behind_the_end_do_no_harm() -> None:
    assert read_baseline(encoded() + b"trailer" * 100) is not None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xd8\xff",
        encoded(progressive=True),
        encoded(PICTURE.convert("CMYK")),
        encoded(keep_rgb=True),
        encoded()[:-2],  # no end marker
        encoded()[:300],
        encoded().replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),  # 12 bits
        encoded().replace(b"\xff\xc0", b"\xff\xc1"),
        b"\xff\xd8" + b"junk" + encoded()[2:],
        encoded(xmp=b'<x:xmpmeta tiff:Orientation="6"/>'),
    ],
    ids=["empty", "magic", "progressive", "cmyk", "rgb", "no end", "cut", "12 bits", "extended", "junk", "xmp"],
)
def test_the_rest_is_left_to_pillow(content: bytes) -> None:
    assert read_baseline(content) is None


def test_damaged_exif_means_upright_as_in_pillow() -> None:
    content = with_orientation(6)
    broken = content.replace(b"Exif\0\0MM\0*", b"Exif\0\0XXXX")
    assert broken != content
    header = read_baseline(broken)
    assert header is not None
    assert header.upright_size == open_image(broken).size == (64, 48)


def test_random_damage_never_raises() -> None:
    rng = random.Random(0)
    content = with_orientation(6)
    for _ in range(3000):
        damaged = bytearray(content[: rng.randrange(len(content))] if rng.random() < 0.3 else content)
        for _ in range(rng.randrange(4)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        header = read_baseline(bytes(damaged))
        assert header is None or min(header.width, header.height) > 0
