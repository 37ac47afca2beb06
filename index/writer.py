"""Writes a build's results into the table, some seconds' worth at a time, each in one atomic commit.

A killed build loses what had not been committed and nothing else. An item's rows travel in one commit. A changed item's
new rows replace the old in one commit as well (a merge on `id` that also deletes the item's leftover rows), so there is
no moment at which they are absent or double.

The store of a table that lies elsewhere may fail between taking a commit and saying so. Rows are then written again by
their ids, so that each is there once.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cots.data.samples import Sample
from cots.embed import Embedded
from cots.errors import GalleryError
from index.gallery import Gallery, schema
from index.place import is_outage

COMMIT_ROWS = 16_384
COMMIT_SECONDS = 10.0
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before a commit is tried again after a store did not answer
log = logging.getLogger("cots")


class TableWriter:
    """Collects rows and commits them.

    Args:
        gallery: whose lock the caller holds.
        next_id: the first id that no row has had.
    """

    def __init__(self, gallery: Gallery, next_id: int) -> None:
        self.next_id = next_id
        self.commits = 0
        self._gallery = gallery
        self._schema = schema(gallery.manifest.dimension)
        self._results: list[Embedded] = []
        self._items: list[int | None] = []  # of each result
        self._rows = 0
        self._labels: dict[int, Sample] = {}
        self._committed = time.monotonic()
        self._given_up = False

    def put(self, embedded: Embedded, item: int | None = None) -> None:
        """Add an item, or give a known item new content. The item keeps its id, which is that of its first row."""
        self._results.append(embedded)
        self._items.append(item)
        self._rows += len(embedded.vectors)
        self._commit_when_due()

    def relabel(self, item: int, sample: Sample) -> None:
        """Note that a known item's file has another path or time or is described otherwise; its vectors stay."""
        self._labels[item] = sample
        self._commit_when_due()

    def commit(self) -> None:
        """Write what was collected; nothing after a commit that has failed or was interrupted, whose rows may be there.

        Raises:
            GalleryError: the store fails, or another copy of the gallery has taken the table over.
        """
        if self._given_up:
            return
        try:
            self._commit_rows()
            self._commit_labels()
        except BaseException:
            self._given_up = True
            raise
        self._committed = time.monotonic()

    def _commit_when_due(self) -> None:
        full = self._rows + len(self._labels) >= COMMIT_ROWS
        if full or time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def _commit_rows(self) -> None:
        if not self._results:
            return
        rows = self._new_rows()
        replaced = [item for item in self._items if item is not None]
        if replaced:
            self._merge(rows, leftovers=replaced)
        else:
            self._write(lambda: self._gallery.table.add(rows), again=lambda: self._merger().execute(rows))
        self._results, self._items, self._rows = [], [], 0

    def _commit_labels(self) -> None:
        if not self._labels:
            return
        condition = f"item IN ({_listed(self._labels)})"
        rows = self._gallery.read_latest(
            lambda table: table.search().where(condition).to_arrow().select(self._schema.names)
        )
        samples = [self._labels[item] for item in rows["item"].to_pylist()]
        columns = {
            "path": [self._gallery.stored_path(sample.path) for sample in samples],
            "size": [sample.size for sample in samples],
            "mtime": [sample.mtime for sample in samples],
        }
        for name, values in columns.items():
            rows = rows.set_column(rows.schema.get_field_index(name), self._schema.field(name), [pa.array(values)])
        described = pa.array([bool(sample.captions) for sample in samples])
        for name, values in _labels_of(samples).items():
            field = self._schema.field(name)
            merged = pc.if_else(described, pa.array(values, field.type), rows[name])
            rows = rows.set_column(rows.schema.get_field_index(name), field, merged)
        self._merge(rows.cast(self._schema))
        self._labels = {}

    def _merge(self, rows: pa.Table, leftovers: list[int] | None = None) -> None:
        merge = self._merger()
        if leftovers:
            merge = merge.when_not_matched_by_source_delete(f"item IN ({_listed(leftovers)})")
        self._write(lambda: merge.execute(rows), lambda: merge.execute(rows))

    def _merger(self) -> Any:
        return self._gallery.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()

    def _write(self, first: Callable[[], Any], again: Callable[[], Any]) -> None:
        """Commit by `first`; while the table's store does not answer, wait and commit by `again`, which may follow it.

        Raises:
            GalleryError: the store fails, or another copy of the gallery has taken the table over.
        """
        commit, waits = first, list(WAITS)
        while True:
            try:
                with self._gallery.place.faults_told():
                    self._gallery.require_own_table()
                    commit()
                self.commits += 1
                return
            except GalleryError as error:
                if not waits or not is_outage(error.__cause__):
                    raise
                log.warning(
                    "%s did not answer; a commit is tried again in %g s.", self._gallery.place.address, waits[0]
                )
                time.sleep(waits.pop(0))
                commit = again

    def _new_rows(self) -> pa.Table:
        """The rows of all results, made column by column, which is several times as quick as row by row."""
        results, samples = self._results, [result.sample for result in self._results]
        moments = [moment for result in results for moment in (None, *result.moments)]
        counts = np.array([len(result.vectors) for result in results])
        pooled = np.cumsum(counts) - counts
        ids = self._new_ids(pooled)
        result_of_row = np.repeat(np.arange(len(results)), counts)
        of_results: dict[str, list[Any]] = _labels_of(samples) | {
            "kind": [sample.kind for sample in samples],
            "path": [self._gallery.stored_path(sample.path) for sample in samples],
            "content_hash": [result.content_hash for result in results],
            "size": [sample.size for sample in samples],
            "mtime": [sample.mtime for sample in samples],
            "width": [result.width for result in results],
            "height": [result.height for result in results],
            "duration": [result.duration for result in results],
        }
        columns: dict[str, pa.Array] = {
            name: pa.array(values, self._schema.field(name).type).take(pa.array(result_of_row))
            for name, values in of_results.items()
        }
        vectors = np.concatenate([result.vectors for result in results]).astype(np.float16)
        columns |= {
            "id": pa.array(ids),
            "item": pa.array(ids[pooled][result_of_row]),
            "moment": pa.array([moment is not None for moment in moments]),
            "start": pa.array([moment and moment.start for moment in moments], pa.float64()),
            "end": pa.array([moment and moment.end for moment in moments], pa.float64()),
            "frame_time": pa.array([moment and moment.frame_time for moment in moments], pa.float64()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        }
        return pa.table([columns[field.name] for field in self._schema], self._schema)

    def _new_ids(self, pooled: np.ndarray) -> np.ndarray:
        """(R,) ids of the rows: a known item's first row keeps its own, all others are new."""
        ids = np.full(self._rows, -1)
        ids[pooled] = [-1 if item is None else item for item in self._items]
        new = np.flatnonzero(ids < 0)
        ids[new] = np.arange(self.next_id, self.next_id + len(new))
        self.next_id += len(new)
        return ids


def licence_of(sample: Sample) -> str:
    """What the source says of a sample's licence; "" if nothing."""
    return sample.extra.get("licence") or sample.extra.get("license") or ""


def _labels_of(samples: list[Sample]) -> dict[str, list[Any]]:
    return {
        "source": [sample.source for sample in samples],
        "caption": ["\n".join(sample.captions) for sample in samples],
        "captions": [list(sample.captions) for sample in samples],
        "licence": [licence_of(sample) for sample in samples],
    }


def _listed(items: Any) -> str:
    return ", ".join(str(int(item)) for item in items)
