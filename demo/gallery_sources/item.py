"""One thing that goes into the gallery, and how pictures are brought to size."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

WEBP_METHOD = 6  # slowest and smallest


@dataclass(frozen=True)
class Item:
    """A picture or clip that is not written yet."""

    source: str
    """openclipart, fluent-emoji, fluent-emoji-animated or photographs"""
    title: str
    """what the file is named after"""
    captions: tuple[str, ...]
    licence: str
    author: str
    origin: str
    """package, version and the file in it"""
    group: str
    """items of one group (one emoji still and moving, one title twice) are never divided between train and eval"""
    suffix: str
    write: Callable[[Path], None] = field(repr=False)


Tally = Counter[str]
"""reason -> number of candidates left out for it"""


def slug(title: str) -> str:
    """A file name: lower case ASCII words joined by hyphens, without a leading article, at most 48 characters."""
    ascii_title = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z0-9]+", ascii_title.lower().replace("'", ""))
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return "-".join(words)[:48].strip("-")


def on_white(image: Image.Image) -> Image.Image:
    """RGB, with transparent parts filled in white."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def save_webp(image: Image.Image, path: Path, longest_side: int, quality: int) -> None:
    """Write as WebP, scaled down so that the longest side is at most `longest_side` pixels."""
    image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    image.save(path, "WEBP", quality=quality, method=WEBP_METHOD)
