"""Exact search on a device is what brute force finds, by plain torch and by the kernels interpreted.

The kernels run in Triton's interpreter, which must be asked for before Triton is imported; so they do in a process of
their own, which runs the tests below that are marked `interpreted`.
"""

import os
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from exact_gpu_checks import INTERPRETED, assert_exact, both_passes, drawn, filled, on_gpu, unit_vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from cots.errors import GalleryError
from index import allowed_rows, exact_gpu
from index.exact import ExactIndex
from index.exact_gpu import ExactGpuIndex
from index.topk_passes import (
    FEW_QUERIES,
    MANY_QUERIES,
    SLICE,
    Passes,
    TileShape,
    TorchPasses,
    TritonPasses,
    padded_width,
)

__all__ = ["both_passes"]

interpreted = pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled unless TRITON_INTERPRET=1 is set")
KERNELS = ("resident", "streamed")
SHARES = st.one_of(st.none(), st.sampled_from([0.0, 0.01, 0.3, 1.0]))


def interpreted_passes(kernel: str, dimension: int) -> Passes:
    """Tiles as small as the kernels allow, so that few vectors make many; two multiprocessors."""
    shape = TileShape(kernel, queries=16, tile=32, block=16, stages=2, warps=4)
    width = padded_width(dimension)
    return TritonPasses(width, 2, 2**20, few=(shape,), some=(shape,), many=(shape,))


@settings(max_examples=100)
@given(
    count=st.integers(0, 2000),
    dimension=st.sampled_from([1, 7, 16, 48, 300]),
    queries=st.integers(0, 4),
    k=st.integers(0, 2100),
    share=SHARES,
    doubles=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_hits_are_those_of_brute_force(
    count: int, dimension: int, queries: int, k: int, share: float | None, doubles: bool, seed: int
) -> None:
    vectors, asked, allowed = drawn(seed, count, dimension, queries, share, doubles)
    assert_exact(filled(vectors, TorchPasses(block=16)), vectors, asked, k, allowed)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@settings(max_examples=50)
@given(
    count=st.integers(0, 2000),
    queries=st.integers(1, 4),
    k=st.integers(1, 300),
    share=SHARES,
    doubles=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_second_pass_alone_finds_the_same(
    device: str, count: int, queries: int, k: int, share: float | None, doubles: bool, seed: int
) -> None:
    """On either side of what is few."""
    vectors, asked, allowed = drawn(seed, count, 48, queries, share, doubles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_gpu, "FEW_SCORES", 2000)
        index = filled(vectors, TorchPasses(block=16) if device == "cpu" else None, device)
        assert_exact(index, vectors, asked, k, allowed)


def test_blocks_are_found_through_their_groups() -> None:
    """So many that the maxima themselves are looked for by a maximum of each 64, and some are left over."""
    rng = np.random.default_rng(0)
    vectors = unit_vectors(rng, 16 * 64 * 50 + 330, 16).astype(np.float16)
    index = filled(vectors, TorchPasses(block=16))
    queries = np.concatenate([unit_vectors(rng, 10, 16), vectors[-3:].astype(np.float32)])
    for k in (1, 4):
        assert_exact(index, vectors, queries, k)
        assert_exact(index, vectors, queries, k, rng.random(len(vectors)) < 0.5)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=5),
    share=SHARES,
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_appended_is_found(sizes: list[int], share: float | None, seed: int) -> None:
    vectors, asked, _ = drawn(seed, sum(sizes), 24, 3, None, False)
    allowed = None if share is None else np.random.default_rng(seed).random(len(vectors)) < share
    index = filled(vectors[: sizes[0]], TorchPasses(block=16))
    for size in sizes[1:]:
        start = len(index)
        index.append(vectors[start : start + size], 1000 + np.arange(start, start + size))
    assert index.ids.tolist() == list(range(1000, 1000 + len(vectors)))
    assert_exact(index, vectors, asked, 7, allowed)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_filters_that_cannot_change_are_kept_until_something_is_appended(device: str) -> None:
    rng = np.random.default_rng(16)
    vectors = unit_vectors(rng, 6000, 32).astype(np.float16)
    vectors[7] = np.nan
    sound = np.ones(6000, bool)
    sound[7] = False
    passes = TorchPasses(block=16) if device == "cpu" else None
    index = filled(vectors[:5000], passes, device)
    queries = unit_vectors(rng, 3, 32)
    for turn in range(40):  # more filters than are kept, some at the address of one that has gone
        allowed = (rng.random(5000) < (0.01, 0.5, 0.9)[turn % 3]) & sound[:5000]
        allowed.flags.writeable = False
        for _ in range(3):
            assert_exact(index, vectors[:5000], queries, 10, allowed)
            assert_exact(index, vectors[:5000], queries, 10, sound[:5000].copy())
        assert len(index._filters._kept) <= allowed_rows.KEPT
    kept = sound[:5000].copy()
    kept.flags.writeable = False
    assert_exact(index, vectors[:5000], queries, 10, kept)
    index.append(vectors[5000:], 1000 + np.arange(5000, 6000))
    sound.flags.writeable = False
    for _ in range(3):
        assert_exact(index, vectors, queries, 10, sound)
        np.testing.assert_array_equal(index.search(queries, 10)[1], index.search(queries, 10, sound)[1])


def test_what_was_prepared_before_an_append_is_not_kept_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_vectors(np.random.default_rng(17), 400, 8)
    index = filled(vectors[:300])
    filters = index._filters
    prepared = filters._prepared
    appending = Thread(target=index.append, args=(vectors[300:], 1300 + np.arange(100)))

    def prepared_meanwhile(allowed: np.ndarray | None, number: int | None) -> Any:
        searched = prepared(allowed, number)
        appending.start()
        appending.join()
        return searched

    with monkeypatch.context() as patch:
        patch.setattr(filters, "_prepared", prepared_meanwhile)
        index.search(vectors[:1], 1)
    assert_exact(index, vectors, vectors[290:310], 5)


def test_tensors_are_taken_as_they_are() -> None:
    vectors = unit_vectors(np.random.default_rng(14), 300, 8).astype(np.float16)
    index = ExactGpuIndex(torch.from_numpy(vectors).float(), 1000 + np.arange(300), "cpu")
    assert_exact(index, vectors, vectors[:3].astype(np.float32), 4)


def test_vectors_are_copied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_gpu, "UPLOAD", 7)
    vectors = unit_vectors(np.random.default_rng(0), 30, 8).astype(np.float16)
    assert_exact(filled(vectors), vectors, vectors.astype(np.float32), 3)


