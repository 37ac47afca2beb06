"""Microsoft's Fluent emoji as packed by LobeHub (MIT), still and animated, with labels and tags from emojibase (MIT).

Left out: skin tones, flags, symbols (arrows, letters, zodiac, buttons), clock faces, card suits, variants of families
and couples, gestures that offend, and for clips those whose animation the package stores as a single frame.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageSequence

from demo.gallery_sources.item import Item, Tally, on_white, save_webp
from demo.gallery_sources.packages import EMOJI_CLIPS, EMOJI_LABELS, EMOJI_STILLS, Package

LONGEST_SIDE = 160
QUALITY = 80
CLIP_SIDE = 128
CLIP_QUALITY = "27"  # x264's constant rate factor
CLIP_FRAMES_PER_SECOND = 12

COMPONENT, SYMBOLS, FLAGS = 2, 8, 9  # emojibase's groups
UNWANTED = re.compile(
    r"middle finger|hundred points|anger symbol|.* bubble|.*o.clock|.*-thirty|.* suit|kiss: .*|family: .*|"
    r"couple with heart: .*|bust.* in silhouette|speaking head|fingerprint|dizzy|(wo)?men (with bunny ears|wrestling)|"
    r"identification card|placard|money with wings|chart .*|.*dashing away|bar chart|people hugging|nesting dolls|no .*"
)
GENDERED = re.compile(r"^(man|woman|men|women) (?!dancing|and)(.+)")
SINGULAR_S = ("ss", "us", "rhinoceros", "lens")
PROPER = {"Santa Claus", "Mrs. Claus", "Mx Claus"}
WITH_THE = {"Statue of Liberty", "Tokyo tower", "sun"}


IRREGULAR = dict(
    line.split("\t") for line in Path(__file__).with_name("fluent_emoji.tsv").read_text("utf-8").splitlines()
)
"""label -> phrase, for labels that are no countable noun; "-" where the emoji is left out"""


def phrase(label: str) -> str:
    """The label as it stands in a sentence: "an ear of corn", "scissors", "a woman with red hair"."""
    if label in IRREGULAR:
        return IRREGULAR[label]
    label = label.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    label = re.sub(r"^(man|woman|person): bald$", r"bald \1", label)
    label = re.sub(r"^(man|woman|person): (.+)$", r"\1 with \2", label)
    role = re.match(r"(man|woman) (?!\w+ing\b|in |with |and )(.+)", label)
    if role:
        return f"a {'male' if role[1] == 'man' else 'female'} {role[2]}"
    if label in PROPER:
        return label
    if label in WITH_THE:
        return f"the {label}"
    head = re.split(r" (?:with|in|of|on|and|holding|without|over|behind|at|from) ", label)[0]
    last = head.split()[-1]
    plural = last.endswith("s") and not last.endswith(SINGULAR_S)
    if plural or last.endswith(("feet", "people", "men", "women")):
        return label
    vowel = re.match(r"[aeiouAEIOU]", label) and not re.match(r"uni|use|one|eu|uk|ut", label)
    return f"an {label}" if vowel else f"a {label}"


def _hexcode(name: str) -> str:
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def _assets(packages: tuple[Package, ...], unpacked: Path) -> dict[str, tuple[Package, Path]]:
    found: dict[str, tuple[Package, Path]] = {}
    for package in packages:
        for path in sorted((package.folder(unpacked) / "package/assets").glob("*.webp")):
            found.setdefault(_hexcode(path.stem), (package, path))
    return found


def _labelled(unpacked: Path, left_out: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    """(hexcode, emojibase's entry) of what is wanted, in emojibase's order."""
    for entry in json.loads((EMOJI_LABELS.folder(unpacked) / "package/en/data.json").read_text("utf-8")):
        if entry.get("group") in (None, COMPONENT):
            continue
        if entry["group"] in (SYMBOLS, FLAGS):
            left_out["fluent-emoji: flag or symbol"] += 1
        elif UNWANTED.fullmatch(entry["label"]) or IRREGULAR.get(entry["label"]) == "-":
            left_out["fluent-emoji: unwanted label"] += 1
        else:
            yield _hexcode(entry["hexcode"]), entry


def _tags(entry: dict[str, Any]) -> str:
    tags = [tag for tag in entry["tags"] if re.fullmatch(r"[a-z]{3,15}", tag)]
    return ", ".join(dict.fromkeys([entry["label"].lower(), *tags[:5]]))


def _item(source: str, opening: str, package: Package, path: Path, entry: dict[str, Any], suffix: str) -> Item:
    label = entry["label"]
    captions = [f"{opening} {phrase(label)}"]
    if len(entry["tags"]) >= 2:
        captions.append(_tags(entry))
    gendered = GENDERED.match(label)
    return Item(
        source=source,
        title=label,
        captions=tuple(captions),
        licence="MIT",
        author="Microsoft (Fluent Emoji), packed by LobeHub",
        origin=f"{package.label}: assets/{path.name}",
        group=re.sub(r"^person ", "", gendered[2] if gendered else label),  # man, woman and person of one role
        suffix=suffix,
        write=lambda target: _write_clip(path, target) if suffix == ".mp4" else _write_still(path, target),
    )


def _write_still(source: Path, target: Path) -> None:
    save_webp(on_white(Image.open(source)), target, LONGEST_SIDE, QUALITY)


def _write_clip(source: Path, target: Path) -> None:
    """H.264 on white at CLIP_FRAMES_PER_SECOND, each frame the one shown at that moment."""
    with Image.open(source) as animation, av.open(str(target), "w", options={"movflags": "+faststart"}) as container:
        # One thread: x264's output depends on the number of threads.
        options = {"crf": CLIP_QUALITY, "preset": "slow", "tune": "animation", "threads": "1"}
        stream = container.add_stream("libx264", rate=CLIP_FRAMES_PER_SECOND, options=options)
        stream.width, stream.height, stream.pix_fmt = CLIP_SIDE, CLIP_SIDE, "yuv420p"
        clock, written = 0.0, 0
        for frame in ImageSequence.Iterator(animation):
            frame.load()  # only decoding fills in the duration
            clock += frame.info["duration"] / 1000
            while written / CLIP_FRAMES_PER_SECOND < clock - 1e-6:
                shown = on_white(frame).resize((CLIP_SIDE, CLIP_SIDE), Image.Resampling.LANCZOS)
                container.mux(stream.encode(av.VideoFrame.from_image(shown)))
                written += 1
        container.mux(stream.encode())


def stills(unpacked: Path, left_out: Tally) -> Iterator[Item]:
    """One picture an emoji."""
    assets = _assets((EMOJI_STILLS,), unpacked)
    for hexcode, entry in _labelled(unpacked, left_out):
        if hexcode not in assets:
            left_out["fluent-emoji: not drawn"] += 1
            continue
        yield _item("fluent-emoji", "a 3D emoji of", *assets[hexcode], entry, ".webp")


def clips(unpacked: Path, left_out: Tally) -> Iterator[Item]:
    """One clip an emoji that moves; of a role drawn as person, man and woman only the first."""
    assets = _assets(EMOJI_CLIPS, unpacked)
    seen = set()
    for hexcode, entry in _labelled(unpacked, Tally()):
        if hexcode not in assets:
            continue
        package, path = assets[hexcode]
        with Image.open(path) as image:
            moving = getattr(image, "n_frames", 1) > 1
        item = _item("fluent-emoji-animated", "an animated emoji of", package, path, entry, ".mp4")
        if not moving:
            left_out["fluent-emoji-animated: a single frame"] += 1
        elif item.group in seen:
            left_out["fluent-emoji-animated: man or woman of a role that is there"] += 1
        else:
            seen.add(item.group)
            yield item
