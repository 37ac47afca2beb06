"""What benchmarks/search.py compares: one class an engine, each imports what it needs when it is made.

An engine is built over vectors (N, D) float16 and gives rows. Each of its `ladders` lists settings from the quickest
on; an exact engine has one setting. Vectors that must lie on a GPU are copied there when the engine is made, as float16
and in chunks, whatever it makes of them there; queries come and answers go as arrays of the CPU, and that counts.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

TRAINING_VECTORS = 50  # a cell
CHUNK = 1_000_000


class Engine:
    """A way to find the best rows.

    Attributes:
        ladders: settings, each time the quickest first.
        size: bytes of what was made beside the vectors of the table, which are N D float16 in a file.
        build_seconds: if a structure of an earlier run was read, how long that took to make.
    """

    ladders: list[list[Any]] = [[None]]  # noqa: RUF012
    size: int = 0
    build_seconds: float | None = None

    def __init__(self, vectors: np.ndarray, scratch: Path) -> None:
        self.vectors = vectors

    def search(self, queries: np.ndarray, k: int, effort: Any) -> np.ndarray:
        """(Q, D) float32 -> rows (Q, k) int64, best first; -1 where nothing was found."""
        raise NotImplementedError

    def search_allowed(self, queries: np.ndarray, k: int, effort: Any, allowed: np.ndarray) -> np.ndarray:
        """The same among the rows where `allowed` (N,) bool is True."""
        raise NotImplementedError

    def search_alone(self, queries: np.ndarray, k: int, effort: Any) -> Any:
        """What FAISS does of `search`, without what is ours."""
        raise NotImplementedError


class Exact(Engine):
    """index.exact, over the vectors as they lie in the file."""

    def __init__(self, vectors: np.ndarray, scratch: Path) -> None:
        from index.exact import ExactIndex

        self._index = ExactIndex(vectors, np.arange(len(vectors)))

    def search(self, queries: np.ndarray, k: int, effort: Any) -> np.ndarray:
        return self._index.search(queries, k)[1]

    def search_allowed(self, queries: np.ndarray, k: int, effort: Any, allowed: np.ndarray) -> np.ndarray:
        return self._index.search(queries, k, allowed)[1]


class FaissFlat(Engine):
    """FAISS's IndexFlatIP over float32."""

    def __init__(self, vectors: np.ndarray, scratch: Path) -> None:
        import faiss

        self._index = faiss.IndexFlatIP(vectors.shape[1])
        for start in range(0, len(vectors), 65_536):
            self._index.add(vectors[start : start + 65_536].astype(np.float32))
        self.size = 4 * vectors.size

    def search(self, queries: np.ndarray, k: int, effort: Any) -> np.ndarray:
        return self._index.search(queries, k)[1]


class Ours(Engine):
    """index.ann: a structure proposes, exact scores decide. Its ladders are those that index.tuning climbs."""

    kind = ""

    def __init__(self, vectors: np.ndarray, scratch: Path) -> None:
        import faiss

        from index.ann import AnnIndex, Effort, make_structure
        from index.tuning import ladders

        file = scratch / f"{self.kind}-{len(vectors)}.faiss"
        if not file.is_file():
            started = time.perf_counter()
            faiss.write_index(make_structure(self.kind, vectors), str(file))
            file.with_suffix(".seconds").write_text(f"{time.perf_counter() - started:.1f}")
        self._structure = faiss.read_index(str(file))
        self.build_seconds = float(file.with_suffix(".seconds").read_text())
        self.size = file.stat().st_size
        self._index = AnnIndex(self._structure, self.kind, Effort(1), vectors, np.arange(len(vectors)), few_rows=0)
        self.ladders = ladders(self._index)

    def search(self, queries: np.ndarray, k: int, effort: Any) -> np.ndarray:
        self._index.effort = effort
        return self._index.search(queries, k)[1]

    def search_allowed(self, queries: np.ndarray, k: int, effort: Any, allowed: np.ndarray) -> np.ndarray:
        self._index.effort = effort
        return self._index.search(queries, k, allowed)[1]

    def search_alone(self, queries: np.ndarray, k: int, effort: Any) -> Any:
        import faiss

        if self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=effort.breadth)
        else:
            parameters = faiss.SearchParametersIVF(nprobe=effort.breadth)
        return self._structure.search(queries, k * effort.proposals, params=parameters)


