"""FAISS structures: scores are exact, filters hold, k hits are given when k exist, recall is measured."""

from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cots.errors import GalleryError
from index import ann
from index.ann import AnnIndex, Effort, make_structure
from index.exact import ExactIndex
from index.tuning import Queries, tune

KINDS = ("hnsw", "ivf", "ivfpq")
BY_KIND = pytest.mark.parametrize("kind", KINDS)


def clustered(rng: np.random.Generator, count: int, dimension: int) -> np.ndarray:
    centres = rng.standard_normal((max(count // 20, 1), dimension))
    vectors = centres[rng.integers(0, len(centres), count)] + 0.5 * rng.standard_normal((count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(autouse=True)
def _structures_of_few_rows_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, a filter that leaves few rows, as all do here, would be answered by comparing them."""
    monkeypatch.setattr(ann, "FEW_ROWS", 0)


def assert_right(index: AnnIndex, vectors: np.ndarray, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> None:
    """All that must hold of the hits however approximate they are."""
    scores, ids = index.search(queries, k, allowed)
    eligible = len(vectors) if allowed is None else int(allowed.sum())
    assert scores.shape == ids.shape == (len(queries), min(k, eligible))
    positions = ids - 1000
    for row, query in enumerate(queries):
        assert len(set(ids[row])) == len(ids[row])
        assert allowed is None or allowed[positions[row]].all()
        np.testing.assert_allclose(scores[row], vectors[positions[row]].astype(np.float32) @ query, atol=2e-6)
        assert (np.diff(scores[row]) <= 0).all()


@BY_KIND
@settings(max_examples=25)
@given(
    count=st.integers(1, 400),
    dimension=st.sampled_from([3, 7, 16, 32]),
    k=st.integers(0, 500),
    share=st.one_of(st.none(), st.sampled_from([0.0, 0.01, 0.3, 1.0])),
    doubles=st.booleans(),
    missing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_hits_are_right(
    kind: str, count: int, dimension: int, k: int, share: float | None, doubles: bool, missing: float, seed: int
) -> None:
    """Of a structure over other rows than the snapshot's too: some gone, some added, all in another order."""
    rng = np.random.default_rng(seed)
    vectors = clustered(rng, count, dimension)
    if doubles:
        vectors = vectors[rng.integers(0, count, count)]
    rows = rng.permutation(count) if missing else None
    held = vectors
    if rows is not None:
        held = vectors[rows]
        rows[rng.random(count) < missing] = -1
    index = AnnIndex(make_structure(kind, held), kind, Effort(2), vectors, 1000 + np.arange(count), rows)
    allowed = None if share is None else rng.random(count) < share
    assert_right(index, vectors, unit(rng.standard_normal((3, dimension))), k, allowed)


@BY_KIND
def test_the_target_is_reached_on_queries_that_did_not_choose(kind: str) -> None:
    rng = np.random.default_rng(0)
    vectors = clustered(rng, 3000, 32)
    queries = Queries(unit(vectors[:400] + rng.standard_normal((400, 32)) / 6), "noisy vectors")
    index = AnnIndex(make_structure(kind, vectors), kind, Effort(1), vectors, np.arange(3000))
    measured = tune(index, vectors, queries, 0.95)
    assert measured.recall["10"] >= 0.93
    assert measured.queries == "200 noisy vectors"
    assert measured.recall.keys() == {"1", "10", "100"}
    exact = ExactIndex(vectors, np.arange(3000)).search(queries.vectors[1::2], 10)[1]
    found = index.search(queries.vectors[1::2], 10)[1]
    overlap = np.mean([len(set(one) & set(other)) / 10 for one, other in zip(found, exact)])
    assert overlap == pytest.approx(measured.recall["10"], abs=0.005)
    for share in (0.5, 0.1):
        allowed = rng.random(3000) < share
        exact = ExactIndex(vectors, np.arange(3000)).search(queries.vectors[1::2], 10, allowed)[1]
        found = index.search(queries.vectors[1::2], 10, allowed)[1]
        assert np.mean([len(set(one) & set(other)) / 10 for one, other in zip(found, exact)]) >= 0.9


@BY_KIND
def test_a_filter_that_leaves_only_far_rows_still_gives_k(kind: str) -> None:
    """The cells and the part of the graph that are near the query hold none of them."""
    rng = np.random.default_rng(1)
    vectors = clustered(rng, 2000, 16)
    query = vectors[:1].astype(np.float32)
    scores = vectors.astype(np.float32) @ query[0]
    allowed = scores < np.sort(scores)[200]
    index = AnnIndex(make_structure(kind, vectors), kind, Effort(1), vectors, 1000 + np.arange(2000))
    assert_right(index, vectors, query, 50, allowed)


@BY_KIND
def test_rows_added_later_are_found_and_changed_ones_by_what_they_are(kind: str) -> None:
    rng = np.random.default_rng(2)
    old = clustered(rng, 500, 16)
    structure = make_structure(kind, old)
    new = np.concatenate([old, clustered(rng, 20, 16)])
    new[:10] = clustered(rng, 10, 16)
    rows = np.arange(500)
    rows[:10] = -1
    index = AnnIndex(structure, kind, Effort(1), new, np.arange(520), rows)
    scores, ids = index.search(np.concatenate([new[:10], new[500:]]).astype(np.float32), 1)
    assert ids[:, 0].tolist() == [*range(10), *range(500, 520)]
    np.testing.assert_allclose(scores, 1, atol=2e-3)
    assert index.uncovered.tolist() == [*range(10), *range(500, 520)]


@BY_KIND
def test_queries_and_filters_that_cannot_be_used_are_refused(kind: str) -> None:
    vectors = clustered(np.random.default_rng(3), 50, 8)
    approximate = AnnIndex(make_structure(kind, vectors), kind, Effort(1), vectors, np.arange(50))
    for index in (approximate, ExactIndex(vectors, np.arange(50))):
        with pytest.raises(GalleryError, match=r"shape \(1, 9\) cannot be compared with vectors of 8 dimensions"):
            index.search(np.ones((1, 9), np.float32), 3)
        with pytest.raises(GalleryError, match="is not finite"):
            index.search(np.full((1, 8), np.nan, np.float32), 3)
        for mask in (np.ones(49, bool), np.ones(51, bool), np.arange(50), np.ones((50, 1), bool)):
            with pytest.raises(GalleryError, match=r"A filter of \w+ and shape \(.*says nothing of 50 rows"):
                index.search(np.ones((1, 8), np.float32), 3, mask)


@BY_KIND
@pytest.mark.parametrize("flag", ["IO_FLAG_MMAP", "IO_FLAG_MMAP_IFC"])
def test_a_mapped_file_gives_the_same_hits_and_is_not_written_to(kind: str, flag: str, tmp_path: Path) -> None:
    vectors = clustered(np.random.default_rng(4), 1000, 16)
    structure = make_structure(kind, vectors)
    path = tmp_path / "index.faiss"
    faiss.write_index(structure, str(path))
    content = path.read_bytes()
    path.chmod(0o444)
    mapped = faiss.read_index(str(path), getattr(faiss, flag))
    queries, allowed = vectors[:20].astype(np.float32), np.arange(1000) % 3 > 0
    ids = np.arange(1000)
    expected = AnnIndex(structure, kind, Effort(2), vectors, ids).search(queries, 5, allowed)
    found = AnnIndex(mapped, kind, Effort(2), vectors, ids).search(queries, 5, allowed)
    np.testing.assert_array_equal(found[1], expected[1])
    assert path.read_bytes() == content


@pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="FAISS is installed without GPUs")
@pytest.mark.parametrize("kind", ["ivf", "ivfpq"])
def test_one_made_on_a_gpu_is_as_good_and_takes_filters(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    vectors = clustered(rng, 20_000, 64)
    queries = Queries(unit(vectors[:400] + rng.standard_normal((400, 64)) / 8), "noisy vectors")
    on_cpu = AnnIndex(make_structure(kind, vectors), kind, Effort(1), vectors, 1000 + np.arange(20_000))
    expected = tune(on_cpu, vectors, queries, 0.95)
    monkeypatch.setattr(ann, "GPU_VECTORS", 0)
    structure = make_structure(kind, vectors)
    assert caplog.messages == []
    assert not isinstance(structure, faiss.GpuIndex)
    faiss.write_index(structure, str(tmp_path / "index.faiss"))
    structure = faiss.read_index(str(tmp_path / "index.faiss"))
    assert structure.ntotal == 20_000
    index = AnnIndex(structure, kind, Effort(1), vectors, 1000 + np.arange(20_000))
    measured = tune(index, vectors, queries, 0.95)
    assert measured.recall["10"] >= 0.93
    assert index.effort.breadth <= 2 * on_cpu.effort.breadth, (measured, expected)
    for allowed in (None, rng.random(20_000) < 0.3):
        assert_right(index, vectors, queries.vectors[:20], 10, allowed)


def test_what_a_gpu_cannot_do_the_cpu_does(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With a GPU: seven dimensions in one-byte parts are not among those that FAISS quantises there."""
    monkeypatch.setattr(ann, "GPU_VECTORS", 0)
    vectors = clustered(np.random.default_rng(6), 2000, 7)
    index = AnnIndex(make_structure("ivfpq", vectors), "ivfpq", Effort(2), vectors, 1000 + np.arange(2000))
    assert_right(index, vectors, unit(vectors[:5]), 10, None)
    assert all("The CPU makes the structure ivfpq" in message for message in caplog.messages)
