"""Exact search is what brute force finds, with FAISS and without."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.exact import ExactIndex

ENGINES = pytest.mark.parametrize("engine", [faiss, None], ids=["faiss", "product"])


def unit_vectors(rng: np.random.Generator, count: int, dimension: int) -> np.ndarray:
    vectors = rng.standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(vectors: np.ndarray, query: np.ndarray, k: int, allowed: np.ndarray | None) -> np.ndarray:
    """The k best scores, in float64."""
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    return np.sort(scores if allowed is None else scores[allowed])[::-1][:k]


@ENGINES
@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(0, 300),
    dimension=st.integers(1, 40),
    queries=st.integers(1, 5),
    k=st.integers(1, 400),
    share=st.one_of(st.none(), st.sampled_from([0.0, 0.01, 0.3, 1.0])),
    doubles=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_hits_are_those_of_brute_force(
    engine: object, count: int, dimension: int, queries: int, k: int, share: float | None, doubles: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit_vectors(rng, count, dimension)
    if doubles and count:
        vectors = vectors[rng.integers(0, count, count)]
    vectors = vectors.astype(np.float16)
    ids = rng.permutation(10**12 + np.arange(count))
    asked = unit_vectors(rng, queries, dimension)
    allowed = None if share is None else rng.random(count) < share
    scores, found = ExactIndex(vectors, ids, faiss=engine).search(asked, k, allowed)
    eligible = count if allowed is None else int(allowed.sum())
    assert scores.shape == found.shape == (queries, min(k, eligible))
    position = {int(id): row for row, id in enumerate(ids)}
    for query, row_scores, row_ids in zip(asked, scores, found, strict=True):
        np.testing.assert_allclose(row_scores, brute_force(vectors, query, k, allowed), atol=2e-6)
        rows = [position[int(id)] for id in row_ids]
        assert len(set(rows)) == len(rows)
        assert allowed is None or allowed[rows].all()
        np.testing.assert_allclose(vectors[rows].astype(np.float32) @ query, row_scores, atol=2e-6)


@ENGINES
def test_vectors_are_added_in_blocks(engine: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.exact.BLOCK", 7)
    vectors = unit_vectors(np.random.default_rng(0), 30, 4)
    _, found = ExactIndex(vectors, np.arange(30), faiss=engine).search(vectors, 1)
    assert found[:, 0].tolist() == list(range(30))
