"""Precision@5 of everyday concepts on the embedded gallery.

    python benchmarks/gallery_precision.py [--sheet hits.png] [--json OUT]

The concepts and the words that make a hit relevant stand in gallery_concepts.tsv, written down before the first
search. A hit counts if one of its captions has one of the words; `--sheet` draws the hits, so that a person can judge
what words cannot.
"""

import argparse
import csv
import io
import json
import re
from pathlib import Path

from PIL import Image, ImageDraw
from run_facts import run_facts

import cots
from cots.data.image_io import open_image
from cots.data.video_io import read_frames
from cots.embedded import EMBEDDED_GALLERY
from index.gallery import Gallery
from index.search import Hit


def concepts() -> list[tuple[str, set[str]]]:
    """(query, words that make a hit relevant), in the order they were written down."""
    with (Path(__file__).parent / "gallery_concepts.tsv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    return [(query, set(words.split())) for query, words in rows]


def is_relevant(caption: str, words: set[str]) -> bool:
    return bool(words & set(re.findall(r"[a-z-]+", caption.lower())))


def thumbnail(gallery: Gallery, hit: Hit, side: int = 128) -> Image.Image:
    content, mime = gallery.media(hit.id)
    image = (
        read_frames(content, times=[hit.frame or 0.0]).images[0] if mime.startswith("video") else open_image(content)
    )
    image.thumbnail((side, side))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gallery", default=str(EMBEDDED_GALLERY))
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    gallery = cots.open_gallery(arguments.gallery)
    rows = concepts()
    sheet = Image.new("RGB", (5 * 132 + 180, len(rows) * 132), "white")
    draw = ImageDraw.Draw(sheet)
    precisions = []
    for row, (query, words) in enumerate(rows):
        hits = gallery.search(query, k=5).hits
        relevant = [is_relevant(hit.caption, words) for hit in hits]
        precisions.append(sum(relevant) / 5)
        print(
            f"{sum(relevant)}/5  {query:18}",
            "; ".join(f"{'+' if r else '-'} {h.caption[:40]}" for h, r in zip(hits, relevant)),
        )
        if arguments.sheet:
            draw.text((4, row * 132 + 56), query, fill="black")
            for column, (hit, good) in enumerate(zip(hits, relevant)):
                corner = (180 + column * 132, row * 132)
                sheet.paste(thumbnail(gallery, hit), corner)
                draw.rectangle((*corner, corner[0] + 8, corner[1] + 8), fill="green" if good else "red")
    mean = sum(precisions) / len(precisions)
    print(f"mean precision@5 {mean:.3f} over {len(precisions)} concepts")
    if arguments.json:
        by_concept = {query: precision for (query, _), precision in zip(rows, precisions)}
        figures = {"rows": len(gallery.snapshot), "precision@5": round(mean, 4), "concepts": by_concept}
        arguments.json.write_text(json.dumps(run_facts() | figures, indent=1) + "\n")
    if arguments.sheet:
        content = io.BytesIO()
        sheet.save(content, "PNG")
        arguments.sheet.write_bytes(content.getvalue())


if __name__ == "__main__":
    main()
