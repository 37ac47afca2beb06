"""Exact search: the scores of all vectors, by FAISS on the CPU, or by a matrix product where FAISS is not installed.

The two give the same hits; FAISS is faster and needs no memory for the scores.
"""

from typing import Any

import numpy as np

BLOCK = 65_536


class ExactIndex:
    """N vectors with ids, searched by inner product.

    Args:
        vectors: (N, D), any float type, of unit norm; kept as float32.
        ids: (N,) int64, unique.
        faiss: the FAISS module; None for the matrix product. By default whatever is installed.
    """

    def __init__(self, vectors: np.ndarray, ids: np.ndarray, faiss: Any = "installed") -> None:
        self.ids = ids
        self._faiss = _installed_faiss() if faiss == "installed" else faiss
        self._flat: Any = None
        if self._faiss is None:
            self._vectors = vectors.astype(np.float32)
            return
        self._flat = self._faiss.IndexFlatIP(vectors.shape[1])
        for start in range(0, len(vectors), BLOCK):  # in blocks, so that float32 exists twice only for one of them
            self._flat.add(np.ascontiguousarray(vectors[start : start + BLOCK], dtype=np.float32))

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query.

        Args:
            queries: (Q, D) float32, finite.
            k: at least 1.
            allowed: (N,) bool; rows where it is False are not found. None allows all.

        Returns:
            scores (Q, K) float32, descending; ids (Q, K) int64; K is k, or the allowed rows if those are fewer.
        """
        k = min(k, len(self.ids) if allowed is None else int(np.count_nonzero(allowed)))
        if k == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        find = self._by_product if self._flat is None else self._by_faiss
        scores, positions = find(np.ascontiguousarray(queries, dtype=np.float32), k, allowed)
        return scores, self.ids[positions]

    def _by_faiss(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if allowed is None:
            return self._flat.search(queries, k)
        bitmap = np.packbits(allowed, bitorder="little")
        selector = self._faiss.IDSelectorBitmap(bitmap)
        return self._flat.search(queries, k, params=self._faiss.SearchParameters(sel=selector))

    def _by_product(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(len(self.ids)) if allowed is None else np.flatnonzero(allowed)
        scores = queries @ self._vectors[positions].T if allowed is not None else queries @ self._vectors.T
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        found = np.take_along_axis(scores, best, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        return np.take_along_axis(found, order, axis=1), positions[np.take_along_axis(best, order, axis=1)]


def _installed_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        return None
    return faiss
