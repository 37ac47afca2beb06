"""Engines of a gallery: made, measured, changed, kept right; lost and damaged ones are made again and never served."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gallery_media import write_picture

from cots.errors import GalleryError, MissingDependency
from cots.model.retrieval_model import RetrievalModel
from index import ann, engine, structures
from index.build import build, info, remove
from index.compaction import compact
from index.engine import choose_engine, open_engine, set_engine
from index.exact import ExactIndex
from index.gallery import Gallery, open_gallery
from index.memory import available_memory
from index.search import SearchResult
from index.structures import row_hashes

BY_KIND = pytest.mark.parametrize("kind", ["hnsw", "ivf", "ivfpq"])


@pytest.fixture(autouse=True)
def _structures_of_few_rows_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann, "FEW_ROWS", 0)


def exact_ids(gallery: Gallery, query: np.ndarray, k: int) -> set[int]:
    snapshot = open_gallery(gallery.directory).snapshot
    return set(ExactIndex(snapshot.vectors, snapshot.ids).search(query[None], k)[1][0].tolist())


def paths(result: SearchResult) -> list[str]:
    return [hit.path for hit in result.hits]


def assert_exact(gallery: Gallery, model: RetrievalModel, kind: str) -> None:
    """All rows asked for: the engine has no excuse to miss one."""
    opened = open_gallery(gallery.directory)
    index = open_engine(opened, model)
    assert index.kind == kind
    count = len(opened.snapshot)
    query = opened.snapshot.vectors[3].astype(np.float32)
    scores, ids = index.search(query[None], count)
    assert set(ids[0].tolist()) == set(opened.snapshot.ids.tolist())
    np.testing.assert_allclose(scores[0], np.sort(opened.snapshot.vectors.astype(np.float32) @ query)[::-1], atol=1e-6)
    assert index.search(query[None], 1)[1][0, 0] == opened.snapshot.ids[3]


@BY_KIND
def test_an_engine_is_made_measured_and_reported(
    photos: Path, tmp_path: Path, tiny_model: RetrievalModel, kind: str
) -> None:
    build([photos], tmp_path / "gallery", tiny_model, engine=kind)
    gallery = open_gallery(tmp_path / "gallery")
    assert_exact(gallery, tiny_model, kind)
    facts = info(gallery.directory)
    assert (facts["engine"], facts["requested"], facts["recall_target"]) == (kind, kind, 0.95)
    assert facts["recall"].keys() == {"1", "10"}  # a hundred rows there are not
    assert facts["recall"]["10"] >= 0.95
    assert facts["recall_queries"] == "256 everyday sentences"
    assert facts["bytes_per_vector"] > 8
    assert facts["build_seconds"] >= 0
    assert facts["latency_ms"]["p50"] <= facts["latency_ms"]["p99"]
    assert facts["structure_version"] == facts["version"]
    json.dumps(facts)


@BY_KIND
def test_an_engine_is_changed_without_embedding(gallery: Gallery, tiny_model: RetrievalModel, kind: str) -> None:
    before = gallery.snapshot.rows
    expected = paths(gallery.search("a dog", model=tiny_model))
    assert set_engine(gallery.directory, kind, recall_target=0.9, model=tiny_model)["engine"] == kind
    changed = open_gallery(gallery.directory)
    assert changed.snapshot.rows.equals(before)
    assert paths(changed.search("a dog", model=tiny_model)) == expected
    set_engine(gallery.directory, "exact")
    assert info(gallery.directory)["engine"] == "exact"
    assert [path.suffix for path in (gallery.directory / "search").iterdir()] == [".arrow"]
    assert paths(open_gallery(gallery.directory).search("a dog", model=tiny_model)) == expected


def test_captions_are_what_it_is_measured_with(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    rows = []
    for number in range(60):
        write_picture(tmp_path / f"{number}.png", number)
        rows.append(json.dumps({"path": f"{number}.png", "captions": [f"a dog and {number} cats", f"{number} dogs"]}))
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    build([tmp_path / "items.jsonl"], tmp_path / "gallery", tiny_model, engine="ivf")
    assert info(tmp_path / "gallery")["recall_queries"] == "30 captions"


def test_a_gallery_without_captions_is_measured_with_sentences_or_without_a_model_with_noise(
    gallery: Gallery, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert set_engine(gallery.directory, "ivf", model=tiny_model)["recall_queries"] == "256 everyday sentences"
    assert set_engine(gallery.directory, "ivf")["recall_queries"] == "42 noisy vectors"
    monkeypatch.setattr("index.tuning.EMBEDDED_GALLERY", tmp_path)  # was left out
    assert set_engine(gallery.directory, "ivf", model=tiny_model)["recall_queries"] == "42 noisy vectors"


@BY_KIND
def test_changes_are_seen_without_a_new_structure_until_they_are_many(
    gallery: Gallery, photos: Path, tiny_model: RetrievalModel, kind: str
) -> None:
    set_engine(gallery.directory, kind)
    made = open_gallery(gallery.directory).manifest.structure
    write_picture(photos / "new.png", 70)
    remove(gallery.directory, "path LIKE '%05.png'")
    (photos / "05.png").unlink()
    build([photos], gallery.directory, tiny_model)
    assert open_gallery(gallery.directory).manifest.structure == made
    assert_exact(gallery, tiny_model, kind)
    compact(gallery.directory)
    assert open_gallery(gallery.directory).manifest.structure == made
    assert_exact(gallery, tiny_model, kind)
    for seed in range(8):
        write_picture(photos / f"new{seed}.png", 80 + seed)
    build([photos], gallery.directory, tiny_model)
    renewed = open_gallery(gallery.directory).manifest.structure
    assert renewed is not None
    assert renewed.vectors == 29
    assert_exact(gallery, tiny_model, kind)


def test_a_removed_row_is_not_found_before_the_next_build(gallery: Gallery, tiny_model: RetrievalModel) -> None:
    set_engine(gallery.directory, "ivf")
    remove(gallery.directory, "path LIKE '%05.png'")
    result = open_gallery(gallery.directory).search("a dog", model=tiny_model, k=20)
    assert len(result.hits) == 14
    assert not [path for path in paths(result) if path.endswith("05.png")]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {"flipped": _flip, "truncated": _truncate, "emptied": lambda path: os.truncate(path, 0), "lost": Path.unlink}


@BY_KIND
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("pattern", ["*.faiss", "rows-*.npy"])
def test_a_damaged_structure_is_made_again_with_a_sentence(
    gallery: Gallery,
    tiny_model: RetrievalModel,
    kind: str,
    damage: str,
    pattern: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    set_engine(gallery.directory, kind)
    file = next((gallery.directory / "search").glob(pattern))
    DAMAGE[damage](file)
    assert_exact(gallery, tiny_model, kind)
    (sentence,) = caplog.messages
    assert f"{file.name} is {'missing' if damage == 'lost' else 'damaged'}); it was made again" in sentence
    caplog.clear()
    assert_exact(gallery, tiny_model, kind)
    assert caplog.messages == []


def test_a_structure_that_the_table_has_left_behind_is_made_again_with_a_sentence(
    gallery: Gallery, tiny_model: RetrievalModel, caplog: pytest.LogCaptureFixture
) -> None:
    set_engine(gallery.directory, "ivf")
    remove(gallery.directory, "path LIKE '%0_.png'")
    assert_exact(gallery, tiny_model, "ivf")
    (sentence,) = caplog.messages
    assert "(of its 21 vectors 11 are among the 11 of the table); it was made again" in sentence


def test_without_faiss_every_vector_is_compared(
    gallery: Gallery, tiny_model: RetrievalModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_engine(gallery.directory, "ivf")
    _flip(next((gallery.directory / "search").glob("ivf-*.faiss")))
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert_exact(gallery, tiny_model, "exact")
    (sentence,) = caplog.messages
    assert "pip install 'cots[cpu]'" in sentence


def test_a_build_that_lacks_faiss_says_so_before_it_embeds(
    gallery: Gallery, photos: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_engine(gallery.directory, "hnsw")
    before = open_gallery(gallery.directory).snapshot.version
    write_picture(photos / "new.png", 900)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependency, match="faiss"):
        build([photos], gallery.directory, tiny_model)
    assert open_gallery(gallery.directory).snapshot.version == before
    assert build([photos], gallery.directory, tiny_model, engine="exact").added == 1


def test_a_structure_that_is_replaced_while_it_is_read_gives_way_to_the_next(
    gallery: Gallery, tiny_model: RetrievalModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_engine(gallery.directory, "ivf")
    begun: list[int] = []

    def replaced() -> int:
        begun.append(1)
        if len(begun) == 1:
            set_engine(gallery.directory, "hnsw")
        return available_memory()

    monkeypatch.setattr(structures, "available_memory", replaced)
    assert_exact(gallery, tiny_model, "hnsw")
    assert caplog.messages == []


def test_one_that_took_long_is_not_made_again_by_a_reader(
    gallery: Gallery, tiny_model: RetrievalModel, caplog: pytest.LogCaptureFixture
) -> None:
    set_engine(gallery.directory, "ivf")
    manifest = open_gallery(gallery.directory).manifest
    assert manifest.structure is not None
    replace(manifest, structure=replace(manifest.structure, build_seconds=1000.0)).write(gallery.directory)
    _flip(next((gallery.directory / "search").glob("ivf-*.faiss")))
    assert_exact(gallery, tiny_model, "exact")
    (sentence,) = caplog.messages
    assert f"make it again: cots index engine ivf --gallery {gallery.directory}" in sentence


def test_a_build_makes_a_damaged_structure_again(gallery: Gallery, photos: Path, tiny_model: RetrievalModel) -> None:
    set_engine(gallery.directory, "hnsw")
    _flip(next((gallery.directory / "search").glob("hnsw-*.faiss")))
    build([photos], gallery.directory, tiny_model)
    assert_exact(gallery, tiny_model, "hnsw")


def test_the_warning_reaches_the_terminal(
    gallery: Gallery, tiny_model_dir: Path, cots_command: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    cots_command("index", "engine", "ivf", "--gallery", gallery.directory)
    _flip(next((gallery.directory / "search").glob("ivf-*.faiss")))
    command = [sys.executable, "-m", "cots.cli", "search", "dog", "--gallery", str(gallery.directory), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["hits"]) == 10
    assert "is damaged); it was made again." in done.stderr


def test_a_structure_that_cannot_be_written_is_a_sentence_and_costs_nothing_else(
    gallery: Gallery, tiny_model: RetrievalModel
) -> None:
    """The disk is full: no file may grow beyond a kilobyte."""
    script = (
        "import resource, signal, sys\n"
        "import lancedb, faiss\n"
        "from cots.errors import GalleryError\n"
        "from index.engine import set_engine\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))\n"
        "try: set_engine(sys.argv[1], 'hnsw')\n"
        "except GalleryError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(gallery.directory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be written (file too large); make room, or use --engine exact" in done.stdout
    assert not list((gallery.directory / "search").glob(".scratch*"))
    assert_exact(gallery, tiny_model, "exact")


def test_an_empty_gallery_has_an_exact_engine(photos: Path, gallery: Gallery, tiny_model: RetrievalModel) -> None:
    set_engine(gallery.directory, "hnsw")
    remove(gallery.directory, "id > 0")
    assert open_gallery(gallery.directory).search("a dog", model=tiny_model).hits == []
    set_engine(gallery.directory, "hnsw")
    assert info(gallery.directory)["engine"] == "exact"
    build([photos], gallery.directory, tiny_model)
    assert info(gallery.directory)["engine"] == "hnsw"
    assert_exact(gallery, tiny_model, "hnsw")


@pytest.mark.parametrize(
    ("count", "memory_gb", "target", "expected"),
    [
        (3_870, 16, 0.95, "exact"),
        (250_000, 16, 0.95, "hnsw"),
        (500_000, 16, 0.99, "ivf"),
        (500_000, 0.3, 0.95, "ivfpq"),
        (10_000_000, 64, 0.95, "ivf"),
        (10_000_000, 4, 0.95, "ivfpq"),
        (10_000_000, 4, 1.0, "exact"),
    ],
)
def test_auto_picks_by_size_memory_and_target(count: int, memory_gb: float, target: float, expected: str) -> None:
    assert choose_engine(count, 256, int(memory_gb * 1e9), target) == expected


def test_auto_is_chosen_anew_as_the_gallery_grows(
    gallery: Gallery, photos: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (info(gallery.directory)["engine"], info(gallery.directory)["requested"]) == ("exact", "auto")
    monkeypatch.setattr(engine, "EXACT_NUMBERS", 21 * 32)
    write_picture(photos / "new.png", 70)
    build([photos], gallery.directory, tiny_model)
    assert info(gallery.directory)["engine"] == "hnsw"
    assert_exact(gallery, tiny_model, "hnsw")


def test_what_is_no_engine_or_target_is_refused_before_work(
    photos: Path, tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    with pytest.raises(GalleryError, match="There is no engine 'lsh'; use auto, exact, hnsw, ivf or ivfpq"):
        build([photos], tmp_path / "gallery", tiny_model, engine="lsh")
    for target in (0.0, 1.5):
        with pytest.raises(GalleryError, match="give a share above 0 and at most 1"):
            build([photos], tmp_path / "gallery", tiny_model, engine="ivf", recall_target=target)
    assert not (tmp_path / "gallery").exists()


def test_vectors_that_differ_anywhere_have_other_hashes() -> None:
    rng = np.random.default_rng()
    vectors = rng.standard_normal((200, 10)).astype(np.float16)
    changed = vectors.copy()
    changed[np.arange(200), rng.integers(0, 10, 200)] *= np.float16(-1)
    changed[:, 3] *= np.float16(-1)
    changed[:, 7] *= np.float16(-1)
    assert len(set(row_hashes(vectors)) | set(row_hashes(changed))) == 400
    np.testing.assert_array_equal(row_hashes(vectors), row_hashes(vectors.copy()))
