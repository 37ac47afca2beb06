"""Faults of a gallery and questions out of range: a sentence, or a right answer, on every engine and in every mode."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from gallery_media import write_picture

from cots.errors import GalleryError
from cots.model.retrieval_model import RetrievalModel
from index import ann
from index.build import build, remove
from index.check import check
from index.engine import set_engine
from index.exact import ExactIndex
from index.gallery import Gallery, create_gallery, open_gallery, schema
from index.search import MODES, Searcher

BY_ENGINE = pytest.mark.parametrize("engine", ["exact", "hnsw", "ivf", "ivfpq"])
BY_MODE = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _structures_of_few_rows_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann, "FEW_ROWS", 0)


@pytest.fixture
def captioned(tmp_path: Path, tiny_model: RetrievalModel) -> Gallery:
    """Twelve pictures, each of a dog."""
    rows = []
    for number in range(12):
        write_picture(tmp_path / f"{number}.png", number)
        rows.append(json.dumps({"path": f"{number}.png", "captions": [f"a dog number {number}"]}))
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    build([tmp_path / "items.jsonl"], tmp_path / "gallery", tiny_model)
    return open_gallery(tmp_path / "gallery")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_vector_without_direction_is_a_named_file_and_not_a_row(
    photos: Path, tmp_path: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    encode = type(tiny_model).encode_images

    def spoilt(model: RetrievalModel, pixels: torch.Tensor) -> torch.Tensor:
        vectors = encode(model, pixels)  # type: ignore[arg-type]
        vectors[0] = value
        return vectors

    monkeypatch.setattr(type(tiny_model), "encode_images", spoilt)
    pictures = [photos / f"{number:02}.png" for number in range(12)]
    report = build(pictures, tmp_path / "gallery", tiny_model, batch_size=4, threads=1)
    assert len(report.failed) == 3
    assert report.items == 9
    assert all("vector" in error.reason for error in report.failed)
    assert check(tmp_path / "gallery") == []


@BY_ENGINE
def test_a_zero_vector_in_the_table_is_named_and_disturbs_no_other(
    gallery: Gallery, tiny_model: RetrievalModel, engine: str
) -> None:
    """One with NaN LanceDB does not take; of infinity see below."""
    expected = [hit.id for hit in gallery.search("a dog", model=tiny_model, k=100).hits]
    row = gallery.table.search().where("id = 1").to_arrow().select(schema(32).names).to_pylist()[0]
    spoilt = row | {"id": 99, "item": 99, "vector": np.zeros(32, np.float16), "path": "99.png"}
    gallery.table.add(pa.Table.from_pylist([spoilt], schema(32)))
    set_engine(gallery.directory, engine)
    found = [hit.id for hit in open_gallery(gallery.directory).search("a dog", model=tiny_model, k=100).hits]
    assert [id for id in found if id != 99] == expected
    assert "1 vectors are not finite or not of unit norm (ids 99)." in check(gallery.directory)


@BY_ENGINE
def test_an_infinite_vector_in_the_table_is_refused_by_a_structure_and_found_by_no_search(
    gallery: Gallery, tiny_model: RetrievalModel, engine: str
) -> None:
    expected = [hit.id for hit in gallery.search("a dog", model=tiny_model, k=100).hits]
    row = gallery.table.search().where("id = 1").to_arrow().select(schema(32).names).to_pylist()[0]
    spoilt = row | {"id": 99, "item": 99, "vector": np.full(32, np.inf, np.float16), "path": "99.png"}
    gallery.table.add(pa.Table.from_pylist([spoilt], schema(32)))
    if engine == "exact":
        set_engine(gallery.directory, engine)
    else:
        with pytest.raises(GalleryError, match=r"1 are damaged \(not finite\)") as refusal:
            set_engine(gallery.directory, engine)
        assert "--where 'id IN (99)'" in str(refusal.value)
    found = open_gallery(gallery.directory).search("a dog", model=tiny_model, k=100).hits
    assert [hit.id for hit in found] == expected
    assert remove(gallery.directory, "id IN (99)") == 1
    set_engine(gallery.directory, engine)
    assert check(gallery.directory) == []


@BY_ENGINE
@BY_MODE
def test_every_number_of_hits(captioned: Gallery, tiny_model: RetrievalModel, engine: str, mode: str) -> None:
    set_engine(captioned.directory, engine)
    searcher = Searcher(open_gallery(captioned.directory), tiny_model)
    with pytest.raises(GalleryError, match="k is 0; ask for at least one hit"):
        searcher.search("dog", k=0, mode=mode)
    for k in (1, 2, 11, 12, 13, 5000):
        assert len(searcher.search("dog", k=k, mode=mode).hits) == min(k, 12)


@BY_ENGINE
@BY_MODE
def test_filters_that_match_nothing_or_are_no_sql(
    captioned: Gallery, tiny_model: RetrievalModel, engine: str, mode: str
) -> None:
    set_engine(captioned.directory, engine)
    searcher = Searcher(open_gallery(captioned.directory), tiny_model)
    assert searcher.search("dog", where="width > 5000", mode=mode).hits == []
    assert searcher.search("dog", kind="video", mode=mode).hits == []
    assert len(searcher.search("dog", where="id <= 3", mode=mode).hits) == 3
    for condition in ("width >", "((id = 1)", "colour = 1", "SELECT 1", "id", "id = 1 AN width = 2", "id = 1; x"):
        with pytest.raises(GalleryError, match=r"The filter .* cannot be used .*the columns are: id, item"):
            searcher.search("dog", where=condition, mode=mode)


@pytest.mark.parametrize(
    "condition",
    [
        "id > 0 AN id = 1",
        "id > 0; DROP TABLE vectors",
        "id > 0 LIMIT 1",
        "id > 0) AND id = 1",
        "id > 0) OR (id = 1",
        "(id > 0",
    ],
)
def test_a_filter_of_which_only_the_beginning_makes_sense_removes_nothing(captioned: Gallery, condition: str) -> None:
    with pytest.raises(GalleryError, match=r"cannot be used \((Expected: \), found: |its parentheses do not match)"):
        remove(captioned.directory, condition)
    assert remove(captioned.directory, "id = 1 -- of a comment there is nothing to fear") == 1
    assert len(open_gallery(captioned.directory).snapshot) == 11


@BY_ENGINE
def test_an_empty_gallery_has_no_hits(tmp_path: Path, tiny_model: RetrievalModel, engine: str) -> None:
    directory = create_gallery(tmp_path / "empty", tiny_model).directory
    set_engine(directory, engine)
    for mode in MODES:
        assert open_gallery(directory).search("dog", model=tiny_model, mode=mode).hits == []


def test_a_read_only_gallery_is_searched_but_not_changed(captioned: Gallery) -> None:
    """As another user, since root may write anywhere."""
    set_engine(captioned.directory, "ivf")
    structure = next((captioned.directory / "search").glob("ivf-*.faiss"))
    structure.write_bytes(structure.read_bytes()[:-1])
    for folder in captioned.directory.parents:
        if "pytest" in str(folder):
            folder.chmod(folder.stat().st_mode | 0o055)
    for path in [captioned.directory, *captioned.directory.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    script = (
        "import os, sys, lancedb, faiss\n"
        "from cots.errors import GalleryError\n"
        "from index.build import remove\n"
        "from index.compaction import compact\n"
        "from index.engine import open_engine, set_engine\n"
        "from index.gallery import open_gallery\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for change in (lambda d: remove(d, 'id = 1'), compact, lambda d: set_engine(d, 'hnsw')):\n"
        "    try: change(sys.argv[1])\n"
        "    except GalleryError as error: print(error)\n"
        "print(open_engine(open_gallery(sys.argv[1])).kind)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(captioned.directory)], capture_output=True, text=True)
    for path in [captioned.directory, *captioned.directory.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert done.returncode == 0, done.stderr
    *refusals, engine = done.stdout.splitlines()
    assert len(refusals) == 3, done.stderr
    assert all("cannot be written to (permission denied); choose another place" in sentence for sentence in refusals)
    assert engine == "exact"
    assert "is damaged); every vector is compared, because it cannot be made again just now: The gallery" in done.stderr
    assert "(permission denied); choose another place. Once it can be: cots index engine" in done.stderr


@pytest.mark.parametrize("forbidden", [".", "manifest.json", "vectors.lance/_versions"])
def test_a_gallery_that_may_not_be_read_is_a_sentence(captioned: Gallery, forbidden: str) -> None:
    """As another user, since root may read anything."""
    for folder in captioned.directory.parents:
        if "pytest" in str(folder):
            folder.chmod(folder.stat().st_mode | 0o055)
    (captioned.directory / forbidden).chmod(0)
    script = (
        "import os, sys, lancedb\n"
        "from cots.errors import GalleryError\n"
        "from index.check import check\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: check(sys.argv[1])\n"
        "except GalleryError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(captioned.directory)], capture_output=True, text=True)
    (captioned.directory / forbidden).chmod(0o755)
    assert "permission denied)" in done.stdout, done.stderr


@pytest.mark.parametrize("damage", ["cut off", "empty", "gone"])
@pytest.mark.parametrize("folder", ["data", "_versions"])
def test_a_damaged_table_is_a_sentence(
    captioned: Gallery, tiny_model: RetrievalModel, folder: str, damage: str
) -> None:
    directory = captioned.directory
    for path in (directory / "vectors.lance" / folder).glob("*[a-z0-9].lance" if folder == "data" else "*.manifest"):
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:200] if damage == "cut off" else b"")
    sentence = r"The table \S+vectors.lance is damaged \(.+\); put it back from a copy|has lost its table"
    changes: list[Callable[[], object]] = [
        lambda: check(directory),
        lambda: remove(directory, "width > 1"),
        lambda: build([directory.parent / "items.jsonl"], directory, tiny_model),
        lambda: open_gallery(directory).search("dog", model=tiny_model, where="width > 1"),
    ]
    for change in changes:
        with pytest.raises(GalleryError, match=sentence) as caught:
            change()
        assert ".rs:" not in str(caught.value)


def test_a_full_disk_is_a_sentence_and_loses_nothing(captioned: Gallery) -> None:
    """No file may grow beyond so many bytes: of none, of a version of the table, of the rows that are new."""
    directory = captioned.directory
    for number in range(12, 20):
        write_picture(directory.parent / f"{number}.png", number)
    script = (
        "import resource, signal, sys, lancedb\n"
        "from cots.errors import GalleryError\n"
        "from cots.model.pretrained import load_model\n"
        "from index.build import build, remove\n"
        "from index.gallery import open_gallery\n"
        "model = load_model(open_gallery(sys.argv[1]).manifest.model)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "for most in (0, 700, 2000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))\n"
        "    for change in (lambda: remove(sys.argv[1], 'id = 1'), lambda: build([sys.argv[2]], sys.argv[1], model)):\n"
        "        try: change()\n"
        "        except GalleryError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(directory), str(directory.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sentences = done.stdout.splitlines()
    assert len(sentences) >= 4
    for sentence in sentences:
        assert "file too large); nothing that it holds is lost, mend that and run the same command again" in sentence
    assert check(directory) == []
    assert len(open_gallery(directory).snapshot) >= 11


def test_a_vector_that_is_not_finite_is_last() -> None:
    vectors = np.eye(4, dtype=np.float16)
    vectors[2] = np.nan
    scores, ids = ExactIndex(vectors, np.arange(10, 14)).search(np.eye(4, dtype=np.float32)[:1], 4)
    assert ids[0, 0] == 10
    assert ids[0, 3] == 12
    assert np.isnan(scores[0, 3])