def test_queries_are_answered_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_gpu, "SCRATCH", 100_000)
    rng = np.random.default_rng(1)
    vectors = unit_vectors(rng, 3000, 8).astype(np.float16)
    assert_exact(filled(vectors, TorchPasses(block=16)), vectors, unit_vectors(rng, 40, 8), 5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_a_vector_that_is_not_finite_comes_last_and_disturbs_no_other(value: float) -> None:
    rng = np.random.default_rng(2)
    vectors = unit_vectors(rng, 200, 8)
    spoilt = vectors.copy()
    spoilt[[3, 150], 2] = value
    index = filled(spoilt, TorchPasses(block=16))
    sound = np.ones(200, bool)
    sound[[3, 150]] = False
    query = unit_vectors(rng, 2, 8)
    assert_exact(index, vectors, query, 10, sound)
    scores, ids = index.search(query, 500)
    expected, expected_ids = filled(vectors).search(query, 198, sound)
    np.testing.assert_allclose(scores[:, :198], expected, atol=1e-6)
    np.testing.assert_array_equal(ids[:, :198], expected_ids)
    assert np.isnan(scores[:, 198:]).all()
    assert ids[:, 198:].tolist() == [[1003, 1150]] * 2
    allowed = np.zeros(200, bool)
    allowed[[3, 7]] = True
    scores, ids = index.search(query, 5, allowed)
    assert ids.tolist() == [[1007, 1003]] * 2
    assert np.isnan(scores[:, 1]).all()


def test_what_is_no_number_is_answered_as_on_the_cpu() -> None:
    vectors = unit_vectors(np.random.default_rng(15), 100, 8)
    vectors[[4, 70]] = np.nan
    query = vectors[:2]
    for k in (3, 98, 100):
        expected, expected_ids = ExactIndex(vectors, 1000 + np.arange(100)).search(query, k)
        scores, ids = filled(vectors).search(query, k)
        np.testing.assert_allclose(scores, expected, atol=1e-3)
        np.testing.assert_array_equal(ids[:, 98:], expected_ids[:, 98:])


def test_queries_of_any_length_are_answered() -> None:
    """Half precision holds nothing above 65,504 and little below a millionth."""
    rng = np.random.default_rng(3)
    vectors = unit_vectors(rng, 1500, 16).astype(np.float16)
    queries = unit_vectors(rng, 1, 16)
    index = filled(vectors, TorchPasses(block=16))
    expected = index.search(queries, 4)
    for length in (1e-12, 1e8):
        scores, ids = index.search(length * queries, 4)
        np.testing.assert_array_equal(ids, expected[1])
        np.testing.assert_allclose(scores, length * expected[0], rtol=1e-5)
    assert_exact(index, vectors, 0 * queries, 4)


def test_queries_and_filters_that_cannot_be_used_are_refused() -> None:
    index = filled(unit_vectors(np.random.default_rng(4), 10, 8))
    with pytest.raises(GalleryError, match=r"shape \(1, 9\) cannot be compared with vectors of 8 dimensions"):
        index.search(np.ones((1, 9), np.float32), 3)
    with pytest.raises(GalleryError, match="is not finite"):
        index.search(np.full((1, 8), np.nan, np.float32), 3)
    for mask in (np.ones(9, bool), np.ones(11, bool), np.arange(10), np.ones((10, 1), bool)):
        with pytest.raises(GalleryError, match=r"A filter of \w+ and shape \(.*says nothing of 10 rows"):
            index.search(np.ones((1, 8), np.float32), 3, mask)


def test_the_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stdout:
        pytest.skip("Triton's interpreter relies on a conversion that NumPy has dropped in 2.5")
    assert done.returncode == 0, done.stdout[-4000:]


@interpreted
@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=4)
@given(
    count=st.integers(130, 350),
    dimension=st.sampled_from([16, 48, 64]),
    queries=st.integers(1, 10),
    share=st.one_of(st.none(), st.just(0.4)),
    doubles=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_interpreted_kernels_find_what_brute_force_finds(
    kernel: str, count: int, dimension: int, queries: int, share: float | None, doubles: bool, seed: int
) -> None:
    vectors, asked, allowed = drawn(seed, count, dimension, queries, share, doubles)
    assert_exact(filled(vectors, interpreted_passes(kernel, dimension)), vectors, asked, 1, allowed)


@interpreted
def test_interpreted_kernels_score_few_vectors_without_maxima(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_gpu, "FEW_SCORES", 1000)
    vectors, asked, allowed = drawn(6, 330, 48, 3, 0.5, True)
    index = filled(vectors, interpreted_passes("streamed", 48))
    assert_exact(index, vectors, asked, 4)
    assert_exact(index, vectors, asked, 4, allowed)


@interpreted
@pytest.mark.parametrize("dimension", [256, 384, 512, 768])
def test_interpreted_kernels_take_long_vectors(dimension: int) -> None:
    vectors, asked, _ = drawn(dimension, 300, dimension, 2, None, False)
    kernels = KERNELS if dimension == 256 else ("streamed",)
    for kernel in kernels:
        assert_exact(filled(vectors, interpreted_passes(kernel, dimension)), vectors, asked, 2)


@interpreted
@pytest.mark.parametrize("kernel", KERNELS)
def test_interpreted_kernels_take_many_queries_with_rounded_numbers(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_gpu, "FEW_QUERIES", 4)
    vectors, asked, allowed = drawn(5, 250, 32, 9, 0.7, True)
    index = filled(vectors, interpreted_passes(kernel, 32))
    assert_exact(index, vectors, asked, 2)
    assert_exact(index, vectors, asked, 2, allowed)


@interpreted
def test_interpreted_kernels_tell_apart_what_rounding_confuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors in all directions, whose scores differ by less than a rounded query's are off."""
    monkeypatch.setattr(exact_gpu, "FEW_QUERIES", 4)
    rng = np.random.default_rng(0)
    queries = np.resize(unit_vectors(rng, 1, 64), (5, 64))
    vectors = unit_vectors(rng, 900, 64)
    vectors += (0.5 - vectors @ queries[0])[:, None] * queries[0]
    vectors = vectors.astype(np.float16)
    assert_exact(filled(vectors, interpreted_passes("resident", 64)), vectors, queries, 1)


@pytest.mark.skipif(INTERPRETED, reason="the kernels are interpreted")
@pytest.mark.parametrize("shape", [FEW_QUERIES[0], *MANY_QUERIES[:3]], ids=str)
def test_a_hopper_gets_its_own_instructions_and_no_more_shared_memory_than_reckoned(
    shape: TileShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for an H100 without one: matrix products of warp groups, tiles fetched by the copy engine."""
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from index import topk_kernels

    width = 256
    depth = SLICE if shape.kernel == "streamed" else width
    constants = {
        "QUERIES": shape.queries,
        "TILE": shape.tile,
        "BLOCK": shape.block,
        "STAGES": shape.stages,
        "PAIRED": shape in FEW_QUERIES,
        "MASKED": True,
    }
    if shape.kernel == "streamed":
        constants |= {"D": width, "DEPTH": depth}
    types = {
        "vectors": f"tensordesc<fp16[{shape.tile}, {depth}]>",
        "queries": f"tensordesc<fp16[{shape.queries}, {depth}]>",
        "mask": "*i32",
        "maxima": "*fp32",
        "rows": "i32",
        "tiles": "i32",
        "lanes": "i32",
    }
    kernel = getattr(topk_kernels, f"{shape.kernel}_maxima")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    compiled = triton.compile(
        triton.compiler.ASTSource(kernel, signature=signature, constexprs=constants),
        target=triton.backends.compiler.GPUTarget("cuda", 90, 32),
        options={"num_warps": shape.warps},
    )
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= shape.shared_bytes(width) <= 227 * 1024
