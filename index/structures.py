"""Search structures on disk: written whole, verified when read, and matched row by row with the table as it is.

A structure's vectors are known by id and a hash of the vector. So one that is older than the table is of use: rows that
it holds and the table does not are not found, rows that it lacks are compared one by one, and it is right at once.
"""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cots.errors import GalleryError
from index.ann import AnnIndex, Effort, installed_faiss
from index.checksum import checksum, scratch_name
from index.manifest import StructureRecord
from index.memory import available_memory
from index.snapshot import FOLDER, Snapshot

STALE_SHARE = 0.2
BLOCK = 65_536


class UnusableStructure(Exception):
    """A structure that must not be served: lost, damaged, or too far from the table. The message says which."""


def write_structure(gallery: Path, structure: Any, kind: str, snapshot: Snapshot) -> tuple[str, str]:
    """Write a FAISS index over all rows of a snapshot. Older structures stay until `remove_structures`.

    Returns:
        the names of its file and of the file of its rows.

    Raises:
        GalleryError: the disk is full or read-only.
    """
    folder = gallery / FOLDER
    scratch, rows_scratch = folder / scratch_name(kind), folder / scratch_name("rows")
    try:
        folder.mkdir(exist_ok=True)
        installed_faiss().write_index(structure, str(scratch))
        with rows_scratch.open("wb") as file:
            np.save(file, np.stack([snapshot.ids.view(np.uint64), row_hashes(snapshot.vectors)]))
        return (
            _name(scratch, f"{kind}-{snapshot.version}", ".faiss"),
            _name(rows_scratch, f"rows-{snapshot.version}", ".npy"),
        )
    except (OSError, RuntimeError) as error:
        raise GalleryError(
            f"The search structure of the gallery {gallery} cannot be written "
            f"({_reason(error)}); make room, or use --engine exact."
        ) from error
    finally:
        scratch.unlink(missing_ok=True)
        rows_scratch.unlink(missing_ok=True)


def _reason(error: OSError | RuntimeError) -> str:
    """What the system said, which FAISS puts behind its own source lines, the last in parentheses or after a colon."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    first = str(error).splitlines()[0]
    said = re.search(r"\(([A-Z][a-z -]+)\)\W*$|: ([A-Z][a-z -]+)$", first)
    return (said[1] or said[2]).lower() if said else first[-200:]


def _name(scratch: Path, name: str, suffix: str) -> str:
    """Give a complete file its name, which ends in its checksum."""
    with scratch.open("rb+") as file:
        os.fsync(file.fileno())
    target = scratch.with_name(f"{name}-{_checksum_of(scratch)}{suffix}")
    scratch.replace(target)
    return target.name


def remove_structures(gallery: Path, keep: StructureRecord | None) -> None:
    """Remove the files of all structures but one. Who has one mapped keeps it."""
    kept = (keep.file, keep.rows_file) if keep else ()
    for pattern in ("*.faiss", "rows-*.npy"):
        for path in (gallery / FOLDER).glob(pattern):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def read_structure(gallery: Path, record: StructureRecord, snapshot: Snapshot, mapped: bool | None = None) -> AnnIndex:
    """Verify a structure and make it answer for a snapshot.

    Args:
        gallery: directory of the gallery.
        record: the manifest's.
        snapshot: of the table as it is, perhaps newer or older than the structure.
        mapped: leave the structure in its file, from which pages are read as they are needed; by default if it would
            take more than half of the available memory.

    Raises:
        UnusableStructure: it is lost, damaged, replaced meanwhile, or more than a fifth of its rows or of the
            snapshot's do not match.
        MissingDependency: FAISS is not installed.
    """
    faiss = installed_faiss()
    path, rows_path = gallery / FOLDER / record.file, gallery / FOLDER / record.rows_file
    try:
        for file in (path, rows_path):
            if not file.is_file():
                raise UnusableStructure(f"{file.name} is missing")
            if _checksum_of(file) != file.stem.rpartition("-")[2]:
                raise UnusableStructure(f"{file.name} is damaged")
        rows = _match(np.load(rows_path), snapshot)
        if mapped is None:
            mapped = path.stat().st_size > available_memory() / 2
        structure = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except (OSError, RuntimeError) as error:  # such as FAISS's, if the file is replaced meanwhile
        raise UnusableStructure(f"{record.file} cannot be read") from error
    identity = len(rows) == len(snapshot) and np.array_equal(rows, np.arange(len(rows)))
    effort = Effort(record.breadth, record.proposals)
    return AnnIndex(structure, record.kind, effort, snapshot.vectors, snapshot.ids, None if identity else rows)


def _match(known: np.ndarray, snapshot: Snapshot) -> np.ndarray:
    """(S,) position in the snapshot of each of a structure's rows, (2, S) ids and hashes; -1 if gone or changed."""
    ids, hashes = known[0].view(np.int64), known[1]
    rows = snapshot.find(ids)
    same = rows >= 0
    same[same] = row_hashes(snapshot.vectors)[rows[same]] == hashes[same]
    alive = int(same.sum())
    if alive < (1 - STALE_SHARE) * max(len(ids), len(snapshot)):
        raise UnusableStructure(f"of its {len(ids)} vectors {alive} are among the {len(snapshot)} of the table")
    return np.where(same, rows, -1)


def row_hashes(vectors: np.ndarray) -> np.ndarray:
    """A hash of each vector: (N, D) float16 -> (N,) uint64."""
    words = -(-vectors.shape[1] // 4)
    factors = np.random.default_rng(7).integers(0, 2**63, words, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    hashes = np.empty(len(vectors), np.uint64)
    for start in range(0, len(vectors), BLOCK):
        block = np.zeros((len(vectors[start : start + BLOCK]), 4 * words), np.float16)
        block[:, : vectors.shape[1]] = vectors[start : start + BLOCK]
        mixed = block.view(np.uint64)
        mixed ^= mixed >> np.uint64(29)
        hashes[start : start + BLOCK] = (mixed * factors).sum(axis=1, dtype=np.uint64)
    return hashes


def _checksum_of(path: Path) -> str:
    with suppress(ValueError):  # an empty file cannot be mapped
        return checksum(np.memmap(path, np.uint8, "r"))
    return checksum(b"")
