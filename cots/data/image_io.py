"""Still images: anything that Pillow reads becomes an upright 8-bit RGB picture, or a MediaError that says why not."""

import io
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from cots.data.media_kind import HEADER_BYTES, is_heif, pillow_formats
from cots.errors import MediaError

MAX_PIXELS = 100_000_000

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = tuple(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))

# MAX_PIXELS is checked before every decode, so Pillow's own lower threshold would only print a line about pictures that
# are wanted.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# "Corrupt EXIF data": damage is reported by name
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def open_image(
    source: str | Path | bytes,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
    target_size: int | None = None,
) -> Image.Image:
    """Decode an image to upright RGB: EXIF applied, transparency laid on white, deep and CMYK modes brought to 8 bits.

    Args:
        source: a path, or the encoded bytes.
        name: what errors call the image; the path when empty.
        max_pixels: the largest width x height accepted, checked before any pixel is decoded.
        target_size: the short side that the caller will scale to. A JPEG may then be decoded at 1/2, 1/4 or 1/8 of its
            size, with the short side kept at twice the target or more. None: full size.

    Returns:
        A loaded picture of mode RGB. Of an animation, the first frame.

    Raises:
        MediaError: missing, empty, not an image, larger than `max_pixels`, truncated or damaged.
    """
    return open_sized(source, name, max_pixels, target_size)[0]


def open_sized(
    source: str | Path | bytes,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
    target_size: int | None = None,
    admit: Callable[[int], None] = lambda _: None,
) -> tuple[Image.Image, tuple[int, int]]:
    """As `open_image`, and the width and height of the whole upright picture, at whatever size it was decoded.

    Args:
        admit: told before any pixel is decoded how many decoding holds in memory; may wait until there is room.
    """
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise MediaError(name, os_reason(error)) from error
    with file:
        try:
            with _open(file) as image:
                if image.width * image.height > max_pixels:
                    raise MediaError(name, _too_large(image.width, image.height, max_pixels))
                width, height = image.size
                if target_size is not None:
                    image.draft("RGB", (2 * target_size, 2 * target_size))
                # a progressive JPEG's coefficients are held whole, at whatever size it is decoded
                admit(width * height if "progressive" in image.info else image.width * image.height)
                image.load()
                turn = _turn_upright(image)  # now, for a PNG may say so behind its pixels
                upright = to_rgb(image) if turn is None else to_rgb(image).transpose(turn)
                upright.info.clear()  # it still says "rotate me" to the next reader of EXIF
                return upright, ((height, width) if turn in _SIDEWAYS else (width, height))
        except MediaError:
            raise
        # Pillow's parsers raise almost anything on damaged input, from struct.error to KeyError
        except Exception as error:
            raise MediaError(name, describe_damage(error, file)) from error


def os_reason(error: OSError) -> str:
    """The operating system's complaint, without its number and the path."""
    return (error.strerror or str(error)).lower()


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring a loaded picture of any mode to 8-bit RGB; what is transparent becomes white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # the caller closes the file that `image` belongs to
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _deep_to_rgb(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    if image.mode == "LAB":
        transform = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), inMode="LAB", outMode="RGB"
        )
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None  # None only for in-place transforms
        return converted
    return image.convert("RGB")


def _open(file: Any) -> Image.Image:
    try:
        return Image.open(file, formats=pillow_formats())
    except Image.UnidentifiedImageError:
        file.seek(0)
        if not is_heif(file.read(HEADER_BYTES)) or find_spec("pillow_heif") is None:
            raise
        from pillow_heif import register_heif_opener

        register_heif_opener()
        file.seek(0)
        return Image.open(file, formats=pillow_formats())


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float greyscale to 8 bits (Pillow's own conversion clips everything over 255 to white).

    The full range of 16 bits maps to black..white, floats in 0..1 likewise; values outside these have no agreed range,
    so their own minimum and maximum are stretched.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    top = 1.0 if image.mode == "F" else 65535.0
    if low < 0.0 or high > top:
        values, top = values - low, (high - low) or 1.0
    return Image.fromarray((values * (255.0 / top) + 0.5).astype(np.uint8)).convert("RGB")


def _turn_upright(image: Image.Image) -> Image.Transpose | None:
    """What brings a loaded picture upright, by its EXIF."""
    try:
        return _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing about the pixels, which decoded
        return None


def _too_large(width: int, height: int, max_pixels: int) -> str:
    return f"{width} x {height} pixels is more than the limit of {max_pixels:,} pixels; scale the picture down"


def describe_damage(error: Exception, file: Any) -> str:
    """Why Pillow could not read a file, as the reason of a MediaError."""
    file.seek(0)
    header = file.read(HEADER_BYTES)
    if not header:
        return "the file is empty (0 bytes)"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels to decode safely ({error}); scale the picture down"
    if isinstance(error, Image.UnidentifiedImageError):
        if is_heif(header):
            return "HEIC pictures need another package: pip install pillow-heif"
        return "not an image in a format that Pillow reads, or its header is damaged"
    if "truncated" in str(error).lower():
        return "the image is truncated: the file ends before its pixels do"
    return f"the image is damaged or truncated ({str(error) or type(error).__name__})"
