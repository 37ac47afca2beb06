"""What a JPEG says before its pixels, read without a decoder: a GPU's decoder is handed only what it reads as Pillow
does, and is told of no rotation and no damage."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

_START_OF_SCAN = 0xDA
_BASELINE = 0xC0
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # tables and reserved codes lie among them
_WITHOUT_BODY = frozenset({0x01, *range(0xD0, 0xDA)})
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class BaselineJpeg:
    """Attributes:
    width, height: pixels as stored.
    orientation: EXIF's, 1 (upright) to 8.
    """

    width: int
    height: int
    orientation: int

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height of the picture that a person sees."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_baseline(content: bytes) -> BaselineJpeg | None:
    """The header of a plain JPEG: baseline, 8 bits, grey or YCbCr, with an end marker behind its pixels.

    None of all else, about which decoders differ or which they read slowly on a GPU: progressive, CMYK, RGB and 12-bit
    files, those cut off, those with bytes out of place, and those whose orientation only XMP tells.
    """
    if not content.startswith(b"\xff\xd8\xff"):
        return None
    frame = exif = xmp = b""
    at, jfif, transform = 2, False, -1
    while content[at : at + 1] == b"\xff":
        marker = content[at + 1] if at + 1 < len(content) else 0
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0 or marker in _WITHOUT_BODY:
            return None
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4])
        if marker == _START_OF_SCAN:
            if content.rfind(b"\xff\xd9", end) < 0 or not _is_plain(frame, jfif, transform):
                return None
            orientation = _orientation(exif, xmp)
            height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
            return BaselineJpeg(width, height, orientation) if orientation and width and height else None
        if marker in _FRAMES:
            if marker != _BASELINE or frame:
                return None
            frame = content[at + 4 : end]
        elif marker == 0xE0:
            jfif |= content.startswith(b"JFIF", at + 4)
        elif marker == 0xE1:
            if content.startswith(b"Exif\0\0", at + 4):
                exif += content[at + 4 + 6 * bool(exif) : end]
            elif content.startswith(b"http://ns.adobe.com/xap/1.0/\0", at + 4):
                xmp = content[at + 4 : end]
        elif marker == 0xEE and content.startswith(b"Adobe", at + 4) and end >= at + 16:
            transform = content[at + 15]
        at = end
    return None


def _is_plain(frame: bytes, jfif: bool, transform: int) -> bool:
    """Whether a frame's 8-bit components are grey or YCbCr, by libjpeg's rules."""
    if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3) or len(frame) != 6 + 3 * frame[5]:
        return False
    if frame[5] == 1 or jfif or transform == 1:
        return True
    return transform == -1 and frame[6::3] == b"\x01\x02\x03"


def _orientation(exif: bytes, xmp: bytes) -> int:
    """EXIF's orientation, 1 if it says none that is known; 0 if Pillow would ask XMP."""
    found: Any = None
    if exif:
        tags = Image.Exif()
        try:
            tags.load(exif)
            found = tags.get(_EXIF_ORIENTATION)
        except Exception:  # damaged EXIF says nothing about the pixels
            return 1
    if found is None and b"tiff:Orientation" in xmp:
        return 0
    return int(found) if found in range(1, 9) else 1
