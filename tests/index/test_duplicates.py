"""Duplicates: the same bytes, and pairs above a threshold, as a loop over all pairs finds them."""

import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cots.errors import GalleryError
from cots.model.retrieval_model import RetrievalModel
from index import duplicates
from index.build import build
from index.duplicates import Group, find_duplicates
from index.gallery import Gallery, open_gallery


def names(groups: tuple[Group, ...]) -> set[frozenset[str]]:
    return {frozenset(Path(copy.path).name for copy in group.copies) for group in groups}


def linked(gallery: Gallery, threshold: float) -> set[frozenset[str]]:
    """Grow groups from all pairs of different contents of one kind, one pair at a time."""
    rows = [row for row in gallery.table.to_arrow().to_pylist() if not row["moment"]]
    first: dict[str, dict] = {}
    for row in sorted(rows, key=lambda row: row["id"]):
        first.setdefault(row["content_hash"], row)
    groups: list[set[str]] = []
    for one, other in combinations(first.values(), 2):
        left, right = np.array(one["vector"], np.float64), np.array(other["vector"], np.float64)
        cosine = left @ right / np.linalg.norm(left) / np.linalg.norm(right)
        if one["kind"] == other["kind"] and cosine >= threshold:
            pair = {Path(row["path"]).name for row in (one, other)}
            touched = [group for group in groups if group & pair]
            groups = [group for group in groups if not group & pair] + [pair.union(*touched)]
    return {frozenset(group) for group in groups}


@pytest.fixture
def doubled(photos: Path, gallery: Gallery, tiny_model: RetrievalModel) -> Gallery:
    """Two copies of a picture, one of a clip, and pictures saved anew in another format."""
    for name in ("copy.png", "clips/copy.png"):
        shutil.copy(photos / "00.png", photos / name)
    shutil.copy(photos / "clips" / "0.gif", photos / "copy.gif")
    for number in range(1, 12):
        with Image.open(photos / f"{number:02}.png") as picture:
            picture.save(photos / f"{number:02}.bmp")
    build([photos], gallery.directory, tiny_model)
    return open_gallery(gallery.directory)


def test_equal_files_are_grouped_whatever_their_names(doubled: Gallery) -> None:
    found = find_duplicates(doubled.directory, 0.9999)
    assert names(found.exact) == {frozenset({"00.png", "copy.png"}), frozenset({"0.gif", "copy.gif"})}
    assert sorted(len(group.copies) for group in found.exact) == [2, 3]
    assert all(list(group.copies) == sorted(group.copies, key=lambda copy: copy.id) for group in found.exact)
    assert names(found.near) == {frozenset({f"{number:02}.png", f"{number:02}.bmp"}) for number in range(1, 12)}
    assert found.near[0].similarity == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97, 0.99, 1.0])
@pytest.mark.parametrize("exhaustive", [10**6, 0], ids=["all pairs", "nearest"])
def test_near_duplicates_are_those_of_all_pairs(
    doubled: Gallery, threshold: float, exhaustive: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "EXHAUSTIVE_ITEMS", exhaustive)
    monkeypatch.setattr(duplicates, "BLOCK", 5)
    found = find_duplicates(doubled.directory, threshold)
    assert names(found.near) == linked(doubled, threshold - 1e-6)
    assert all(group.similarity >= threshold - 1e-4 for group in found.near)


@pytest.mark.parametrize("threshold", [0, -1, 1.01, float("nan")])
def test_a_threshold_out_of_range_is_refused(gallery: Gallery, threshold: float) -> None:
    with pytest.raises(GalleryError, match="give a cosine above 0 and at most 1"):
        find_duplicates(gallery.directory, threshold)
