"""Files that a gallery holds more than once: with the same bytes, or with nearly the same vector."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cots.errors import GalleryError
from index.engine import open_engine
from index.gallery import Gallery, open_gallery
from index.snapshot import Snapshot

THRESHOLD = 0.95
BLOCK = 4096
EXHAUSTIVE_ITEMS = (
    200_000  # all pairs of these take two cores a few minutes; of more items only the nearest are compared
)
NEIGHBOURS = 32
COSINE_ERROR = 1e-6  # of float32, so that a threshold of 1 finds equal vectors


@dataclass(frozen=True)
class Copy:
    """One item of a group: the id of its row, and its file as `Hit.path` names it."""

    id: int
    path: str


@dataclass(frozen=True)
class Group:
    """Items that show the same.

    Attributes:
        similarity: the smallest cosine between an item and that other of the group to which it is nearest; 1 for equal
            bytes.
        copies: by id, so that the one which came first is first.
    """

    similarity: float
    copies: tuple[Copy, ...]


@dataclass(frozen=True)
class Duplicates:
    """What is held more than once.

    Attributes:
        exact: groups of equal bytes.
        near: groups of at least two different contents that are linked by similar vectors; of equal files the first
            stands for all.
        threshold: the least cosine that links two items.
    """

    exact: tuple[Group, ...]
    near: tuple[Group, ...]
    threshold: float

    def to_json(self) -> dict[str, Any]:
        """The document that `cots index duplicates --json` prints."""
        return asdict(self)


def find_duplicates(gallery_dir: str | Path, threshold: float = THRESHOLD) -> Duplicates:
    """Group the items that are the same or nearly so. Videos are compared by their pooled vectors, with videos only.

    All pairs are compared up to 200,000 different contents; of more, each is compared with its 32 nearest, as the
    gallery's engine finds them.

    Args:
        gallery_dir: the gallery.
        threshold: cosine above 0 and at most 1.

    Raises:
        GalleryError: there is no gallery, or the threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise GalleryError(f"The threshold is {threshold:g}; give a cosine above 0 and at most 1, such as {THRESHOLD}.")
    gallery = open_gallery(gallery_dir)
    snapshot = gallery.snapshot
    contents = _contents(gallery, snapshot)
    exact = [group for group in contents if len(group) > 1]
    first = np.array([group[0] for group in contents], dtype=np.int64)
    near = []
    for videos in (False, True):
        rows = first[snapshot.videos[first] == videos]
        near += _linked(gallery, snapshot, rows, threshold)
    return Duplicates(
        tuple(Group(1.0, _copies(gallery, snapshot, group)) for group in exact),
        tuple(Group(similarity, _copies(gallery, snapshot, group)) for similarity, group in near),
        threshold,
    )


def _contents(gallery: Gallery, snapshot: Snapshot) -> list[list[int]]:
    """Positions of the pooled rows, grouped by the bytes of their files; groups and their members by id."""
    found = gallery.read_latest(
        lambda table: table.search().where("moment = false").select(["id", "content_hash"]).to_arrow()
    )
    positions = snapshot.find(found["id"].to_numpy())
    groups: dict[str, list[int]] = {}
    for position, digest in sorted(zip(positions.tolist(), found["content_hash"].to_pylist())):
        if position >= 0:  # else it was added after the snapshot
            groups.setdefault(digest, []).append(position)
    return list(groups.values())


def _linked(gallery: Gallery, snapshot: Snapshot, rows: np.ndarray, threshold: float) -> list[tuple[float, list[int]]]:
    """Connected groups of two or more of the rows, with each group's similarity, the most similar first."""
    pairs_of = _all_pairs if len(rows) <= EXHAUSTIVE_ITEMS else _nearest_pairs
    leader = np.arange(len(rows))
    nearest = np.zeros(len(rows), np.float32)

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    for left, right, cosines in pairs_of(gallery, snapshot, rows, threshold):
        np.maximum.at(nearest, left, cosines)
        np.maximum.at(nearest, right, cosines)
        for one, other in zip(left.tolist(), right.tolist()):
            one, other = find(one), find(other)
            leader[max(one, other)] = min(one, other)
    groups: dict[int, list[int]] = {}
    for row in np.flatnonzero(nearest).tolist():
        groups.setdefault(find(row), []).append(row)
    found = [(min(float(nearest[group].min()), 1.0), rows[group].tolist()) for group in groups.values()]
    return sorted(found, key=lambda pair: (-pair[0], pair[1]))


_Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


def _all_pairs(gallery: Gallery, snapshot: Snapshot, rows: np.ndarray, threshold: float) -> Iterator[_Pairs]:
    """Every pair at or above the threshold once, some at a time, as places in `rows` and cosines."""
    vectors = snapshot.vectors[rows].astype(np.float32)
    with np.errstate(invalid="ignore"):  # a damaged vector becomes NaN, which is like no other
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)  # half precision has moved the norms a little
    for start in range(0, len(rows), BLOCK):
        block = vectors[start : start + BLOCK]
        for other in range(start, len(rows), BLOCK):
            cosines = block @ vectors[other : other + BLOCK].T
            left, right = np.nonzero(cosines >= threshold - COSINE_ERROR)
            kept = left + start < right + other
            left, right = left[kept], right[kept]
            yield left + start, right + other, cosines[left, right]


def _nearest_pairs(gallery: Gallery, snapshot: Snapshot, rows: np.ndarray, threshold: float) -> Iterator[_Pairs]:
    """As `_all_pairs`, but of each row only the nearest are looked at."""
    index = open_engine(gallery)
    allowed = np.zeros(len(snapshot), bool)
    allowed[rows] = True
    starts = range(0, len(rows), BLOCK)
    vectors = (snapshot.vectors[rows[start : start + BLOCK]].astype(np.float32) for start in starts)
    norms = np.concatenate([np.linalg.norm(block, axis=1) for block in vectors])
    for start in starts:
        queries = snapshot.vectors[rows[start : start + BLOCK]].astype(np.float32)
        products, ids = index.search(queries, NEIGHBOURS, allowed)
        places = np.searchsorted(rows, snapshot.positions(ids.ravel())).reshape(ids.shape)
        cosines = products / (norms[start : start + BLOCK, None] * norms[places])  # as in `_all_pairs`
        left, column = np.nonzero(cosines >= threshold - COSINE_ERROR)
        right = places[left, column]
        kept = left + start != right
        yield left[kept] + start, right[kept], cosines[left, column][kept]


def _copies(gallery: Gallery, snapshot: Snapshot, positions: list[int]) -> tuple[Copy, ...]:
    rows = (snapshot.row(position) for position in positions)
    return tuple(Copy(row["id"], gallery.absolute_path(row["path"])) for row in rows)
