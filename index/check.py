"""Check a gallery: that table, manifest and media agree."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cots.data.shards import split_member
from index.gallery import Gallery, open_gallery, schema
from index.snapshot import FOLDER, Snapshot

if TYPE_CHECKING:
    from cots.model.retrieval_model import RetrievalModel

NORM_TOLERANCE = 5e-3  # float16 keeps a component to 5e-4 of itself
BLOCK = 65_536


def check(gallery_dir: str | Path, model: "RetrievalModel | None" = None) -> list[str]:
    """Look for all that could make a search wrong.

    Args:
        gallery_dir: the gallery.
        model: if given, must be the one that built it.

    Returns:
        A sentence for each problem; none if all is well.

    Raises:
        GalleryError: there is no gallery, or it cannot be read at all.
    """
    gallery = open_gallery(gallery_dir)
    problems = []
    built_by = gallery.manifest.fingerprint
    if model is not None and model.fingerprint != built_by:
        problems.append(
            f"The model {model.name} ({model.fingerprint[:8]}) did not build the gallery ({built_by[:8]} did)."
        )
    wanted, found = set(schema(gallery.manifest.dimension)), set(gallery.read_latest(lambda table: table.schema))
    if found != wanted:
        names = sorted({column.name for column in found ^ wanted})
        return [*problems, f"The table's columns are not those that the manifest implies: {', '.join(names)}."]
    table = Snapshot.of(*gallery.read_rows())
    problems += _check_rows(table) + _check_vectors(table) + _check_snapshot(gallery, table)
    return problems + _check_media(gallery, table)


def _check_rows(snapshot: Snapshot) -> list[str]:
    problems = []
    doubled = len(snapshot) - len(np.unique(snapshot.ids))
    if doubled:
        problems.append(f"{doubled} rows have an id that another row has.")
    pooled = snapshot.items[~snapshot.moments]
    if len(np.unique(pooled)) != len(pooled) or not np.array_equal(np.unique(snapshot.items), np.unique(pooled)):
        problems.append("Some items have no pooled row, or several.")
    if not np.array_equal(snapshot.ids[~snapshot.moments], pooled):
        problems.append("Some items' ids are not those of their pooled rows.")
    paths = snapshot.rows.filter(~snapshot.moments)["path"]
    if len(paths.unique()) != len(paths):
        problems.append(f"{len(paths) - len(paths.unique())} items have a path that another item has.")
    return problems


def _check_vectors(snapshot: Snapshot) -> list[str]:
    wrong: list[int] = []
    for start in range(0, len(snapshot), BLOCK):
        norms = np.linalg.norm(snapshot.vectors[start : start + BLOCK].astype(np.float32), axis=1)
        sound = np.abs(norms - 1) < NORM_TOLERANCE  # False for NaN
        wrong += snapshot.ids[start : start + BLOCK][~sound].tolist()
    if not wrong:
        return []
    return [f"{len(wrong)} vectors are not finite or not of unit norm (ids {_some(wrong)})."]


def _check_snapshot(gallery: Gallery, table: Snapshot) -> list[str]:
    if gallery.snapshot.rows.equals(table.rows):
        return []
    return [
        f"The table at {gallery.place.address} is not what it was when the snapshot of its version was made: it is "
        "damaged, or was put back from a copy. Restore the table; only if it is known to be right, delete the snapshot "
        f"in {gallery.directory / FOLDER}, which is made again."
    ]


def _check_media(gallery: Gallery, snapshot: Snapshot) -> list[str]:
    paths = snapshot.rows.filter(~snapshot.moments)["path"].to_pylist()
    gone = [path for path in paths if not _exists(gallery.absolute_path(path))]
    return [f"{len(gone)} files are gone: {_some(gone)}."] if gone else []


def _exists(path: str) -> bool:
    return os.path.exists(path) or os.path.exists(split_member(path)[0])


def _some(values: list) -> str:
    return ", ".join(str(value) for value in values[:5]) + (", ..." if len(values) > 5 else "")
