"""A gallery: one directory with the LanceDB table of record, `manifest.json`, and what is derived from them.

The table may lie elsewhere, see `index.place`; everything else is in the directory.

    gallery = cots.open_gallery("my-gallery")
    result = gallery.search("a red truck", k=10)

The table `vectors` has one row a vector. An image is one row; a video is a pooled row and one row a moment. Rows of one
thing share `item`, which is the id of its first row. Whoever writes holds the gallery's lock; whoever reads needs no
permission to write.
"""

import mimetypes
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import numpy as np
import pyarrow as pa

from cots.data.shards import read_media, split_member
from cots.errors import GalleryError
from index.checksum import checksum
from index.filters import as_one, bad_filter
from index.lock import LOCK, writing
from index.manifest import Manifest
from index.place import OWNER, TABLE, TablePlace, folder_mark, identity_of, owner_of
from index.snapshot import COLUMNS, Snapshot, load_snapshot

if TYPE_CHECKING:
    from lancedb.table import Table

    from cots.model.retrieval_model import RetrievalModel
    from index.search import Searcher, SearchResult

READ_ROWS = 65_536  # at a time; of LanceDB's own 1,024, a million rows take half a second to pass through Python
VERSIONS = "_versions"  # of a Lance table in a folder
_LAST_VERSION = 2**64 - 1
T = TypeVar("T")


