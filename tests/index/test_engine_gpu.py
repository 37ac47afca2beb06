"""Which galleries are searched on a GPU, and what happens if one does not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from exact_gpu_checks import assert_exact, little_gpu_memory, on_gpu, unit_vectors

from index.exact import ExactIndex
from index.exact_gpu import ExactGpuIndex

__all__ = ["little_gpu_memory"]


def opened(vectors: np.ndarray, tmp_path: Path, device: str | None, structured: bool = False) -> object:
    """The engine of a gallery of these vectors, whose table nobody asks for; `structured`: "auto" stands for "ivf"."""
    pytest.importorskip("pyarrow")
    from index.engine import open_engine
    from index.gallery import Gallery
    from index.manifest import Manifest, StructureRecord
    from index.snapshot import Snapshot

    count = len(vectors)
    flags = np.zeros(count, bool)
    record = StructureRecord("ivf", "lost", "lost", 1, count, 1, 1, {}, "", 0, 0, {}) if structured else None
    gallery = Gallery(tmp_path, Manifest("model", "fingerprint", vectors.shape[1], structure=record))
    ids = 1000 + np.arange(count)
    gallery.__dict__["snapshot"] = Snapshot(1, None, ids, ids, flags, flags, vectors)  # type: ignore[arg-type]
    return open_engine(gallery, device=None if device is None else torch.device(device))


def test_a_gallery_is_searched_on_the_cpu_unless_a_gpu_is_named(tmp_path: Path) -> None:
    vectors = unit_vectors(np.random.default_rng(11), 1000, 8).astype(np.float16)
    for device in (None, "cpu"):
        assert isinstance(opened(vectors, tmp_path, device), ExactIndex)


@on_gpu
def test_a_large_gallery_is_searched_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_vectors(np.random.default_rng(12), 5000, 256).astype(np.float16)
    assert isinstance(opened(vectors, tmp_path, "cuda"), ExactIndex)
    monkeypatch.setattr("index.engine.EXACT_NUMBERS", 1000 * 256)
    for structured in (False, True):
        index = opened(vectors, tmp_path, "cuda", structured)
        assert isinstance(index, ExactGpuIndex)
        assert_exact(index, vectors, vectors[:5].astype(np.float32), 10)


@on_gpu
@pytest.mark.usefixtures("little_gpu_memory")
def test_a_gallery_that_does_not_fit_the_gpu_is_searched_on_the_cpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vectors = np.tile(unit_vectors(np.random.default_rng(13), 1000, 256).astype(np.float16), (400, 1))
    assert isinstance(opened(vectors, tmp_path, "cuda"), ExactIndex)
    (sentence,) = caplog.messages
    assert "400,000 vectors of 256 dimensions need 0.2 GB of cuda" in sentence
    assert sentence.endswith("Meanwhile the CPU searches.")
