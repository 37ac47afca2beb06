"""Tux Paint's stamps: cut-outs with a sentence each. GPL-2, so for training shards only and never in the gallery."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from demo.gallery_sources.item import Item, Tally, on_white, save_webp
from demo.gallery_sources.packages import STAMPS

LONGEST_SIDE = 192
QUALITY = 85


def items(unpacked: Path, left_out: Tally) -> Iterator[Item]:
    """Every raster stamp whose text file begins with an English sentence."""
    root = STAMPS.folder(unpacked) / "usr/share/tuxpaint/stamps"
    for path in sorted(root.rglob("*.png")):
        text = path.with_suffix(".txt")
        name = path.relative_to(root)
        if path.stem.endswith("_mirror") or not text.exists():
            left_out["stamps: mirror image or no sentence"] += 1
            continue
        sentence = text.read_text("utf-8").splitlines()[0].strip()
        if "symbols" in name.parts[:1] or not sentence or "=" in sentence:
            left_out["stamps: symbol, coin or letter"] += 1
            continue
        yield Item(
            source="stamps",
            title=name.with_suffix("").as_posix(),
            captions=(sentence,),
            licence="GPL-2",
            author="Bill Kendrick and contributors",
            origin=f"{STAMPS.label}: {name}",
            group=sentence,
            suffix=".webp",
            write=lambda target, path=path: save_webp(on_white(Image.open(path)), target, LONGEST_SIDE, QUALITY),  # type: ignore[misc]
        )
