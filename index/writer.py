"""Writes a build's results into the table, some seconds' worth at a time, each in one atomic commit.

A killed build loses what had not been committed and nothing else. An item's rows travel in one commit. A changed item's
new rows replace the old in one commit as well (a merge on `id` that also deletes the item's leftover rows), so there is
no moment at which they are absent or double.
"""

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cots.data.samples import Sample
from cots.embed import Embedded
from index.gallery import Gallery, schema

COMMIT_ROWS = 4096
COMMIT_SECONDS = 10.0


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
        self._rows: list[dict[str, Any]] = []
        self._replaced: list[int] = []
        self._labels: dict[int, Sample] = {}
        self._committed = time.monotonic()

    def put(self, embedded: Embedded, item: int | None = None) -> None:
        """Add an item, or give a known item new content. The item keeps its id, which is that of its first row."""
        if item is not None:
            self._replaced.append(item)
        self._rows += self._item_rows(embedded, item)
        self._commit_when_due()

    def relabel(self, item: int, sample: Sample) -> None:
        """Note that a known item's file has another path or time or is described otherwise; its vectors stay."""
        self._labels[item] = sample
        self._commit_when_due()

    def commit(self) -> None:
        """Write what was collected."""
        self._commit_rows()
        self._commit_labels()
        self._committed = time.monotonic()

    def _commit_when_due(self) -> None:
        full = len(self._rows) + len(self._labels) >= COMMIT_ROWS
        if full or time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def _commit_rows(self) -> None:
        if not self._rows:
            return
        rows = pa.Table.from_pylist(self._rows, self._schema)
        if self._replaced:
            self._merge(rows, leftovers=self._replaced)
        else:
            self._gallery.table.add(rows)
            self.commits += 1
        self._rows, self._replaced = [], []

    def _commit_labels(self) -> None:
        if not self._labels:
            return
        condition = f"item IN ({_listed(self._labels)})"
        rows = self._gallery.table.search().where(condition).to_arrow().select(self._schema.names)
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
        merge = self._gallery.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        if leftovers:
            merge = merge.when_not_matched_by_source_delete(f"item IN ({_listed(leftovers)})")
        merge.execute(rows)
        self.commits += 1

    def _item_rows(self, embedded: Embedded, item: int | None) -> list[dict[str, Any]]:
        sample = embedded.sample
        shared = {name: values[0] for name, values in _labels_of([sample]).items()} | {
            "kind": sample.kind,
            "path": self._gallery.stored_path(sample.path),
            "content_hash": embedded.content_hash,
            "size": sample.size,
            "mtime": sample.mtime,
            "width": embedded.width,
            "height": embedded.height,
            "duration": embedded.duration,
        }
        first = self._new_id() if item is None else item
        vectors = embedded.vectors.astype(np.float16)
        rows = [shared | {"id": first, "item": first, "moment": False, "vector": vectors[0]}]
        for moment, vector in zip(embedded.moments, vectors[1:], strict=True):
            window = {"start": moment.start, "end": moment.end, "frame_time": moment.frame_time}
            rows.append(shared | window | {"id": self._new_id(), "item": first, "moment": True, "vector": vector})
        return rows

    def _new_id(self) -> int:
        self.next_id += 1
        return self.next_id - 1


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
