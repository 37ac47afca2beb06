"""Exact search is what brute force finds, on one core and on several, in one block and in many."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import index.exact
from index.exact import ExactIndex

# Of the second, a few hundred vectors are many blocks, shared out among the cores.
BLOCKS = pytest.mark.parametrize("block", [4096, 16], ids=["one block", "blocks"])


def unit_vectors(rng: np.random.Generator, count: int, dimension: int) -> np.ndarray:
    vectors = rng.standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(vectors: np.ndarray, query: np.ndarray, k: int, allowed: np.ndarray | None) -> np.ndarray:
    """The k best scores, in float64."""
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    return np.sort(scores if allowed is None else scores[allowed])[::-1][:k]


@BLOCKS
@settings(max_examples=60)
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
    block: int, count: int, dimension: int, queries: int, k: int, share: float | None, doubles: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit_vectors(rng, count, dimension)
    if doubles and count:
        vectors = vectors[rng.integers(0, count, count)]
    vectors = vectors.astype(np.float16)
    ids = rng.permutation(10**12 + np.arange(count))
    asked = unit_vectors(rng, queries, dimension)
    allowed = None if share is None else rng.random(count) < share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("index.exact.BLOCK", block)
        patch.setattr("index.exact.FEW", block)
        scores, found = ExactIndex(vectors, ids).search(asked, k, allowed)
    eligible = count if allowed is None else int(allowed.sum())
    assert scores.shape == found.shape == (queries, min(k, eligible))
    position = {int(id): row for row, id in enumerate(ids)}
    for query, row_scores, row_ids in zip(asked, scores, found, strict=True):
        np.testing.assert_allclose(row_scores, brute_force(vectors, query, k, allowed), atol=2e-6)
        rows = [position[int(id)] for id in row_ids]
        assert len(set(rows)) == len(rows)
        assert allowed is None or allowed[rows].all()
        np.testing.assert_allclose(vectors[rows].astype(np.float32) @ query, row_scores, atol=2e-6)


@BLOCKS
@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_damaged_vectors_are_last(block: int, damage: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.exact.BLOCK", block)
    monkeypatch.setattr("index.exact.FEW", block)
    vectors = unit_vectors(np.random.default_rng(0), 100, 8).astype(np.float16)
    vectors[5:95] = damage * np.array([1, -1] * 4)
    scores, found = ExactIndex(vectors, np.arange(100)).search(np.full((2, 8), 0.35, np.float32), 20)
    assert set(found[0, :10].tolist()) == {*range(5), *range(95, 100)}
    assert np.isfinite(scores[:, :10]).all()
    assert np.isnan(scores[:, 10:]).all()
    assert found[0, 10:].tolist() == list(range(5, 15))


def test_equal_scores_come_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.exact.BLOCK", 8)
    monkeypatch.setattr("index.exact.FEW", 8)
    vectors = np.tile(np.eye(4, dtype=np.float16), (50, 1))
    _, found = ExactIndex(vectors, np.arange(200)).search(np.eye(4, dtype=np.float32), 5)
    assert found.tolist() == [[first + 4 * step for step in range(5)] for first in range(4)]


@pytest.mark.parametrize("order", [1, -1], ids=["ascending", "descending"])
def test_vectors_that_get_better_and_better_are_few_to_sort(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    queries = unit_vectors(rng, 1, 8) + 0.01 * unit_vectors(rng, 20, 8)
    vectors = unit_vectors(rng, 60_000, 8)
    vectors = vectors[np.argsort(vectors @ queries[0])[::order]].astype(np.float16)
    settle, sorted_at_once = index.exact._Best.settle, []

    def settle_and_count(best: index.exact._Best, *more: index.exact.Triples) -> None:
        sorted_at_once.append(best._count + sum(len(part[0]) for part in more))
        settle(best, *more)

    monkeypatch.setattr(index.exact._Best, "settle", settle_and_count)
    scores, _ = ExactIndex(vectors, np.arange(60_000)).search(queries, 10)
    assert max(sorted_at_once) <= 12 * 10 * 20
    for query, found in zip(queries, scores, strict=True):
        np.testing.assert_allclose(found, brute_force(vectors, query, 10, None), atol=2e-6)


def test_more_queries_than_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.exact.MOST_QUERIES", 7)
    vectors = unit_vectors(np.random.default_rng(3), 500, 8)
    scores, found = ExactIndex(vectors, np.arange(500)).search(vectors[:50], 2)
    assert found[:, 0].tolist() == list(range(50))
    assert scores.shape == (50, 2)


def test_vectors_that_may_not_be_written_are_read_in_place_and_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    np.save(tmp_path / "vectors.npy", unit_vectors(np.random.default_rng(1), 9000, 8).astype(np.float16))
    vectors = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    _, found = ExactIndex(vectors, np.arange(9000)).search(vectors[4500:4503].astype(np.float32), 1)
    assert found[:, 0].tolist() == [4500, 4501, 4502]
    assert not recwarn.list


def test_a_forked_process_searches_as_well() -> None:
    vectors = unit_vectors(np.random.default_rng(2), 9000, 8).astype(np.float16)
    index = ExactIndex(vectors, np.arange(9000))
    index.search(vectors[:1].astype(np.float32), 1)  # starts the threads, of which a child has none
    with multiprocessing.get_context("fork").Pool(1) as pool:
        _, found = pool.apply_async(index.search, (vectors[7:8].astype(np.float32), 1)).get(timeout=120)
    assert found.tolist() == [[7]]
