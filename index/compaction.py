"""Keep a gallery small and quick: merge fragments, forget old versions, take new captions into the full-text index."""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from index.captions import index_captions, optimize
from index.checksum import remove_scratch
from index.gallery import Gallery, open_gallery
from index.lock import writing
from index.snapshot import FOLDER

MANY_FRAGMENTS = 16
KEEP_VERSIONS = timedelta(days=1)
NONE_KEPT = timedelta(milliseconds=1)


@dataclass(frozen=True)
class CompactReport:
    """Before and after: fragments of the table, and bytes of the table and of what is derived from it.

    Of a table in an object store only what its latest version holds is counted.
    """

    bytes_before: int
    bytes_after: int
    fragments_before: int
    fragments_after: int


def compact(gallery_dir: str | Path) -> CompactReport:
    """Rewrite the table without deleted rows and in few fragments, and remove all its older versions.

    Rows, ids and vectors stay as they are. The full-text index is made again, so that damage to it is mended. Who is
    reading goes on: open searches hold what they have mapped, and a filter whose version is removed while it is read is
    read again.

    Raises:
        GalleryError: there is no gallery, or another process is changing it.
    """
    open_gallery(gallery_dir)
    with writing(gallery_dir) as directory:
        gallery = open_gallery(directory)
        gallery.require_own_table()
        before, fragments = _size(gallery), _fragments(gallery)
        optimize(gallery, cleanup_older_than=NONE_KEPT)  # first, because what it frees may be the room for the index
        index_captions(gallery, anew=True)
        optimize(gallery, cleanup_older_than=NONE_KEPT)
        remove_scratch(directory / FOLDER)
        compacted = open_gallery(directory)
        assert len(compacted.snapshot) == compacted.table.count_rows()
        return CompactReport(before, _size(compacted), fragments, _fragments(compacted))


def tidy(gallery: Gallery, fresh: bool) -> None:
    """After a build: merge many small fragments, and index captions. The caller holds the lock.

    Args:
        gallery: what was built.
        fresh: the build began it, so that no version but the last has readers.
    """
    index_captions(gallery)
    if fresh or _fragments(gallery) > MANY_FRAGMENTS:
        optimize(gallery, cleanup_older_than=NONE_KEPT if fresh else KEEP_VERSIONS)
    remove_scratch(gallery.directory / FOLDER)


def _statistics(gallery: Gallery) -> dict[str, Any]:
    return gallery.table.stats()  # type: ignore[return-value]  # annotated as a class, is a dict


def _fragments(gallery: Gallery) -> int:
    return _statistics(gallery)["fragment_stats"]["num_fragments"]


def _size(gallery: Gallery) -> int:
    """See `CompactReport`. Media that lie in the gallery are not counted."""
    derived, table = gallery.directory / FOLDER, gallery.place.folder
    if table is None:
        return _bytes_in(derived) + _statistics(gallery)["total_bytes"]
    return _bytes_in(derived) + _bytes_in(table)


def _bytes_in(folder: Path) -> int:
    return sum(os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(folder) for name in names)