class Hnsw(Ours):
    kind = "hnsw"


class Ivf(Ours):
    kind = "ivf"


class IvfPq(Ours):
    kind = "ivfpq"


class Lance(Engine):
    """LanceDB's index of a table of ids and float32 vectors (float16 it indexes many times slower), by its defaults."""

    def __init__(self, vectors: np.ndarray, scratch: Path) -> None:
        import lancedb
        import pyarrow as pa

        dimension = vectors.shape[1]
        schema = pa.schema([pa.field("id", pa.int64()), pa.field("vector", pa.list_(pa.float32(), dimension))])
        self._table = lancedb.connect(str(scratch)).create_table("vectors", schema=schema, mode="overwrite")
        for start in range(0, len(vectors), CHUNK):
            block = vectors[start : start + CHUNK].astype(np.float32)
            column = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), dimension)
            self._table.add(pa.table([pa.array(np.arange(start, start + len(block))), column], schema=schema))
        before = _bytes_of(scratch)
        self._table.create_index("vector", config=self._config())
        self.size = _bytes_of(scratch) - before

    def _config(self) -> Any:
        raise NotImplementedError

    def _ask(self, query: Any, effort: Any) -> Any:
        raise NotImplementedError

    def search(self, queries: np.ndarray, k: int, effort: Any) -> np.ndarray:
        found = np.full((len(queries), k), -1)
        if len(queries) == 1:
            ids = (
                self._ask(self._table.search(queries[0]), effort)
                .limit(k)
                .select(["id", "_distance"])
                .to_arrow()["id"]
                .to_numpy()
            )
            found[0, : len(ids)] = ids
            return found
        answer = self._ask(self._table.search(list(queries)), effort).limit(k).select(["id", "_distance"]).to_arrow()
        numbers, ids = answer["query_index"].to_numpy(), answer["id"].to_numpy()
        for number in range(len(queries)):
            row = ids[numbers == number]
            found[number, : len(row)] = row
        return found


class LanceIvfPq(Lance):
    """IVF_PQ with refining, which reads the vectors of the proposals again. Settings are (cells, proposals a hit)."""

    ladders = [[(cells, refine) for cells in (1, 2, 4, 8, 16, 32, 64, 128, 256)] for refine in (4, 16, 64, 256)]  # noqa: RUF012

    def _config(self) -> Any:
        from lancedb.index import IvfPq

        return IvfPq(distance_type="dot")

    def _ask(self, query: Any, effort: Any) -> Any:
        return query.distance_type("dot").nprobes(effort[0]).refine_factor(effort[1])


class LanceHnsw(Lance):
    """A graph of 8-bit vectors in each cell of an IVF. Settings are (cells, breadth of the walk)."""

    ladders = [[(cells, breadth) for cells in (1, 2, 4, 8, 16, 32, 64)] for breadth in (20, 64)]  # noqa: RUF012

    def _config(self) -> Any:
        from lancedb.index import HnswSq

        return HnswSq(distance_type="dot")

    def _ask(self, query: Any, effort: Any) -> Any:
        return query.distance_type("dot").nprobes(effort[0]).ef(effort[1]).refine_factor(2)


class ExactGpu(Exact):
    """index.exact_gpu: our kernels."""

    def __init__(self, vectors: np.ndarray, scratch: Path) -> None:
        from index.exact_gpu import ExactGpuIndex

        self._index = ExactGpuIndex(vectors, np.arange(len(vectors)), "cuda")


