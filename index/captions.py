"""Full-text search of captions, by the inverted index that LanceDB keeps beside the table, and its fusion with vectors.

The index is made when the first captions come and grows at the end of a build. Rows that came later are found as well:
LanceDB reads their captions one by one.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cots.errors import GalleryError
from index.place import is_of_a_disk, meaning

if TYPE_CHECKING:
    from index.gallery import Gallery

COLUMN = "caption"
UNINDEXED_SHARE = 0.1
MOST_ROWS = 2**31 - 1  # that LanceDB can be asked for
# The usual 60 is for lists of thousands. On 1,000 photographs with one caption each, 88.8 % of other captions find
# theirs among the first ten with 5, 81.8 % with 60 and 79.8 % by vectors alone (benchmarks/search_fusion.py).
RRF_CONSTANT = 5.0
log = logging.getLogger("cots")


def index_captions(gallery: "Gallery", anew: bool = False) -> None:
    """Make the full-text index if there are captions, and take in new ones if many. The caller holds the lock.

    Args:
        gallery: whose captions to index.
        anew: make the index though there is one, which may be damaged.
    """
    found = caption_index(gallery)
    if found is not None and not anew:
        if found.num_unindexed_rows > UNINDEXED_SHARE * max(found.num_indexed_rows or 0, 1):
            optimize(gallery)
    elif gallery.table.count_rows(f"{COLUMN} != ''"):
        from lancedb.index import FTS

        gallery.table.create_index(COLUMN, config=FTS())


def optimize(gallery: "Gallery", **options: Any) -> None:
    """LanceDB's `optimize`, which takes all captions into the index. The caller holds the lock.

    An index that cannot be read LanceDB skips or fails at; it is made again.
    """
    try:
        gallery.table.optimize(**options)
    except (RuntimeError, ValueError):
        if caption_index(gallery) is None:
            raise
        _make_damaged_index_again(gallery)
        gallery.table.optimize(**options)
    else:
        found = caption_index(gallery)
        if found is not None and found.num_unindexed_rows:
            _make_damaged_index_again(gallery)


def _make_damaged_index_again(gallery: "Gallery") -> None:
    index_captions(gallery, anew=True)
    log.warning("The index of captions of %s could not be read; it was made again.", gallery.directory)


def caption_index(gallery: "Gallery") -> Any | None:
    """LanceDB's description of the full-text index; None if there is none."""
    indices = gallery.table.list_indices()
    return next((found for found in indices if list(found.columns) == [COLUMN]), None)


def find_captions(gallery: "Gallery", text: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose captions share words with a text, after stemming and without words such as "the".

    Args:
        gallery: whose captions are read, as they are in the latest version of the table.
        text: any words; all count, none is needed, and punctuation has no meaning.
        limit: most rows to give.

    Returns:
        ids (M,) int64 and their BM25 scores (M,) float32, descending; equal scores by id.

    Raises:
        GalleryError: the captions have no index yet, or it is damaged.
    """

    words = text.replace('"', " ")  # a text in quotes would be a phrase, which the index cannot find

    def search(table: Any) -> pa.Table:
        found = table.search(words, query_type="fts").select(["id", "_score"])
        return found.limit(min(limit, MOST_ROWS)).to_arrow()

    if gallery.read_latest(lambda table: caption_index(gallery)) is None:
        if not gallery.read_latest(lambda table: table.count_rows(f"{COLUMN} != ''")):
            raise GalleryError(
                f"The gallery {gallery.directory} has no captions to search; use --mode vector, or build it from a "
                "source that has captions."
            )
        raise GalleryError(
            f"The captions of the gallery {gallery.directory} are not indexed; "
            f"index them with: cots index compact --gallery {gallery.directory}"
        )
    try:
        found = gallery.read_latest(search)
    except (GalleryError, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, GalleryError) else error
        if gallery.place.folder is None or is_of_a_disk(cause):
            raise
        raise GalleryError(
            f"The captions of the gallery {gallery.directory} cannot be searched ({meaning(str(cause))}); "
            f"make their index again with: cots index compact --gallery {gallery.directory}"
        ) from error
    ids, scores = found["id"].to_numpy(), found["_score"].to_numpy()
    order = np.lexsort((ids, -scores))
    return ids[order], scores[order]


def fuse(rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009): the sum over rankings of 1 / (5 + rank).

    Args:
        rankings: items, best first, each at most once a ranking.

    Returns:
        all items with their sums, best first; equal sums in the order of the first ranking, then of the next.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + 1 / (RRF_CONSTANT + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])
