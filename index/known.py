"""What a gallery holds already, as a build must know it: which files are unchanged, moved, changed or gone."""

import os
from collections import defaultdict
from enum import Enum
from typing import Any

from cots.data.decode_ahead import content_hash
from cots.data.samples import Sample
from cots.data.shards import split_member
from index.gallery import Gallery
from index.writer import licence_of

_FACTS = ("item", "path", "size", "mtime", "content_hash", "source", "captions", "licence")


class Change(Enum):
    """What became of a file since it was embedded."""

    NEW = "new"  # its path; see `KnownItems.moved_from`
    CHANGED = "changed"
    MOVED = "moved"  # another path, or only another time: the content is known
    RELABELLED = "relabelled"
    UNCHANGED = "unchanged"


class KnownItems:
    """The items of a gallery by path and by content."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        gallery.table.checkout_latest()
        facts = gallery.table.search().where("moment = false").select(list(_FACTS)).to_arrow().combine_chunks()
        self._facts = {name: facts[name] for name in _FACTS}
        self._row_of = {path: row for row, path in enumerate(facts["path"].to_pylist())}
        self._by_size: dict[int, list[int]] = defaultdict(list)
        for row, size in enumerate(facts["size"].to_pylist()):
            self._by_size[size].append(row)
        self._claimed: set[int] = set()
        self._seen: set[int] = set()
        self._shards: set[str] = set()

    def compare(self, sample: Sample) -> tuple[Change, int | None]:
        """Tell what became of a sample, and which item it is; None if its path is new.

        A file of known path, size and time is not read. One of another time is, so that its content can be compared.

        Raises:
            MediaError: it has to be read and cannot be.
        """
        if sample.offset is not None:
            self._shards.add(split_member(sample.path)[0])
        row = self._row_of.get(self._gallery.stored_path(sample.path))
        if row is None:
            return Change.NEW, None
        self._seen.add(row)
        item = self._value("item", row)
        if sample.size == self._value("size", row):
            if sample.mtime == self._value("mtime", row):
                return (Change.RELABELLED if self._relabelled(sample, row) else Change.UNCHANGED), item
            if content_hash(sample) == self._value("content_hash", row):
                return Change.MOVED, item
        return Change.CHANGED, item

    def moved_from(self, sample: Sample) -> int | None:
        """The item that has the content of a sample of new path and whose own file is gone; it is given away once.

        To be asked when all samples have been compared: what a shard no longer holds is known at its end. A file is
        read only if an item of its size is known.

        Raises:
            MediaError: it has to be read and cannot be.
        """
        rows = [row for row in self._by_size.get(sample.size, ()) if row not in self._claimed and row not in self._seen]
        if not rows:
            return None
        content = content_hash(sample)
        for row in rows:
            if self._value("content_hash", row) == content and not self._exists(row):
                self._claimed.add(row)
                return self._value("item", row)
        return None

    def _relabelled(self, sample: Sample, row: int) -> bool:
        """Whether the source now says something else of the file. A source without captions says nothing."""
        if not sample.captions:
            return False
        stored = tuple(self._value(name, row) for name in ("captions", "source", "licence"))
        return stored != (list(sample.captions), sample.source, licence_of(sample))

    def missing(self) -> list[tuple[int, str]]:
        """Items whose file is gone, as (item, stored path)."""
        rows = (row for row in self._row_of.values() if row not in self._seen and row not in self._claimed)
        return [(self._value("item", row), self._value("path", row)) for row in rows if not self._exists(row)]

    def _exists(self, row: int) -> bool:
        """A member of a shard that this build has read exists only if the build has seen it there."""
        path = self._gallery.absolute_path(self._value("path", row))
        shard = split_member(path)[0]
        return os.path.exists(path) or (shard not in self._shards and shard != path and os.path.exists(shard))

    def _value(self, name: str, row: int) -> Any:
        return self._facts[name][row].as_py()