class TorchGpu(Engine):
    """A matrix product in float16 and topk, a chunk of vectors at a time when the scores would be too many."""

    SCORES = 2**31

    def __init__(self, vectors: np.ndarray, scratch: Path) -> None:
        import torch

        self._torch = torch
        self._vectors = torch.empty(vectors.shape, dtype=torch.float16, device="cuda")
        for start in range(0, len(vectors), CHUNK):
            self._vectors[start : start + CHUNK] = _on_gpu(vectors[start : start + CHUNK])

    def search(self, queries: np.ndarray, k: int, effort: Any) -> np.ndarray:
        torch = self._torch
        asked = torch.from_numpy(queries).to("cuda", torch.float16)
        chunk = max(self.SCORES // len(queries), 1)
        scores, rows = [], []
        for start in range(0, len(self._vectors), chunk):
            best = (asked @ self._vectors[start : start + chunk].T).topk(k)
            scores.append(best.values)
            rows.append(best.indices + start)
        order = torch.cat(scores, dim=1).topk(k).indices
        return torch.cat(rows, dim=1).gather(1, order).cpu().numpy()


class FaissGpu(Engine):
    """FAISS on one GPU."""

    def __init__(self, vectors: np.ndarray, scratch: Path) -> None:
        import faiss
        import torch

        if not hasattr(faiss, "StandardGpuResources"):
            raise ImportError("this FAISS has no GPU code")
        self._resources = faiss.StandardGpuResources()
        self._index = self._empty(faiss, *vectors.shape)
        if not self._index.is_trained:
            self._train(vectors)
        for start in range(0, len(vectors), CHUNK):
            block = _on_gpu(vectors[start : start + CHUNK]).float()
            torch.cuda.synchronize()  # FAISS has streams of its own
            self._index.add_c(len(block), faiss.cast_integer_to_float_ptr(block.data_ptr()))
            torch.cuda.synchronize()
        del block
        torch.cuda.empty_cache()

    def _empty(self, faiss: Any, count: int, dimension: int) -> Any:
        raise NotImplementedError

    def _train(self, vectors: np.ndarray) -> None:
        raise NotImplementedError

    def search(self, queries: np.ndarray, k: int, effort: Any) -> np.ndarray:
        return self._index.search(queries, k)[1]


class FaissGpuFlat(FaissGpu):
    """Exact, vectors of float16."""

    def _empty(self, faiss: Any, count: int, dimension: int) -> Any:
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = True
        return faiss.GpuIndexFlatIP(self._resources, dimension, config)


class FaissGpuIvf(FaissGpu):
    """float16 vectors in 4 sqrt(N) cells, of which an effort's number is searched."""

    ladders = [[1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256]]  # noqa: RUF012

    def _empty(self, faiss: Any, count: int, dimension: int) -> Any:
        cells = 2 ** round(np.log2(4 * count**0.5))
        half, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        return faiss.GpuIndexIVFScalarQuantizer(self._resources, dimension, cells, half, metric, False)

    def _train(self, vectors: np.ndarray) -> None:
        count = min(len(vectors), TRAINING_VECTORS * self._index.nlist)
        rows = np.sort(np.random.default_rng(0).choice(len(vectors), count, replace=False))
        self._index.train(vectors[rows].astype(np.float32))
        self._index.reserveMemory(len(vectors))  # vectors come 32,768 at a time, and each cell would grow many times

    def search(self, queries: np.ndarray, k: int, effort: Any) -> np.ndarray:
        self._index.nprobe = effort
        return self._index.search(queries, k)[1]


def _on_gpu(vectors: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.array(vectors)).cuda()


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


ENGINES: dict[str, type[Engine]] = {
    "exact": Exact,
    "faiss-flat": FaissFlat,
    "hnsw": Hnsw,
    "ivf": Ivf,
    "ivfpq": IvfPq,
    "lance-ivfpq": LanceIvfPq,
    "lance-hnsw": LanceHnsw,
    "exact-gpu": ExactGpu,
    "torch-gpu": TorchGpu,
    "faiss-gpu-flat": FaissGpuFlat,
    "faiss-gpu-ivf": FaissGpuIvf,
}
