"""Every kind of picture becomes upright 8-bit RGB, and every broken one a MediaError with a reason."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from cots.data.image_io import open_image, open_sized
from cots.errors import MediaError

Encode = Callable[..., bytes]


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, in steps of 1/255."""
    assert a.size == b.size
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b.convert("RGB"), np.float32)).mean())


@pytest.mark.parametrize(
    "image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "QOI", "AVIF"]
)
def test_formats(image_format: str, photo: Image.Image, encode: Encode) -> None:
    if image_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    opened = open_image(encode(photo, image_format))
    assert opened.mode == "RGB"
    assert difference(opened, photo) < 8


def test_path_and_bytes_give_the_same(photo: Image.Image, encode: Encode, tmp_path: Path) -> None:
    content = encode(photo, "PNG")
    (tmp_path / "photo.png").write_bytes(content)
    assert open_image(tmp_path / "photo.png").tobytes() == open_image(content).tobytes() == photo.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation: int, image_format: str, photo: Image.Image, encode: Encode) -> None:
    stored_as = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = photo.transpose(stored_as[orientation]) if orientation > 1 else photo
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encode(stored, image_format, exif=exif))
    assert difference(opened, photo) < 6
    assert opened.getexif().get(0x0112, 1) == 1, "a reader further on would turn it a second time"


def test_damaged_exif_is_ignored(photo: Image.Image, encode: Encode) -> None:
    content = encode(photo, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert difference(open_image(content), photo) < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_lies_on_white(mode: str, encode: Encode) -> None:
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    picture.paste((0, 0, 0, 128), (4, 4, 8, 8))
    opened = open_image(encode(picture.convert("LA") if mode == "LA" else picture, "PNG"))
    assert opened.getpixel((0, 0)) == (0, 0, 0)
    assert opened.getpixel((6, 0)) == (255, 255, 255)
    assert opened.getpixel((6, 6)) == pytest.approx((127, 127, 127), abs=1)


def test_palette_with_transparency(encode: Encode) -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    picture.putpixel((0, 0), 0)
    for image_format in ("PNG", "GIF"):
        opened = open_image(encode(picture, image_format, transparency=0))
        assert opened.getpixel((0, 0)) == (255, 255, 255)
        assert opened.getpixel((1, 1)) == (10, 200, 30)


def test_colour_key_of_an_rgb_png(encode: Encode) -> None:
    picture = Image.new("RGB", (4, 4), (1, 2, 3))
    picture.putpixel((0, 0), (9, 9, 9))
    opened = open_image(encode(picture, "PNG", transparency=(1, 2, 3)))
    assert (opened.getpixel((0, 0)), opened.getpixel((1, 1))) == ((9, 9, 9), (255, 255, 255))


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(image_format: str, encode: Encode) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    opened = np.asarray(open_image(encode(Image.fromarray(ramp), image_format)))[..., 0]
    assert np.abs(opened.astype(int) - np.round(ramp / 257).astype(int)).max() <= 1


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-5.0, 300.0)])
def test_floats(low: float, high: float, encode: Encode) -> None:
    values = np.linspace(low, high, 32 * 32, dtype=np.float32).reshape(32, 32)
    opened = np.asarray(open_image(encode(Image.fromarray(values), "TIFF")))[..., 0]
    assert (opened.min(), opened.max()) == (0, 255)
    assert np.all(np.diff(opened.ravel().astype(int)) >= 0)


def test_one_value_outside_the_range(encode: Encode) -> None:
    for picture in (Image.new("F", (4, 4), 5.0), Image.new("F", (4, 4), -1.0), Image.new("I", (4, 4), 100_000)):
        assert open_image(encode(picture, "TIFF")).getcolors() == [(16, (0, 0, 0))]


def test_one_bit_and_grey(photo: Image.Image, encode: Encode) -> None:
    assert set(np.unique(np.asarray(open_image(encode(photo.convert("1"), "PNG"))))) == {0, 255}
    assert difference(open_image(encode(photo.convert("L"), "PNG")), photo.convert("L")) == 0


def test_cmyk(encode: Encode) -> None:
    opened = open_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = opened.getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


def test_lab(encode: Encode) -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    picture = Image.new("RGB", (16, 16), (180, 90, 40))
    opened = open_image(encode(ImageCms.applyTransform(picture, to_lab), "TIFF"))
    assert difference(opened, picture) < 3


def test_jpeg_is_decoded_smaller_for_a_small_target(encode: Encode) -> None:
    content = encode(Image.new("RGB", (4000, 3000), "teal"), "JPEG")
    opened = open_image(content, target_size=224)
    assert min(opened.size) == 750  # a quarter is the least that keeps twice the target
    assert open_image(content, target_size=2000).size == (4000, 3000)


def test_animation_gives_its_first_frame(encode: Encode) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert open_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


def reason(content: bytes | Path, **options: int) -> str:
    with pytest.raises(MediaError) as caught:
        open_image(content, "broken.jpg" if isinstance(content, bytes) else "", **options)
    return caught.value.reason


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_is_an_error_not_half_a_picture(
    image_format: str, share: float, photo: Image.Image, encode: Encode
) -> None:
    if image_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    content = encode(photo, image_format)
    assert reason(content[: int(len(content) * share)])


def test_empty() -> None:
    assert reason(b"") == "the file is empty (0 bytes)"


def test_text_called_jpg(tmp_path: Path) -> None:
    (tmp_path / "note.jpg").write_text("dear diary, ...")
    with pytest.raises(MediaError, match=r"note\.jpg: not an image"):
        open_image(tmp_path / "note.jpg")


def test_missing_directory_and_broken_link(tmp_path: Path) -> None:
    assert reason(tmp_path / "nowhere.png") == "no such file or directory"
    assert reason(tmp_path) == "is a directory"
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    assert reason(tmp_path / "link.png") == "no such file or directory"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_forbidden(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    assert reason(tmp_path / "secret.png") == "permission denied"


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("orientation", "upright"), [(1, (301, 300)), (6, (300, 301))])
def test_the_size_of_the_whole_upright_picture_is_known_at_whatever_size_it_is_decoded(
    orientation: int, upright: tuple[int, int], encode: Encode
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    held: list[int] = []
    content = encode(Image.new("RGB", (301, 300)), "JPEG", exif=exif)
    opened, size = open_sized(content, target_size=16, admit=held.append)
    assert (opened.size, size, held) == ((38, 38), upright, [38 * 38])


def test_pixel_limit(photo: Image.Image, encode: Encode) -> None:
    assert "320 x 240 pixels is more than the limit of 1,000 pixels" in reason(encode(photo, "PNG"), max_pixels=1000)
    assert "12000 x 12000 pixels is more than the limit" in reason(png_claiming(12_000, 12_000))


def test_decompression_bomb() -> None:
    assert "too many pixels" in reason(png_claiming(60_000, 60_000))


def test_postscript_is_not_handed_to_ghostscript() -> None:
    assert "not an image" in reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")


def test_random_damage_raises_nothing_else(photo: Image.Image, encode: Encode) -> None:
    generator = np.random.default_rng(7)
    for image_format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        content = encode(photo.resize((48, 36)), image_format)
        for _ in range(40):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[generator.integers(0, len(damaged), 8)] = generator.integers(0, 256, 8)
            try:
                assert open_image(damaged.tobytes(), max_pixels=1_000_000).mode == "RGB"
            except MediaError:
                continue
