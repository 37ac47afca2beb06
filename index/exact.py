"""Exact search: the scores of all vectors, by FAISS on the CPU, or by a matrix product where FAISS is not installed.

The two give the same hits. FAISS is faster and holds a float32 copy of the vectors; the product takes them as they are,
block by block, so that they may be larger than memory.
"""

from typing import Any

import numpy as np

from cots.errors import GalleryError

BLOCK = 65_536
PRODUCT_BLOCK = 16_384


class ExactIndex:
    """N vectors with ids, searched by inner product.

    Args:
        vectors: (N, D), any float type, of unit norm.
        ids: (N,) int64, unique.
        faiss: the FAISS module; None for the matrix product. By default whatever is installed.
    """

    kind = "exact"

    def __init__(self, vectors: np.ndarray, ids: np.ndarray, faiss: Any = "installed") -> None:
        self.ids = ids
        self._faiss = _installed_faiss() if faiss == "installed" else faiss
        self._vectors = vectors
        self._flat: Any = None
        if self._faiss is None:
            return
        self._flat = self._faiss.IndexFlatIP(vectors.shape[1])
        for start in range(0, len(vectors), BLOCK):  # in blocks, so that float32 exists twice only for one of them
            self._flat.add(np.ascontiguousarray(vectors[start : start + BLOCK], dtype=np.float32))

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
            GalleryError: the queries have another dimension or are not finite.
        """
        queries = checked_queries(queries, self._vectors.shape[1])
        k = min(k, len(self.ids) if allowed is None else int(np.count_nonzero(allowed)))
        if k == 0 or self._flat is None:
            positions = None if allowed is None else np.flatnonzero(allowed)
            scores, found = exact_search(self._vectors, queries, k, positions)
        elif allowed is None:
            scores, found = self._flat.search(queries, k)
        else:
            bitmap = np.packbits(allowed, bitorder="little")
            selector = self._faiss.IDSelectorBitmap(bitmap)
            scores, found = self._flat.search(queries, k, params=self._faiss.SearchParameters(sel=selector))
        if (found < 0).any():  # FAISS passes over vectors that are not finite, and fills up with -1
            positions = None if allowed is None else np.flatnonzero(allowed)
            scores, found = exact_search(self._vectors, queries, k, positions)
        return scores, self.ids[found]


def exact_search(
    vectors: np.ndarray, queries: np.ndarray, k: int, positions: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k best vectors of each query by a matrix product, a block of vectors at a time.

    Args:
        vectors: (N, D), any float type; may be mapped from a file that is larger than memory.
        queries: (Q, D) float32.
        k: at least 0.
        positions: (M,) ascending; which vectors to compare. None takes all.

    Returns:
        scores (Q, K) float32, descending, and positions (Q, K) int64; equal scores by position. K is k, or the number
        of vectors compared if that is less.
    """
    count = len(vectors) if positions is None else len(positions)
    scores, found = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, count if k else 0, PRODUCT_BLOCK):
        stop = min(start + PRODUCT_BLOCK, count)
        places = np.arange(start, stop) if positions is None else positions[start:stop]
        block = vectors[start:stop] if positions is None else vectors[places]
        products = queries @ block.astype(np.float32, copy=False).T
        merged = np.concatenate([scores, products], axis=1)
        origin = np.concatenate([found, np.broadcast_to(places, products.shape)], axis=1)
        best = np.sort(np.argpartition(-merged, min(k, merged.shape[1]) - 1, axis=1)[:, :k], axis=1)
        scores, found = np.take_along_axis(merged, best, axis=1), np.take_along_axis(origin, best, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(found, order, axis=1)


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


def _installed_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        return None
    return faiss
