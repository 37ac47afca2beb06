"""Parts of what the media routes send: thumbnails of drawings, ranges of bytes."""

import pytest
from PIL import Image

from demo.media import part_of
from demo.thumbnails import centre_cutout, has_plain_ground


def test_drawings_on_white_are_centred_and_photographs_are_not() -> None:
    drawing = Image.new("RGB", (300, 200), "white")
    drawing.paste("black", (10, 10, 60, 90))
    assert has_plain_ground(drawing)
    left, top, right, bottom = centre_cutout(drawing).convert("L").point(lambda value: 255 * (value < 128)).getbbox()
    side = centre_cutout(drawing).width
    assert abs(left + right - side) <= 2
    assert abs(top + bottom - side) <= 2
    assert not has_plain_ground(Image.new("RGB", (300, 200), "gray"))


@pytest.mark.parametrize("size", [(1, 1800), (1800, 1), (1, 1)])
def test_a_thin_line_on_white_stays_visible(size: tuple[int, int]) -> None:
    drawing = Image.new("RGB", (2000, 2000), "white")
    drawing.paste("black", (100, 100, 100 + size[0], 100 + size[1]))
    left, top, right, bottom = centre_cutout(drawing).convert("L").point(lambda value: 255 * (value < 128)).getbbox()
    assert (right - left > 300, bottom - top > 300) == (size[0] > 1, size[1] > 1)
    assert min(right - left, bottom - top) == 1


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [
        (None, 200, b"0123456789"),
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-3", 206, b"789"),
        ("bytes=8-99", 206, b"89"),
        ("bytes=10-", 416, b""),
        ("bytes=0-1,4-5", 200, b"0123456789"),
        ("lines=1-2", 200, b"0123456789"),
    ],
)
def test_ranges_of_bytes_in_memory(asked: str | None, status: int, content: bytes) -> None:
    reply = part_of(b"0123456789", "video/mp4", asked)
    assert reply.status_code == status
    assert reply.body == content