def schema(dimension: int) -> pa.Schema:
    """The table's columns. Texts are never null; numbers are where they have no meaning."""
    return pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("item", pa.int64(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("moment", pa.bool_(), nullable=False),
            pa.field("path", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("caption", pa.string(), nullable=False),
            pa.field("captions", pa.list_(pa.string()), nullable=False),
            pa.field("licence", pa.string(), nullable=False),
            pa.field("start", pa.float64()),
            pa.field("end", pa.float64()),
            pa.field("frame_time", pa.float64()),
            pa.field("content_hash", pa.string(), nullable=False),
            pa.field("size", pa.int64(), nullable=False),
            pa.field("mtime", pa.float64(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("duration", pa.float64()),
            pa.field("vector", pa.list_(pa.float16(), dimension), nullable=False),
        ]
    )


def open_gallery(directory: str | Path) -> "Gallery":
    """Open a gallery for reading.

    Raises:
        GalleryError: there is none, it is damaged, or a newer version of COTS wrote it.
    """
    directory = Path(directory).expanduser().absolute()
    gallery = Gallery(directory, Manifest.read(directory))
    folder = gallery.place.folder
    if folder is not None and not folder.is_dir():
        raise gallery._table_lost()
    return gallery


def create_gallery(directory: str | Path, model: "RetrievalModel", table: str | Path | None = None) -> "Gallery":
    """Open the gallery of this model in a directory for writing, and make an empty one where there is none.

    The caller holds the lock, if the table may lie elsewhere.

    Args:
        directory: the gallery's.
        model: must be the one that built the gallery.
        table: the folder or the address that is to hold the table; None for what the gallery has, at first its folder.

    Raises:
        GalleryError: it was built by another model, its table lies elsewhere or is not its own, or the directory holds
            vectors of unknown origin.
    """
    directory = Path(directory).expanduser().absolute()
    place = None if table is None else TablePlace.parse(table)
    if (directory / "manifest.json").is_file():
        gallery = open_gallery(directory)
        if place is not None and not place.is_that_of(gallery.place):
            raise GalleryError(
                f"The table of the gallery {directory} lies at {gallery.place.address}, not at {place.address}; "
                "leave --table out, or build another gallery there."
            )
        gallery.require(model)
        gallery.require_own_table()
        return gallery
    directory.mkdir(parents=True, exist_ok=True)
    # The manifest comes after the table, so that what opens has one, and before the first row, whose meaning it is.
    if place is None or place.is_that_of(TablePlace(str(directory))):
        manifest = _with_table_inside(directory, model)
    else:
        manifest = _with_table_elsewhere(directory, model, place)
    manifest.write(directory)
    return Gallery(directory, manifest)


def _with_table_inside(directory: Path, model: "RetrievalModel") -> Manifest:
    place = TablePlace(str(directory))
    table = place.open()
    if table is None:  # an empty one, which a creation that was killed has left, is false
        table = place.create(schema(model.dimension))
    assert table is not None  # because the caller holds the lock
    _require_empty(table, place)
    return Manifest.for_model(model.name, model.fingerprint, model.dimension)


def _with_table_elsewhere(directory: Path, model: "RetrievalModel", place: TablePlace) -> Manifest:
    """Make a table that is marked as this gallery's; one that is there is taken only if it bears the mark already."""
    mark = folder_mark(directory / LOCK)
    table = place.create(schema(model.dimension), identity=uuid4().hex, owner=mark)
    if table is None:
        table = place.open()
    if table is None or owner_of(table) != mark:
        raise GalleryError(
            f"There is a table at {place.address} already, which another gallery made; "
            "use its gallery, or name a place of its own for this one."
        )
    _require_empty(table, place)
    return Manifest.for_model(model.name, model.fingerprint, model.dimension, place.address, identity_of(table))


def _require_empty(table: "Table", place: TablePlace) -> None:
    with place.faults_told():
        rows = table.count_rows()
    if rows:
        raise GalleryError(
            f"{place.address} holds vectors but no manifest.json to say what made them; use a new directory."
        )


class Gallery:
    """An open gallery.

    Attributes:
        directory: where it lies, absolute.
        manifest: the model that made it, and how vectors are kept.
        place: where its table lies.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.place = TablePlace(manifest.table or str(directory))
        self._roots = tuple({f"{root}/" for root in (directory, directory.resolve())})
        self._searcher: Searcher | None = None

    @cached_property
    def table(self) -> "Table":
        """The LanceDB table of record. Its first use imports LanceDB.

        Raises:
            GalleryError: it is lost, another lies in its place, or its store cannot be reached.
        """
        table = self.place.open()
        if table is None or identity_of(table) != self.manifest.table_identity:
            raise self._table_lost()
        return table

    def _table_lost(self) -> GalleryError:
        return GalleryError(
            f"The gallery {self.directory} has lost its table {TABLE}.lance at {self.place.address}; put it back "
            "there if it was moved, or build a new gallery elsewhere."
        )

    def require_own_table(self) -> None:
        """Refuse to write to a table that lies elsewhere unless this folder made it, and not one that it is a copy of.

        Two copies of a folder have two locks, so that both could write at once and give the same ids. The caller holds
        the lock.

        Raises:
            GalleryError: another folder writes to it; or see `table`.
        """
        if not self.manifest.table:
            return
        with self.place.faults_told():
            self.table.checkout_latest()
        if identity_of(self.table) != self.manifest.table_identity:
            raise self._table_lost()
        if owner_of(self.table) != folder_mark(self.directory / LOCK):
            raise GalleryError(
                f"The table at {self.place.address} is written to by another copy of the gallery {self.directory}; use "
                f"that one, or, if nobody does any more: cots index adopt --gallery {self.directory}"
            )

    @property
    def version(self) -> int:
        """The latest version of the table.

        In a folder it comes from the names of version files, which Lance counts down from 2^64 - 1, without LanceDB.

        Raises:
            GalleryError: the table's store cannot be reached.
        """
        folder = self.place.folder
        if folder is None:
            with self.place.faults_told():
                self.table.checkout_latest()
                return self.table.version
        names = (path.stem for path in (folder / VERSIONS).glob("*.manifest"))
        return max((_LAST_VERSION - int(name) for name in names if name.isdecimal()), default=0)

    def version_mark(self, version: int) -> str:
        """What tells a version from the one of the same number in another history: a table that was put back from a
        copy gives numbers again. Empty where the table lies in a store, or of a version that is gone."""
        folder = self.place.folder
        with suppress(OSError):
            if folder is not None:
                return checksum((folder / VERSIONS / f"{_LAST_VERSION - version}.manifest").read_bytes())
        return ""

    @cached_property
    def snapshot(self) -> Snapshot:
        """The table as it is when first asked for, laid out for search. To see a newer one, open the gallery again."""
        return load_snapshot(self.directory, self.version, self.version_mark, self.read_rows)

    def read_rows(self) -> tuple[pa.Table, int]:
        """The rows of the table's latest version as a snapshot has them, and that version.

        They have its `COLUMNS` and are sorted by (item, id).
        """

        def read(table: "Table") -> tuple[pa.Table, int]:
            version = table.version  # read first: if another thread moves the table on, no old rows pass for new ones
            return table.search().select(list(COLUMNS)).to_batches(READ_ROWS).read_all(), version

        rows, version = self.read_latest(read)
        return rows.sort_by([("item", "ascending"), ("id", "ascending")]).combine_chunks(), version

    def read_latest(self, read: "Callable[[Table], T]") -> T:
        """What `read` gives of the table's latest version; again of a newer one if a compaction removed that meanwhile.

        Raises:
            ValueError, RuntimeError, OSError: the reading failed though the version is there.
            GalleryError: the table's store cannot be reached.
        """
        with self.place.faults_told():
            while True:
                self.table.checkout_latest()
                version = self.table.version
                try:
                    return read(self.table)
                except (ValueError, RuntimeError, OSError):
                    if self.version == version:
                        raise

    def require(self, model: "RetrievalModel") -> None:
        """Refuse a model whose vectors cannot be compared with this gallery's.

        Raises:
            GalleryError: the fingerprints differ; both models are named.
        """
        self.manifest.require(model.name, model.fingerprint, self.directory)

    def ids(self, where: str) -> np.ndarray:
        """Ids of the rows for which an SQL condition holds, as (M,) int64.

        Raises:
            GalleryError: the condition cannot be parsed or names an unknown column; the message lists those that exist.
        """
        try:
            whole = as_one(where)
            found = self.read_latest(
                lambda table: table.search().where(whole).select(["id"]).to_batches(READ_ROWS).read_all()
            )
        except (ValueError, RuntimeError) as error:
            raise bad_filter(where, error, self.table.schema.names) from error
        return found["id"].to_numpy()

    def remove_items(self, items: Iterable[int]) -> None:
        """Delete all rows of some items, in one commit. The caller holds the lock.

        Raises:
            GalleryError: see `require_own_table`.
        """
        listed = ", ".join(str(int(item)) for item in items)
        if listed:
            self.require_own_table()
            self.table.delete(f"item IN ({listed})")

    def stored_path(self, path: str) -> str:
        """How the table names a file: relative if it lies in the gallery's directory, so that the two move together."""
        for root in self._roots:
            if path.startswith(root):
                return path.removeprefix(root)
        return path

    def absolute_path(self, stored: str) -> str:
        """Where a file that the table names lies."""
        return os.path.join(self.directory, stored)

    def media(self, id: int) -> tuple[str | bytes, str]:
        """The image or video of a row: its path, or its bytes if it lies in a .tar shard; and its MIME type.

        Raises:
            GalleryError: there is no such row.
            MediaError: the shard or its member is gone.
        """
        row = self.row(id)
        path = self.absolute_path(row["path"])
        mime = mimetypes.guess_type(path, strict=False)[0] or f"{row['kind']}/*"
        return (read_media(path) if split_member(path)[1] else path), mime

    def row(self, id: int) -> dict[str, Any]:
        """All that the snapshot knows of a row, but its vector.

        Raises:
            GalleryError: there is no such row.
        """
        position = self.snapshot.positions(np.array([id]))
        if not len(position):
            raise GalleryError(f"The gallery {self.directory} has no row {id}; take an id from a search result.")
        return self.snapshot.row(int(position[0]))

    def search(self, text: str | None = None, *, model: "RetrievalModel | None" = None, **query: Any) -> "SearchResult":
        """Search by text, picture or both; see `Searcher.search` for what can be asked.

        The model is by default the one that built the gallery, loaded at the first search and kept.

        Raises:
            GalleryError: the model is another than the gallery's, or the query cannot be answered.
        """
        from index.search import Searcher

        if self._searcher is None or (model is not None and model is not self._searcher.model):
            if model is None:
                from cots.model.pretrained import load_model

                model = load_model(self.manifest.model)
            self._searcher = Searcher(self, model)
        return self._searcher.search(text, **query)


def adopt_table(directory: str | Path) -> str:
    """Let this copy of a gallery write to the table that another copy of it wrote to, which may not afterwards.

    Returns:
        the address of the table.

    Raises:
        GalleryError: there is no gallery, another process is changing it, its table lies in its own folder, or the
            table's store cannot be reached.
    """
    open_gallery(directory)
    with writing(directory) as folder:
        gallery = open_gallery(folder)
        if not gallery.manifest.table:
            raise GalleryError(f"The table of the gallery {folder} lies in its own folder, which may write to it.")
        gallery.table.update_field_metadata({"path": "id", "metadata": {OWNER: folder_mark(folder / LOCK)}})
    return gallery.place.address
