"""Exact search on the CPU: the scores of all vectors, a block at a time on every core, without a copy of the vectors.

A block of float16 vectors becomes float32 in a core's cache and meets all queries in one matrix product. Of the scores
only those are kept that beat the k-th best of what a core has seen, which after a few blocks are next to none. So the
vectors are read once, as they lie, and may be larger than memory. FAISS's flat index holds twice the bytes, and gives
a query to one core. Where the vectors get better and better, as in a gallery whose last folder a query is about, a
block's own k-th best holds back the rest of it.
"""

import os
import threading
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cots.errors import GalleryError
from cots.onednn import linear
from cots.single_core import single_core_threads

BLOCK = 4096
FEW = 1024  # scores that one core computes sooner than it shares the work out
GROUPS = 128
FEW_QUERIES = 3  # whose scores are written where those of the last block were
MOST_QUERIES = 1024  # at once, so that their scores of a block take 16 MiB a core
CROWD = 2  # times k scores a query, of which a block's best are sought before they are kept
MOST_WAITING = 8  # times k scores a query, at which they are sorted
SERIAL = 32_768  # numbers that torch converts on the calling core
_kept = threading.local()
Triples = tuple[np.ndarray, np.ndarray, np.ndarray]  # (M,) queries, rows and scores


class ExactIndex:
    """N vectors with ids, searched by inner product.

    Args:
        vectors: (N, D), any float type, of unit norm; may be mapped from a file that is larger than memory.
        ids: (N,) int64, unique.
    """

    kind = "exact"

    def __init__(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        self.ids = ids
        self._vectors = vectors

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query.

        Args:
            queries: (Q, D) float32, finite.
            k: at least 0.
            allowed: (N,) bool; rows where it is False are not found. None allows all.

        Returns:
            scores (Q, K) float32, descending; ids (Q, K) int64; K is k, or the allowed rows if those are fewer. The
            score of a vector that is not finite is NaN, after all others.

        Raises:
            GalleryError: the queries have another dimension or are not finite, or `allowed` is of other rows.
        """
        queries = checked_queries(queries, self._vectors.shape[1])
        require_mask(allowed, len(self.ids))
        positions = None if allowed is None else np.flatnonzero(allowed)
        scores, found = exact_search(self._vectors, queries, k, positions)
        return scores, self.ids[found]


def exact_search(
    vectors: np.ndarray, queries: np.ndarray, k: int, positions: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k best vectors of each query.

    Args:
        vectors: (N, D), any float type; may be mapped from a file that is larger than memory.
        queries: (Q, D) float32.
        k: at least 0.
        positions: (M,) ascending; which vectors to compare. None takes all.

    Returns:
        scores (Q, K) float32, descending, and positions (Q, K) int64; equal scores by position, NaN last. K is k, or
        the number of vectors compared if that is less.
    """
    count = len(vectors) if positions is None else len(positions)
    k = min(k, count)
    if k == 0 or not len(queries):
        return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    if len(queries) > MOST_QUERIES:
        parts = [
            exact_search(vectors, queries[start : start + MOST_QUERIES], k, positions)
            for start in range(0, len(queries), MOST_QUERIES)
        ]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    if count * len(queries) <= FEW:
        scores, found = _all_scores(vectors, queries, positions)
    else:
        scores, found = _best_scores(vectors, queries, k, positions)
    scores, found = _sorted(scores, found, k)
    short = np.flatnonzero(found[:, -1] < 0)  # fewer than k scores are numbers
    if len(short):
        scores[short], found[short] = _sorted(*_all_scores(vectors, queries[short], positions), k)
    return scores, found


def _sorted(scores: np.ndarray, found: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k of each query: the highest scores first, equal ones by position, NaN last."""
    order = np.lexsort((found, -scores))[:, :k]
    queries = np.arange(len(scores))[:, None]
    return scores[queries, order], found[queries, order]


def _all_scores(
    vectors: np.ndarray, queries: np.ndarray, positions: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The scores (Q, M) of all M vectors to compare and their positions (Q, M), computed by the calling core alone."""
    chosen = torch.from_numpy(vectors[positions]) if positions is not None else shared_tensor(vectors)
    floats = torch.empty(chosen.shape)
    step = max(SERIAL // vectors.shape[1], 1)
    for start in range(0, len(chosen), step):
        floats[start : start + step].copy_(chosen[start : start + step])
    scores = np.einsum("qd,md->qm", queries, floats.numpy())  # unlike a matrix product, it asks no other core
    names = np.arange(len(vectors)) if positions is None else positions
    return scores, np.broadcast_to(names, scores.shape)


def _best_scores(
    vectors: np.ndarray, queries: np.ndarray, k: int, positions: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (Q, C k) and positions (Q, C k) that hold the k best, from C cores; a position of -1 has no score."""
    rows = None if positions is None else torch.from_numpy(np.asarray(positions, np.int64))
    count = len(vectors) if rows is None else len(rows)
    pool, cores = _cores()
    bounds = [count * part // cores for part in range(cores + 1)]
    shared = shared_tensor(vectors), torch.from_numpy(queries), k, rows
    parts = [pool.submit(_best_of_part, *shared, *ends) for ends in pairwise(bounds)]
    found = [part.result() for part in parts]
    return np.concatenate([scores for scores, _ in found], axis=1), np.concatenate([row for _, row in found], axis=1)


def _best_of_part(
    vectors: Tensor, queries: Tensor, k: int, rows: Tensor | None, first: int, behind: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows (Q, k) of the best from `first` up to `behind`, on one core."""
    block, best = _block(vectors.shape[1]), _Best(len(queries), k)
    products = torch.empty(min(len(queries), FEW_QUERIES), BLOCK)
    with torch.inference_mode():
        for start in range(first, behind, BLOCK):
            stop = min(start + BLOCK, behind)
            part = block[: stop - start]
            part.copy_(vectors[start:stop] if rows is None else _gather(vectors, rows[start:stop]))
            if len(queries) > FEW_QUERIES:
                scores = linear(queries, part)
            else:
                scores = torch.mm(queries, part.T, out=products[:, : stop - start])
            best.take(scores, start)
        best.settle()
    places = best.places if rows is None else np.where(best.places < 0, -1, rows.numpy()[best.places])
    return best.scores, places


class _Best:
    """The k best of the blocks of scores that one core has seen.

    A score must beat the k-th best of those before. That is known from the first block on, at first as a bound, and
    brought up to date whenever the blocks seen have doubled; so of each doubling about k scores a query are sorted.
    Where vectors lie in an order, more may beat it than a few; then a block's own bound counts as well, and what waits
    is sorted when it becomes much.

    Attributes:
        scores, places: (Q, k) of the best when all is settled; a place of -1 has no score.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.scores = np.full((queries, k), -np.inf, np.float32)
        self.places = np.full((queries, k), -1)
        self._least = torch.full((queries, 1), -torch.inf)
        # Taken once: pieces that are made between the large arrays of two blocks keep malloc from using these again.
        room = MOST_WAITING * queries * k
        self._waiting: Triples = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.float32)
        self._count = 0
        self._blocks, self._due = 0, 1

    def take(self, scores: Tensor, start: int) -> None:
        """Look through the scores (Q, M) of the vectors from `start` on, which come after all before."""
        better = torch.nonzero(scores > self._least, as_tuple=True) if self._blocks else None
        if better is None or len(better[0]) > CROWD * self.scores.size:
            self._least = torch.maximum(self._least, _bound(scores, self.scores.shape[1]))
            better = torch.nonzero(scores > self._least, as_tuple=True)
        found: Triples = better[0].numpy(), (better[1] + start).numpy(), scores[better].numpy()
        self._blocks += 1
        end = self._count + len(found[0])
        if end > len(self._waiting[0]):
            self.settle(found)
            return
        for waiting, new in zip(self._waiting, found, strict=True):
            waiting[self._count : end] = new
        self._count = end
        if self._blocks == self._due:
            self.settle()

    def settle(self, *more: Triples) -> None:
        """Sort what waits, and more that came after it, into the best; equal scores by place."""
        count, k = self.scores.shape
        best = np.repeat(np.arange(count), k), self.places.ravel(), self.scores.ravel()
        waiting = tuple(each[: self._count] for each in self._waiting)
        asked, places, scores = (np.concatenate(parts) for parts in zip(best, waiting, *more, strict=True))
        order = np.lexsort((places, -scores, asked))
        chosen = order[np.searchsorted(asked[order], np.arange(count))[:, None] + np.arange(k)]
        self.scores, self.places = scores[chosen], places[chosen]
        self._least = torch.from_numpy(self.scores[:, -1:])
        self._count, self._due = 0, 2 * self._blocks


def _gather(vectors: Tensor, rows: Tensor) -> Tensor:
    """Some rows (M,), ascending, of the vectors; without a copy if they follow one another, as a video's moments do."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        return vectors[first : last + 1]
    return torch.index_select(vectors, 0, rows)


def _block(dimension: int) -> Tensor:
    """(BLOCK, D) float32 that the calling thread keeps: to get fresh memory takes as long as to fill it."""
    block: Tensor | None = getattr(_kept, "block", None)
    if block is None or block.shape != (BLOCK, dimension):
        block = _kept.block = torch.empty(BLOCK, dimension)
    return block


def _bound(scores: Tensor, k: int) -> Tensor:
    """Less (Q, 1) than the k-th best of scores (Q, M), if only just: of the maxima of groups the k-th is no better."""
    usable = torch.where(scores.isnan(), -torch.inf, scores)
    width = scores.shape[1] // max(GROUPS, k)
    if width > 1:
        usable = usable[:, : width * max(GROUPS, k)].unflatten(1, (width, -1)).amax(dim=1)
    if usable.shape[1] < k:
        return torch.full((len(scores), 1), -torch.inf)
    return torch.nextafter(usable.topk(k).values[:, -1:], torch.tensor(-torch.inf))


@cache
def _cores() -> tuple[Any, int]:
    """Threads that compute on one core each, and how many; a process that was forked needs its own."""
    count = torch.get_num_threads()
    return single_core_threads(count, "exact"), count


os.register_at_fork(after_in_child=_cores.cache_clear)


class _Readable:
    """Vectors that are not to be written, in the shape of those that are: torch warns of the former."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors
        address, _ = vectors.__array_interface__["data"]
        self.__array_interface__ = {**vectors.__array_interface__, "data": (address, False)}


def shared_tensor(vectors: np.ndarray) -> Tensor:
    """The same numbers in the same memory, which are not to be written to."""
    return torch.from_numpy(np.asarray(_Readable(vectors)))


def require_mask(allowed: np.ndarray | None, count: int) -> None:
    """Refuse a filter that is not one flag for each of the rows, such as positions, or the flags of another version.

    Raises:
        GalleryError: it is not (`count`,) bool.
    """
    if allowed is not None and (allowed.dtype != bool or allowed.shape != (count,)):
        raise GalleryError(
            f"A filter of {allowed.dtype} and shape {allowed.shape} says nothing of {count} rows; "
            f"give flags, ({count},) bool."
        )


def checked_queries(queries: np.ndarray, dimension: int) -> np.ndarray:
    """Queries (Q, D) as contiguous float32.

    Raises:
        GalleryError: D is not the vectors' dimension, or a number is not finite.
    """
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise GalleryError(
            f"Queries of shape {queries.shape} cannot be compared with vectors of {dimension} dimensions; "
            "embed them with the gallery's model."
        )
    if not np.isfinite(queries).all():
        raise GalleryError("A query is not finite (it holds NaN or infinity), so nothing is near it; embed it again.")
    return np.ascontiguousarray(queries, dtype=np.float32)
