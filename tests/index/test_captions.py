"""Captions: words find captions, filters hold, and a hybrid search is the fusion of both rankings."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gallery_media import write_animation, write_picture

from cots.errors import GalleryError
from cots.model.retrieval_model import RetrievalModel
from index.build import build, remove
from index.captions import RRF_CONSTANT, fuse
from index.compaction import compact
from index.gallery import Gallery, open_gallery
from index.search import FUSED, Searcher

CAPTIONS = {
    "a.png": ["a red truck on the street", "a truck"],
    "b.png": ["a dog runs on the beach"],
    "c.png": ["two dogs, and a red ball"],
    "d.gif": ["a red boat in the water"],
    "e.png": [],
}


def write_table(folder: Path, captions: dict[str, list[str]]) -> Path:
    for seed, name in enumerate(captions):
        if not (folder / name).exists():
            (write_animation if name.endswith("gif") else write_picture)(folder / name, seed)
    rows = [json.dumps({"path": name, "captions": texts}) for name, texts in captions.items()]
    (folder / "items.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "items.jsonl"


@pytest.fixture
def searcher(tmp_path: Path, tiny_model: RetrievalModel) -> Searcher:
    build([write_table(tmp_path, CAPTIONS)], tmp_path / "gallery", tiny_model)
    return Searcher(open_gallery(tmp_path / "gallery"), tiny_model)


def found(searcher: Searcher, text: str, **options: object) -> list[str]:
    return [Path(hit.path).name for hit in searcher.search(text, mode="text", **options).hits]  # type: ignore[arg-type]


def test_words_are_found_in_any_form_and_number(searcher: Searcher) -> None:
    assert found(searcher, "Dog") in (["b.png", "c.png"], ["c.png", "b.png"])
    assert set(found(searcher, "red")) == {"a.png", "c.png", "d.gif"}
    assert found(searcher, "a truck of red")[0] == "a.png"
    assert found(searcher, "bicycle") == []
    assert len(found(searcher, "red", k=2)) == 2
    assert len(found(searcher, "red", k=10**12)) == 3


@pytest.mark.parametrize(
    "text", ["the", "!!!", "'; DROP TABLE vectors; --", '"', '"red"', '"red', "red*", "中文", "red AND (", "\\"]
)
def test_punctuation_and_strange_words_have_no_meaning(searcher: Searcher, text: str) -> None:
    expected = {"a.png", "c.png", "d.gif"} if "red" in text else set()
    assert set(found(searcher, text)) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kind": "video"}, {"d.gif"}),
        ({"kind": "image"}, {"a.png", "c.png"}),
        ({"where": "path LIKE '%c.png'"}, {"c.png"}),
        ({"where": "start > 0"}, {"d.gif"}),
        ({"where": "id < 0"}, set()),
    ],
)
def test_filters_hold(searcher: Searcher, options: dict, expected: set[str]) -> None:
    assert set(found(searcher, "red", **options)) == expected


def test_a_sentence_is_encoded_for_the_best_moment_of_a_video_alone(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = searcher.model.encode_texts
    monkeypatch.setattr(searcher.model, "encode_texts", lambda texts: encoded.extend(texts) or encode(texts))
    assert set(found(searcher, "red truck", kind="image")) == {"a.png", "c.png"}
    assert found(searcher, "boat", where="NOT moment") == ["d.gif"]
    assert encoded == []
    hit = searcher.search("boat", mode="text").hits[0]
    assert encoded == ["boat"]
    snapshot = searcher.snapshot
    rows = np.flatnonzero(snapshot.moments & (snapshot.items == snapshot.items[snapshot.positions(np.array([hit.id]))]))
    scores = snapshot.vectors[rows].astype(np.float32) @ encode(["boat"]).numpy()[0]
    assert len(rows) > 1
    assert hit.id == snapshot.ids[rows[scores.argmax()]]


def test_a_hybrid_search_fuses_both_rankings(searcher: Searcher) -> None:
    by_words = [hit.path for hit in searcher.search("red truck", mode="text", k=FUSED).hits]
    by_vector = [hit.path for hit in searcher.search("red truck", k=FUSED).hits]
    scores = dict.fromkeys(by_vector, 0.0)
    for ranking in (by_vector, by_words):
        for rank, path in enumerate(ranking, start=1):
            scores[path] += 1 / (RRF_CONSTANT + rank)
    hits = searcher.search("red truck", mode="hybrid", k=3).hits
    assert [hit.path for hit in hits] == sorted(scores, key=lambda path: -scores[path])[:3]
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores.values(), reverse=True)[:3])
    assert len(searcher.search("red truck", mode="hybrid").hits) == 5
    assert {hit.kind for hit in searcher.search("red", mode="hybrid", kind="video").hits} == {"video"}


def test_fusion_by_hand() -> None:
    assert fuse([[7, 8], [8, 9]]) == [(8, 1 / 7 + 1 / 6), (7, 1 / 6), (9, 1 / 7)]
    assert fuse([[], []]) == []


def test_new_changed_and_removed_captions_are_found_as_they_are(
    searcher: Searcher, tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    table = write_table(tmp_path, CAPTIONS | {"a.png": ["a green car"], "f.png": ["a red bird"]})
    build([table], tmp_path / "gallery", tiny_model)
    remove(tmp_path / "gallery", "path LIKE '%c.png'")
    renewed = Searcher(open_gallery(tmp_path / "gallery"), tiny_model)
    assert set(found(renewed, "red")) == {"d.gif", "f.png"}
    assert found(renewed, "green cars") == ["a.png"]
    assert "c.png" in found(searcher, "dog") or found(searcher, "dog") == ["b.png"]  # an open search is not disturbed


def test_text_finds_what_reading_each_caption_finds(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    rng = np.random.default_rng()
    words = ["zebra", "lamp", "river", "tower", "cake"]
    captions = {f"{number:03}.png": [" ".join(rng.choice(words, 2))] for number in range(60)}
    build([write_table(tmp_path, captions)], tmp_path / "gallery", tiny_model)
    searcher = Searcher(open_gallery(tmp_path / "gallery"), tiny_model)
    for word in words:
        assert set(found(searcher, word, k=60)) == {name for name, (text,) in captions.items() if word in text}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "sound"}, "There is no mode 'sound'; search by vector, text or hybrid"),
        ({"mode": "text", "without": "snow"}, "use the mode hybrid"),
        ({"mode": "text", "like": 1}, "use the mode hybrid"),
        ({"mode": "hybrid", "text": "", "like": 1}, "no words to find in captions"),
    ],
)
def test_what_captions_cannot_answer_is_a_sentence(searcher: Searcher, options: dict, sentence: str) -> None:
    with pytest.raises(GalleryError, match=sentence):
        searcher.search(**({"text": "a dog"} | options))


def test_a_gallery_without_captions_says_so(gallery: Gallery, tiny_model: RetrievalModel) -> None:
    with pytest.raises(GalleryError, match="has no captions to search; use --mode vector"):
        gallery.search("a dog", model=tiny_model, mode="text")


def test_captions_without_an_index_name_the_command_that_makes_one(
    searcher: Searcher, cots_command: Callable[..., str]
) -> None:
    gallery = searcher.gallery
    gallery.table.drop_index("caption_idx")
    with pytest.raises(GalleryError, match=f"index them with: cots index compact --gallery {gallery.directory}"):
        searcher.search("dog", mode="text")
    cots_command("index", "compact", "--gallery", str(gallery.directory))
    assert set(found(searcher, "dog")) == {"b.png", "c.png"}


@pytest.mark.parametrize("damage", ["cut off", "empty", "gone"])
@pytest.mark.parametrize("part", ["tokens", "docs", "invert", "metadata"])
def test_a_damaged_index_names_the_command_that_makes_it_again(
    searcher: Searcher, tmp_path: Path, tiny_model: RetrievalModel, part: str, damage: str
) -> None:
    directory = searcher.gallery.directory
    _damage_index(directory, part, damage)
    damaged = Searcher(open_gallery(directory), tiny_model)
    assert damaged.search("dog").hits
    for mode in ("text", "hybrid"):
        with pytest.raises(
            GalleryError, match=f"make their index again with: cots index compact --gallery {directory}"
        ):
            damaged.search("dog", mode=mode)
    compact(directory)
    assert set(found(Searcher(open_gallery(directory), tiny_model), "dog")) == {"b.png", "c.png"}


@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_a_build_makes_a_damaged_index_again(
    searcher: Searcher, tmp_path: Path, tiny_model: RetrievalModel, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for part in ("tokens", "docs", "invert", "metadata"):
        _damage_index(searcher.gallery.directory, part, damage)
    more = CAPTIONS | {f"{number}.png": [f"a dog of number {number}"] for number in range(8)}
    build([write_table(tmp_path, more)], tmp_path / "gallery", tiny_model)
    assert "could not be read; it was made again" in caplog.text
    assert len(found(Searcher(open_gallery(tmp_path / "gallery"), tiny_model), "dog", k=20)) == 10


def test_of_a_damaged_index_there_is_one_sentence(searcher: Searcher) -> None:
    """And no lines of LanceDB's own before it."""
    directory = searcher.gallery.directory
    for part in ("tokens", "metadata"):
        _damage_index(directory, part, "gone")
    script = (
        "import sys\n"
        "from cots.errors import GalleryError\n"
        "from index.captions import find_captions\n"
        "from index.gallery import open_gallery\n"
        "try: find_captions(open_gallery(sys.argv[1]), 'dog', 5)\n"
        "except GalleryError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(directory)], capture_output=True, text=True)
    assert "make their index again with: cots index compact" in done.stdout
    assert done.stderr == ""


def _damage_index(directory: Path, part: str, damage: str) -> None:
    (path,) = (directory / "vectors.lance" / "_indices").glob(f"*/*{part}.lance")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100] if damage == "cut off" else b"")
