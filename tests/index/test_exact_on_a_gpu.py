"""Exact search on a GPU, by compiled kernels, is what brute force finds."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from exact_gpu_checks import assert_exact, both_passes, drawn, filled, little_gpu_memory, on_gpu, unit_vectors

from cots.errors import GalleryError
from index.exact_gpu import ExactGpuIndex
from index.topk_passes import FEW_QUERIES, MANY_QUERIES, TorchPasses, TritonPasses

__all__ = ["both_passes", "little_gpu_memory"]
pytestmark = on_gpu
DIMENSIONS = (48, 256, 384, 768)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_hits_on_a_gpu_are_those_of_brute_force(dimension: int) -> None:
    rng = np.random.default_rng(dimension)
    for count in (0, 1, 100, 5000, 70_001):
        for doubles in (False, True):
            vectors, asked, _ = drawn(count, count, dimension, 200, None, doubles)
            index = filled(vectors, device="cuda")
            for queries, k in ((1, 10), (33, 1), (64, 100), (200, 10), (3, 1024), (2, count + 5), (0, 3), (5, 0)):
                assert_exact(index, vectors, asked[:queries], k)
            for share in (0.0, 0.01, 0.5, 1.0):
                allowed = rng.random(count) < share
                for queries in (1, 33, 200):
                    assert_exact(index, vectors, asked[:queries], 10, allowed)


def test_every_shape_on_a_gpu_gives_the_same() -> None:
    import triton

    facts = triton.runtime.driver.active.utils.get_device_properties(0)
    vectors, asked, allowed = drawn(7, 20_011, 256, 150, 0.5, True)
    for shape in {*FEW_QUERIES, *MANY_QUERIES}:
        if shape.shared_bytes(256) > facts["max_shared_mem"]:
            continue
        passes = TritonPasses(
            256, facts["multiprocessor_count"], facts["max_shared_mem"], few=(shape,), some=(shape,), many=(shape,)
        )
        index = filled(vectors, passes, "cuda")
        for queries in (1, 40, 150):
            assert_exact(index, vectors, asked[:queries], 10)
            assert_exact(index, vectors, asked[:queries], 10, allowed)


def test_recorded_searches_find_the_same_also_after_an_append_and_from_several_threads() -> None:
    vectors, asked, allowed = drawn(8, 30_000, 200, 64, 0.3, False)
    index = filled(vectors[:25_000], device="cuda")
    for k in (1, 10, 100):
        for queries in (1, 3, 64, 3, 1, 2, 64):
            assert_exact(index, vectors[:25_000], asked[:queries], k)
    index.append(vectors[25_000:], 1000 + np.arange(25_000, 30_000))
    for _ in range(3):
        assert_exact(index, vectors, asked[:3], 10)
        assert_exact(index, vectors, asked[:3], 10, allowed)
    expected = index.search(asked, 10)[1]

    def ask(number: int) -> bool:
        rows = slice(number % 60, number % 60 + 1 + number % 4)
        return bool((index.search(asked[rows], 10)[1] == expected[rows]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(400)))


def test_a_filter_that_allows_much_takes_little_memory() -> None:
    count = 4_000_000
    index = ExactGpuIndex(torch.zeros(count, 16, device="cuda").half(), np.arange(count))
    index.search(np.ones((1, 16), np.float32), 1, np.ones(count, bool))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    index.search(np.ones((1, 16), np.float32), 1, np.ones(count, bool))
    assert torch.cuda.max_memory_allocated() - before < 6 * count


def test_a_million_vectors_on_a_gpu() -> None:
    rng = np.random.default_rng(8)
    vectors = rng.standard_normal((1_000_000, 256), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.astype(np.float16)
    queries = unit_vectors(rng, 130, 256)
    index = filled(vectors[:900_000], device="cuda")
    index.append(vectors[900_000:], 1000 + np.arange(900_000, 1_000_000))
    truth = torch.from_numpy(queries).cuda() @ torch.from_numpy(vectors).cuda().float().T
    for count, k in ((1, 10), (130, 10), (130, 1000)):
        scores, ids = index.search(queries[:count], k)
        best = truth[:count].topk(k, dim=1).values.cpu().numpy()
        np.testing.assert_allclose(scores, best, atol=2e-6)
        np.testing.assert_allclose(
            truth[:count].gather(1, torch.from_numpy(ids - 1000).cuda()).cpu(), scores, atol=2e-6
        )


def test_plain_torch_on_a_gpu_gives_the_same() -> None:
    vectors, asked, allowed = drawn(9, 5000, 64, 20, 0.5, False)
    index = filled(vectors, TorchPasses(), "cuda")
    for _ in range(3):  # as it is, recorded, replayed
        assert_exact(index, vectors, asked, 10)
    assert_exact(index, vectors, asked, 10, allowed)


@pytest.mark.usefixtures("little_gpu_memory")
def test_vectors_that_do_not_fit_are_refused_with_a_sentence_and_the_rest_still_answers() -> None:
    few = unit_vectors(np.random.default_rng(10), 1000, 256).astype(np.float16)
    index = filled(few, device="cuda")
    many = np.broadcast_to(few[:1], (400_000, 256))
    with pytest.raises(GalleryError, match=r"400,000 vectors of 256 dimensions need 0\.2 GB of cuda.*enough for \d+"):
        filled(many, device="cuda")
    with pytest.raises(GalleryError, match="free some of its memory, or search on the CPU"):
        index.append(many, 5000 + np.arange(len(many)))
    assert_exact(index, few, few[:3].astype(np.float32), 5)
