"""The gallery that ships: every item can be shown, is described, and may be redistributed."""

import json
from collections import defaultdict
from pathlib import Path

import av
import pytest
from PIL import Image

GALLERY = Path(__file__).resolve().parents[2] / "cots/assets/gallery"
ITEMS = [json.loads(line) for line in (GALLERY / "items.jsonl").read_text("utf-8").splitlines()]
LICENCES = ("CC0-1.0", "CC-BY-", "CC-BY-SA-", "MIT", "public domain")
LARGEST_TOTAL = 14 * 2**20


def test_items_and_files_are_the_same_set() -> None:
    paths = [item["path"] for item in ITEMS]
    assert len(set(paths)) == len(paths)
    files = {path.relative_to(GALLERY).as_posix() for path in (GALLERY / "media").rglob("*") if path.is_file()}
    assert files == set(paths)


@pytest.mark.parametrize("source", ["photographs", "openclipart", "fluent-emoji", "fluent-emoji-animated"])
def test_every_file_opens(source: str) -> None:
    chosen = [GALLERY / item["path"] for item in ITEMS if item["source"] == source]
    assert chosen
    for path in chosen:
        if path.suffix == ".mp4":
            with av.open(str(path)) as container:
                frame = next(container.decode(video=0))
                assert frame.width == frame.height == 128
        else:
            with Image.open(path) as image:
                image.load()
                assert image.mode == "RGB"
                assert 64 <= max(image.size) <= 320


def test_every_item_says_what_it_shows_and_whose_it_is() -> None:
    for item in ITEMS:
        assert item["captions"], item["path"]
        assert all(caption.strip() == caption and len(caption) > 3 for caption in item["captions"]), item["path"]
        assert item["licence"].startswith(LICENCES), item["path"]
        assert "GPL" not in item["licence"], item["path"]
        assert item["origin"], item["path"]
        assert item["split"] in ("train", "eval")
        if item["licence"].startswith("CC-BY"):
            assert item["author"], item["path"]


def test_one_caption_never_stands_in_both_splits() -> None:
    splits = defaultdict(set)
    for item in ITEMS:
        subject = item["captions"][0].removeprefix("an animated emoji of ").removeprefix("a 3D emoji of ")
        splits[subject].add(item["split"])
    assert [subject for subject, both in splits.items() if len(both) > 1] == []
    share = sum(item["split"] == "eval" for item in ITEMS) / len(ITEMS)
    assert 0.05 < share < 0.15


def test_the_media_stay_small() -> None:
    assert sum(path.stat().st_size for path in (GALLERY / "media").rglob("*") if path.is_file()) < LARGEST_TOTAL
