"""Public domain clip art from Debian's openclipart packages.

`openclipart.tsv` lists what was kept after looking at contact sheets, with a caption written by hand (many titles are
Italian, French, empty or an author's name). Left out by folder: icon themes, buttons, shapes, patterns, flags, map
symbols, road signs, playing cards, logos, stick figures, weapons; by comparison: near duplicates; by eye: logos, maps,
text, portraits of real persons and drawings that cannot be made out. Author and keywords come from the SVG's RDF block.
"""

import html
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageChops

from demo.gallery_sources.item import Item, Tally, on_white, save_webp
from demo.gallery_sources.packages import OPENCLIPART_PNG, OPENCLIPART_SVG

LIST = Path(__file__).with_name("openclipart.tsv")
LONGEST_SIDE = 192
QUALITY = 80
SMALLEST_INK = 80
"""pixels on the longest side of what is drawn; below it the raster is a blur in the gallery"""
DROP_WORDS = {"hash", "unsorted", "signs_and_symbols", "clip_art", "clipart", "png", "svg", "various", "menu", "part"}
COMMON_KEYWORD = 4
"""A keyword counts when so many drawings of the package carry it: that drops errors, other languages and names."""

Image.MAX_IMAGE_PIXELS = None  # some rasters have 170 million pixels


def _rdf(svg: Path) -> tuple[list[str], str]:
    text = svg.read_text("utf-8", "replace")
    block = re.search(r"<(?:\w+:)?RDF.*?</(?:\w+:)?RDF>", text, re.S)
    if not block:
        return [], ""
    keywords = [
        html.unescape(word).strip().lower() for word in re.findall(r"<rdf:li[^>]*>(.*?)</rdf:li>", block[0], re.S)
    ]
    author = re.search(r"<dc:creator>.*?<dc:title>(.*?)</dc:title>", block[0], re.S)
    name = re.sub(r"\s*<.*", "", html.unescape(author[1])).strip() if author else ""
    return keywords, "" if "@" in name or "http" in name else name


def _crop_to_ink(image: Image.Image) -> Image.Image:
    """Without the white margin, but for 4 % of the longest side."""
    box = (
        ImageChops.difference(image, Image.new("RGB", image.size, "white")).convert("L").point(lambda v: v > 8 and 255)
    )
    left, top, right, bottom = box.getbbox() or (0, 0, *image.size)
    margin = max(right - left, bottom - top) // 25
    return image.crop(
        (
            max(left - margin, 0),
            max(top - margin, 0),
            min(right + margin, image.width),
            min(bottom + margin, image.height),
        )
    )


def _raster(png: Path) -> Image.Image:
    image: Image.Image = Image.open(png)
    factor = max(image.size) // (4 * LONGEST_SIDE)
    image = image.convert("RGBA")
    return _crop_to_ink(on_white(image.reduce(factor) if factor > 1 else image))


def items(unpacked: Path, left_out: Tally) -> Iterator[Item]:
    """The listed drawings, in the order of the list."""
    vectors = OPENCLIPART_SVG.folder(unpacked) / "usr/share/openclipart/svg"
    rasters = OPENCLIPART_PNG.folder(unpacked) / "usr/share/openclipart/png"
    described = {
        path.relative_to(vectors).with_suffix("").as_posix(): _rdf(path) for path in sorted(vectors.rglob("*.svg"))
    }
    frequency = Counter(word for keywords, _ in described.values() for word in set(keywords))
    listed = dict(line.split("\t") for line in LIST.read_text("utf-8").splitlines())
    left_out["openclipart: not in the list of kept drawings"] += len(described) - len(listed)
    for name, phrase in listed.items():
        image = _raster(rasters / f"{name}.png")
        if max(image.size) < SMALLEST_INK:
            left_out["openclipart: drawn too small"] += 1
            continue
        keywords, author = described[name]
        spoken = [
            word.replace("_", " ")
            for word in dict.fromkeys(keywords)
            if frequency[word] >= COMMON_KEYWORD and re.fullmatch(r"[a-z_ ]{3,20}", word) and word not in DROP_WORDS
            if word != author.lower()
        ]
        captions = [f"a drawing of {phrase}"]
        if len(spoken) >= 2:
            captions.append(", ".join(spoken[:6]))
        yield Item(
            source="openclipart",
            title=phrase,
            captions=tuple(captions),
            licence="public domain",
            author=author,
            origin=f"{OPENCLIPART_PNG.label}: {name}.png",
            group=phrase,
            suffix=".webp",
            write=lambda path, image=image: save_webp(image, path, LONGEST_SIDE, QUALITY),  # type: ignore[misc]
        )
