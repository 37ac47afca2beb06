"""What the tests of exact search on a GPU and of the engine that chooses it share."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from index import exact_gpu
from index.exact_gpu import ExactGpuIndex
from index.topk_passes import Passes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The few vectors of these tests would all be scored by the second pass alone."""
    monkeypatch.setattr(exact_gpu, "FEW_SCORES", 0)


@pytest.fixture
def little_gpu_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def unit_vectors(rng: np.random.Generator, count: int, dimension: int) -> np.ndarray:
    vectors = rng.standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def drawn(
    seed: int, count: int, dimension: int, queries: int, share: float | None, doubles: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    vectors = unit_vectors(rng, count, dimension)
    if doubles and count:
        vectors = vectors[rng.integers(0, max(count // 3, 1), count)]
    allowed = None if share is None else rng.random(count) < share
    return vectors.astype(np.float16), unit_vectors(rng, queries, dimension), allowed


def assert_exact(
    index: ExactGpuIndex, vectors: np.ndarray, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> None:
    """The index holds `vectors`, of ids 1000, 1001, ...; scores are compared with those of float64."""
    scores, ids = index.search(queries, k, allowed)
    eligible = len(vectors) if allowed is None else int(allowed.sum())
    assert scores.shape == ids.shape == (len(queries), min(k, eligible))
    assert scores.dtype == np.float32
    assert ids.dtype == np.int64
    stored = torch.from_numpy(vectors.astype(np.float16)).to(index.device).double()
    truth = torch.from_numpy(queries).to(index.device).double() @ stored.T
    if allowed is not None:
        truth[:, torch.from_numpy(~allowed).to(index.device)] = -torch.inf
    best = truth.topk(scores.shape[1], dim=1).values.cpu()
    tolerance = 2e-6 * max(1.0, float(np.abs(queries).max(initial=0)))
    np.testing.assert_allclose(scores, best, atol=tolerance)
    positions = ids - 1000
    of_hits = truth.gather(1, torch.from_numpy(positions).to(index.device)).cpu()
    np.testing.assert_allclose(of_hits, scores, atol=tolerance)
    assert all(len(set(row)) == len(row) for row in positions.tolist())


def filled(vectors: np.ndarray, passes: Passes | None = None, device: str = "cpu") -> ExactGpuIndex:
    return ExactGpuIndex(vectors, 1000 + np.arange(len(vectors)), device, passes)
