"""What a file is, told from its first bytes: a still image, a video, or neither.

Names lie (a text file called `.jpg`, a GIF that moves), so the extension only decides which files of a folder are
looked at.
"""

from collections.abc import Callable
from typing import BinaryIO, Literal

from PIL import Image

Kind = Literal["image", "video"]

IMAGE_EXTENSIONS = frozenset(
    {"apng", "avif", "bmp", "dds", "dib", "gif", "heic", "heif", "icns", "ico", "j2c", "j2k", "jfif", "jp2", "jpc"}
    | {"jpe", "jpeg", "jpf", "jpg", "jpx", "mpo", "pbm", "pcx", "pfm", "pgm", "png", "pnm", "ppm", "psd", "qoi", "ras"}
    | {"sgi", "tga", "tif", "tiff", "webp", "xbm", "xpm"}
)
VIDEO_EXTENSIONS = frozenset(
    {"3g2", "3gp", "asf", "avi", "divx", "flv", "h264", "hevc", "m2ts", "m2v", "m4v", "mkv", "mov", "mp4", "mpeg"}
    | {"mpg", "mts", "mxf", "ogm", "ogv", "rm", "rmvb", "ts", "vob", "webm", "wmv", "y4m"}
)
MEDIA_EXTENSIONS = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS

HEADER_BYTES = 512  # enough for every signature below; a transport stream needs 197

# Pillow hands EPS to Ghostscript, a program of its own, which no picture from a stranger should reach; its MPEG, BUFR,
# GRIB, HDF5 and WMF plugins only recognise files that they cannot decode.
_EXCLUDED_FORMATS = frozenset({"EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF"})

_IMAGE_SIGNATURES = (
    b"\xff\xd8\xff",  # JPEG
    b"BM",
    b"II*\x00",
    b"MM\x00*",
    b"II+\x00",  # BigTIFF
    b"MM\x00+",
    b"8BPS",
    b"qoif",
    b"DDS ",
    b"\x00\x00\x00\x0cjP  ",  # JPEG 2000
    b"\xff\x4f\xff\x51",  # JPEG 2000 codestream
    b"\x00\x00\x01\x00",  # ICO
    b"\x01\xda",  # SGI
)
_VIDEO_SIGNATURES = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"FLV\x01",
    b"OggS",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
    b"\x00\x00\x01\xba",  # MPEG programme stream
    b"\x00\x00\x01\xb3",  # MPEG video
    b"\x00\x00\x00\x01",  # H.264 and HEVC elementary streams
    b".RMF",
    b"\x06\x0e\x2b\x34",  # MXF
    b"YUV4MPEG2",
)
_QUICKTIME_BOXES = frozenset({b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})


def is_heif(header: bytes) -> bool:
    """Whether the bytes start an HEIC or HEIF picture."""
    return header[4:8] == b"ftyp" and header[8:12] in _HEIF_BRANDS


def pillow_formats() -> list[str]:
    """The formats that Pillow may open here: all it knows except those that run other programs or cannot be decoded."""
    Image.init()
    return [name for name in Image.ID if name not in _EXCLUDED_FORMATS]


def sniff(header: bytes, extension: str, open_file: Callable[[], BinaryIO]) -> Kind | None:
    """Tell an image from a video by content; None when it is neither.

    Args:
        header: the first HEADER_BYTES bytes.
        extension: lower case, without the dot. It decides only for formats without a signature (TGA, PCX and the like).
        open_file: gives the whole content, seekable; called only where the header does not suffice (GIF, PNG, no
            signature).
    """
    if header[:6] in (b"GIF87a", b"GIF89a"):
        return "video" if _gif_moves(open_file) else "image"
    if header.startswith(b"\x89PNG\r\n\x1a\n"):
        return "video" if _png_moves(open_file) else "image"
    if header[:4] == b"RIFF":
        return _riff_kind(header)
    if header[4:8] == b"ftyp":
        if header[8:12] == b"avif" or header[8:12] in _HEIF_BRANDS:
            return "image"
        return "video"
    if header.startswith(_IMAGE_SIGNATURES):
        return "image"
    if header.startswith(_VIDEO_SIGNATURES) or header[4:8] in _QUICKTIME_BOXES or _is_transport_stream(header):
        return "video"
    return "image" if extension in IMAGE_EXTENSIONS and _pillow_recognises(open_file) else None


def _riff_kind(header: bytes) -> Kind | None:
    if header[8:12] == b"WEBP":
        moves = header[12:16] == b"VP8X" and len(header) > 20 and header[20] & 0x02
        return "video" if moves else "image"
    return "video" if header[8:12] == b"AVI " else None


def _is_transport_stream(header: bytes) -> bool:
    """Packets of 188 bytes, each starting with 0x47; Blu-ray's (.m2ts) have four bytes before each."""
    return header[:1] == header[188:189] == b"\x47" or header[4:5] == header[196:197] == b"\x47"


def _gif_moves(open_file: Callable[[], BinaryIO]) -> bool:
    """Whether a GIF has a second frame. A damaged one counts as a still: decoding it names the damage."""
    try:
        with open_file() as file, Image.open(file, formats=["GIF"]) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # Pillow's parsers raise almost anything on damaged input
        return False


def _png_moves(open_file: Callable[[], BinaryIO]) -> bool:
    """Whether a PNG carries the animation control chunk, which must come before the pixels."""
    with open_file() as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            if head[4:] == b"acTL":
                return True
            if head[4:] == b"IDAT":
                return False
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    return False


def _pillow_recognises(open_file: Callable[[], BinaryIO]) -> bool:
    try:
        with open_file() as file, Image.open(file, formats=pillow_formats()):
            return True
    except Exception:
        return False
