"""Approximate nearest neighbours by FAISS: structures that look at a share of the vectors, and scores that are exact.

A structure only proposes rows. Their scores come from the gallery's own vectors, and whatever it cannot answer well
(rows added after it was made, a filter that leaves few rows, fewer proposals than hits were asked for) is answered by
comparing the rows in question one by one. So the hits are right on every engine; approximate is only which of the
allowed rows are among them, and how often they are the best is measured when a structure is made (`index.tuning`).

    hnsw    a graph (Malkov and Yashunin, 2018) over float16 vectors: the quickest answers, the slowest to make
    ivf     float16 vectors in cells, of which the nearest are searched
    ivfpq   as ivf, of product-quantised vectors (Jegou, Douze and Schmid, 2011): an eighth of the memory
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cots.errors import MissingDependency
from index.exact import checked_queries, exact_search, require_mask

BLOCK = 65_536
FEW_ROWS = 10_000  # as many are compared one by one sooner than a structure finds the allowed rows among all
FEW_HITS = 10  # as if so many were asked for, when fewer are: what is quantised may rank the best one tenth
GRAPH_BREADTH = 20  # the narrowest walk of a graph
HNSW_LINKS = 32
HNSW_CONSTRUCTION = 120
CELL_SAMPLE = 50  # training vectors a cell; FAISS asks for 39
MOST_CELLS = 65_536
GPU_VECTORS = 100_000  # fewer are sorted into cells on the CPU before FAISS has set up a GPU
Fill = Callable[[Any, np.ndarray], None]  # adds vectors, (N, D), to a trained structure of cells
log = logging.getLogger("cots")


@dataclass(frozen=True)
class Effort:
    """How hard a structure looks: what is tuned.

    Attributes:
        breadth: nodes kept while walking the graph (efSearch), or cells searched (nprobe).
        proposals: rows proposed for each hit, to be scored exactly.
    """

    breadth: int
    proposals: int = 1


def make_structure(kind: str, vectors: np.ndarray, fill: Fill | None = None) -> Any:
    """Train a FAISS index and fill it; one of cells on the GPU, if FAISS is installed for GPUs and there is one.

    What is returned lies in the CPU's memory. There it can be searched with a filter, which FAISS's classic GPU indexes
    take and ignore.

    Args:
        kind: "hnsw", "ivf" or "ivfpq".
        vectors: (N, D) float16 or float32 of unit norm, N at least 1; may be mapped from a file.
        fill: sorts the vectors into the cells of an "ivf" or "ivfpq" elsewhere, see `index.filling`.

    Raises:
        MissingDependency: FAISS is not installed.
    """
    faiss = installed_faiss()
    structure = _empty(faiss, kind, *vectors.shape)
    sample = 0 if structure.is_trained else min(len(vectors), max(CELL_SAMPLE * structure.nlist, 20_000))
    if sample and fill is not None:
        _train(structure, vectors, sample)
        fill(structure, vectors)
        return structure
    if sample and len(vectors) >= GPU_VECTORS and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        options = faiss.GpuClonerOptions()
        options.useFloat16 = True
        resources = faiss.StandardGpuResources()
        try:
            on_gpu = faiss.index_cpu_to_gpu(resources, 0, structure, options)
            _fill(on_gpu, vectors, sample)
            return faiss.index_gpu_to_cpu(on_gpu)
        except RuntimeError as error:  # its memory is full, or it cannot quantise so many dimensions
            reason = str(error).strip().splitlines()[-1][-200:]
            log.warning("The CPU makes the structure %s, because FAISS cannot on the GPU (%s).", kind, reason)
    _fill(structure, vectors, sample)
    return structure


def _fill(structure: Any, vectors: np.ndarray, sample: int) -> None:
    """Train a structure with a sample of the vectors, if there is anything to train, and add all of them."""
    if sample:
        _train(structure, vectors, sample)
    add_vectors(structure, vectors)


def _train(structure: Any, vectors: np.ndarray, sample: int) -> None:
    rows = np.sort(np.random.default_rng(0).choice(len(vectors), sample, replace=False))
    structure.train(vectors[np.resize(rows, max(sample, 2))].astype(np.float32))  # FAISS wants two, even equal


def add_vectors(structure: Any, vectors: np.ndarray) -> None:
    """Add vectors, (N, D) float16 or float32, to a trained structure, some at a time as float32."""
    for start in range(0, len(vectors), BLOCK):
        structure.add(np.ascontiguousarray(vectors[start : start + BLOCK], dtype=np.float32))


def _empty(faiss: Any, kind: str, count: int, dimension: int) -> Any:
    metric, half = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer.QT_fp16
    if kind == "hnsw":
        graph = faiss.IndexHNSWSQ(dimension, half, HNSW_LINKS, metric)
        graph.hnsw.efConstruction = HNSW_CONSTRUCTION
        return graph
    cells = min(max(int(4 * count**0.5), 1), max(count // CELL_SAMPLE, 1), MOST_CELLS)
    coarse = faiss.IndexFlatIP(dimension)
    if kind == "ivf":
        structure = faiss.IndexIVFScalarQuantizer(coarse, dimension, cells, half, metric, False)
    else:
        bits = min(8, max(count.bit_length() - 1, 1))  # a codebook holds at most as many words as there are vectors
        structure = faiss.IndexIVFPQ(coarse, dimension, cells, _parts(dimension), bits, metric)
        structure.pq.cp.min_points_per_centroid = 1
    structure.cp.min_points_per_centroid = 1  # of a small gallery, which is no cause for a warning
    structure.own_fields = True
    coarse.this.disown()
    return structure


def _parts(dimension: int) -> int:
    """Bytes of a quantised vector: a quarter of its dimensions, if that divides them; else the next best."""
    fitting = [parts for parts in range(1, dimension // 4 + 1) if dimension % parts == 0]
    return fitting[-1] if fitting and fitting[-1] >= dimension / 8 else dimension


class AnnIndex:
    """The rows of a snapshot, found by a structure over some of them and scored exactly.

    Args:
        structure: a FAISS index over S vectors.
        kind: what `make_structure` made.
        effort: how hard it looks.
        vectors: (N, D) of the snapshot.
        ids: (N,) int64 of the snapshot.
        rows: (S,) position in the snapshot of each vector of the structure, -1 for one that is gone or has changed;
            None if they are 0, 1, ..., N - 1.
        few_rows: so many allowed rows are compared one by one; by default `FEW_ROWS`.
    """

    def __init__(
        self,
        structure: Any,
        kind: str,
        effort: Effort,
        vectors: np.ndarray,
        ids: np.ndarray,
        rows: np.ndarray | None = None,
        few_rows: int | None = None,
    ) -> None:
        self.ids = ids
        self.kind = kind
        self.effort = effort
        self._faiss = installed_faiss()
        self._structure = structure
        self._vectors = vectors
        self._rows = rows
        self._few_rows = FEW_ROWS if few_rows is None else few_rows
        self._alive = None if rows is None or (rows >= 0).all() else rows >= 0
        covered = np.ones(len(ids), bool)
        if rows is not None:
            covered[:] = False
            covered[rows[rows >= 0]] = True
        self.uncovered = np.flatnonzero(~covered)

    @property
    def cells(self) -> int | None:
        """Into how many the vectors are sorted; None of a graph."""
        return None if self.kind == "hnsw" else self._structure.nlist

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query, as far as they are found; see `ExactIndex.search`.

        Never fewer than k if so many are allowed.

        Raises:
            GalleryError: the queries have another dimension or are not finite, or `allowed` is of other rows.
        """
        queries = checked_queries(queries, self._vectors.shape[1])
        require_mask(allowed, len(self.ids))
        eligible = len(self.ids) if allowed is None else int(np.count_nonzero(allowed))
        k = min(k, eligible)
        effort = self._scaled(k, eligible)
        if effort is None:
            positions = None if allowed is None else np.flatnonzero(allowed)
            scores, found = exact_search(self._vectors, queries, k, positions)
            return scores, self.ids[found]
        proposed = self._propose(queries, k, allowed, effort)
        extra = self.uncovered if allowed is None else self.uncovered[allowed[self.uncovered]]
        scores, found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for row, query in enumerate(queries):
            candidates = np.concatenate([proposed[row][proposed[row] >= 0], extra])
            if len(candidates) < k:
                candidates = np.arange(len(self.ids)) if allowed is None else np.flatnonzero(allowed)
            scores[row : row + 1], found[row : row + 1] = exact_search(
                self._vectors, query[None], k, np.sort(candidates)
            )
        return scores, self.ids[found]

    def _scaled(self, k: int, eligible: int) -> Effort | None:
        """The effort for k of the eligible rows; None if it is less to compare these one by one.

        The rows that a filter keeps may lie thin among those that it drops: the structure looks wider by as much.
        """
        if eligible <= self._few_rows or k > eligible // 4:
            return None
        breadth = self.effort.breadth if self.cells else max(self.effort.breadth, 2 * k, GRAPH_BREADTH)
        breadth = int(np.ceil(breadth * len(self.ids) / eligible))
        if self.cells is None:
            return None if 4 * breadth > eligible else Effort(breadth, self.effort.proposals)
        return Effort(min(breadth, self.cells), self.effort.proposals)

    def _propose(self, queries: np.ndarray, k: int, allowed: np.ndarray | None, effort: Effort) -> np.ndarray:
        """(Q, P) positions in the snapshot, -1 where the structure found fewer."""
        wanted = self._alive
        if allowed is not None:
            wanted = allowed if self._rows is None else allowed[self._rows] & (self._rows >= 0)
        bitmap = None if wanted is None else np.packbits(wanted, bitorder="little")
        selector = None if bitmap is None else self._faiss.IDSelectorBitmap(bitmap)
        count = min(max(k, FEW_HITS) * effort.proposals, self._structure.ntotal)
        if self.kind == "hnsw":
            parameters = self._faiss.SearchParametersHNSW(efSearch=effort.breadth, sel=selector)
        else:
            parameters = self._faiss.SearchParametersIVF(nprobe=effort.breadth, sel=selector)
        _, found = self._structure.search(queries, count, params=parameters)
        return found if self._rows is None else np.where(found >= 0, self._rows[found], -1)


def installed_faiss() -> Any:
    """The FAISS module.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingDependency("faiss", "pip install 'cots[cpu]' (or 'cots[gpu]', never both)") from error
    return faiss
