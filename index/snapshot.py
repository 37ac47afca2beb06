"""A snapshot: one version of the table, laid out for search and mapped into memory.

Reading it needs neither LanceDB, whose import takes seconds, nor a copy of the vectors. It is derived: the file
`snapshot-VERSION-CHECKSUM.arrow` holds what the table held at that version, and is written again from the table when it
is missing, of another version or damaged.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index.checksum import checksum, scratch_name

FOLDER = "search"
MARK = b"version-mark"  # in the metadata of the file
SPARSE = 8  # ids that were given out for each that is in use, from which on positions are searched and not looked up
COLUMNS = (
    "id", "item", "kind", "moment", "path", "source", "caption", "licence",
    "start", "end", "frame_time", "width", "height", "duration", "vector",
)  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """N rows of one table version, sorted by (item, id); an item's pooled row comes before its moments.

    Attributes:
        version: the table's version.
        rows: the columns `COLUMNS`, for reading hits.
        ids: (N,) int64, unique.
        items: (N,) int64, ascending.
        moments: (N,) bool, False for an image's row and for a video's pooled row.
        videos: (N,) bool.
        vectors: (N, D) float16.
    """

    version: int
    rows: pa.Table
    ids: np.ndarray
    items: np.ndarray
    moments: np.ndarray
    videos: np.ndarray
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, rows: pa.Table, version: int) -> "Snapshot":
        """Lay out a table that has the columns `COLUMNS` and is sorted by (item, id)."""
        vectors = _whole(rows["vector"])
        return cls(
            version=version,
            rows=rows,
            ids=_numbers(rows["id"]),
            items=_numbers(rows["item"]),
            moments=_flags(rows["moment"]),
            videos=_flags(pc.match_substring(rows["kind"], "video")),
            vectors=np.from_dlpack(vectors.flatten()).reshape(len(rows), vectors.type.list_size),
        )

    @cached_property
    def _columns(self) -> dict[str, pa.Array]:
        return {name: _whole(self.rows[name]) for name in COLUMNS if name != "vector"}

    @cached_property
    def _by_id(self) -> np.ndarray:
        return np.argsort(self.ids)

    @cached_property
    def _places(self) -> np.ndarray | None:
        """(greatest id + 1,) the position of each id, -1 for an id that no row has; None if that takes much memory."""
        if not len(self) or self.ids.max() >= SPARSE * len(self):
            return None
        places = np.full(self.ids.max() + 1, -1)
        places[self.ids] = np.arange(len(self))
        return places

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """(M,) ids -> the positions of those that the snapshot holds, in the order of `ids`."""
        found = self.find(ids)
        return found[found >= 0]

    def find(self, ids: np.ndarray) -> np.ndarray:
        """(M,) ids -> their positions (M,), -1 for an id that the snapshot does not hold."""
        if not len(self):
            return np.full(len(ids), -1)
        if self._places is not None:
            known = (ids >= 0) & (ids < len(self._places))
            return np.where(known, self._places[np.where(known, ids, 0)], -1)
        found = np.searchsorted(self.ids, ids, sorter=self._by_id)
        found = self._by_id[np.minimum(found, len(self) - 1)]
        return np.where(self.ids[found] == ids, found, -1)

    def row(self, position: int) -> dict[str, Any]:
        """The row at a position, without its vector."""
        return {name: column[position].as_py() for name, column in self._columns.items()}

    def rows_of(self, item: int) -> slice:
        """The positions of an item's rows."""
        first, behind = np.searchsorted(self.items, [item, item + 1])
        return slice(int(first), int(behind))


def load_snapshot(
    gallery: Path, version: int, mark_of: Callable[[int], str], read_rows: Callable[[], tuple[pa.Table, int]]
) -> Snapshot:
    """Map the snapshot of this version of the table; without a sound one, read the rows from the table and write it.

    Args:
        gallery: directory of the gallery.
        version: the table's version.
        mark_of: of a version, what tells it from the one of the same number in another history; "" if nothing does.
        read_rows: reads the columns `COLUMNS` of the latest version, which may be a newer one if somebody writes,
            sorted by (item, id), and that version.
    """
    for path in (gallery / FOLDER).glob(f"snapshot-{version}-*.arrow"):
        with suppress(OSError, pa.ArrowInvalid):  # removed meanwhile by who wrote a newer one; or an empty file
            content = _map(path)
            if checksum(content) == path.stem.rpartition("-")[2]:
                rows = pa.ipc.open_file(content).read_all()
                if _marked(rows) in ("", mark_of(version)):
                    return Snapshot.of(rows, version)
    rows, version = read_rows()
    with suppress(OSError):  # a read-only place or a full disk costs only the time of the next opening
        _write(gallery / FOLDER, version, rows.replace_schema_metadata({MARK: mark_of(version)}))
    return Snapshot.of(rows, version)


def _marked(rows: pa.Table) -> str:
    """The mark of the version that a snapshot holds; those of a store, and those written before, have none."""
    return (rows.schema.metadata or {}).get(MARK, b"").decode()


def _write(folder: Path, version: int, rows: pa.Table) -> None:
    """Write the snapshot of a version, whole or not at all, and remove those of older versions."""
    folder.mkdir(exist_ok=True)
    scratch = folder / scratch_name("snapshot")
    try:
        with pa.OSFile(str(scratch), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
            writer.write_table(rows)
        target = folder / f"snapshot-{version}-{checksum(_map(scratch))}.arrow"
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
    for path in folder.glob("snapshot-*.arrow"):
        older = int(path.stem.split("-")[1]) <= version
        if older and path != target:
            path.unlink(missing_ok=True)


def _map(path: Path) -> pa.Buffer:
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers without a copy. (Arrow imports pandas, if installed, for `to_numpy` and `equal`.)"""
    return np.from_dlpack(_whole(column))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece, as a snapshot is written; `combine_chunks` would copy even that out of the file."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _flags(column: pa.ChunkedArray) -> np.ndarray:
    return _numbers(column.cast(pa.uint8())).view(bool)
