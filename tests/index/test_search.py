"""Search: what brute force over the table finds, each item once, at its best moment, within the filter."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cots.data.image_io import open_image
from cots.errors import GalleryError
from cots.model.retrieval_model import RetrievalModel
from index.gallery import Gallery, open_gallery
from index.search import NEGATIVE_WEIGHT, Searcher, SearchResult

JSON_HIT = {"rank", "score", "path", "kind", "caption", "start", "end"}


@pytest.fixture
def searcher(gallery: Gallery, tiny_model: RetrievalModel) -> Searcher:
    return Searcher(gallery, tiny_model)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def brute_force(
    gallery: Gallery, query: np.ndarray, k: int, allow: Callable[[dict], bool] = lambda row: True
) -> list[tuple[str, float, float | None]]:
    """(path, score, start of the best moment) of the k best items, from the table's rows one by one."""
    items: dict[int, list[tuple[float, dict]]] = {}
    for row in gallery.table.to_arrow().to_pylist():
        if allow(row):
            score = float(np.array(row["vector"], np.float32) @ query)
            items.setdefault(row["item"], []).append((score, row))
    found = []
    for rows in items.values():
        best = max(score for score, _ in rows)
        moments = [(score, row["start"]) for score, row in rows if row["moment"]]
        found.append((rows[0][1]["path"], best, max(moments)[1] if moments else None))
    return sorted(found, key=lambda item: -item[1])[:k]


def assert_same(result: SearchResult, expected: list[tuple[str, float, float | None]]) -> None:
    assert [(hit.path, hit.start) for hit in result.hits] == [(path, start) for path, _, start in expected]
    np.testing.assert_allclose([hit.score for hit in result.hits], [score for _, score, _ in expected], atol=1e-5)
    assert [hit.rank for hit in result.hits] == list(range(1, len(expected) + 1))


def text_vector(model: RetrievalModel, text: str) -> np.ndarray:
    return model.encode_texts([text]).numpy()[0]


@pytest.mark.parametrize("k", [1, 3, 15, 100])
@pytest.mark.parametrize("text", ["a red truck", "two people on grass", "zzz"])
def test_text_finds_what_brute_force_finds(searcher: Searcher, text: str, k: int) -> None:
    result = searcher.search(text, k=k)
    assert_same(result, brute_force(searcher.gallery, text_vector(searcher.model, text), k))
    assert len(result.hits) == min(k, 15)


@pytest.mark.parametrize(
    ("where", "kind", "allow"),
    [
        ("kind = 'video' AND source = 'photos'", None, lambda row: row["kind"] == "video"),
        (None, "image", lambda row: row["kind"] == "image"),
        ("start >= 4 AND end < 20", None, lambda row: row["start"] is not None and row["start"] >= 4),
        ("NOT moment", "video", lambda row: row["kind"] == "video" and not row["moment"]),
        ("path LIKE '%1%'", "image", lambda row: "1" in row["path"] and row["kind"] == "image"),
        ("id = -5", None, lambda row: False),
    ],
)
def test_filters_are_exact(
    searcher: Searcher, where: str | None, kind: str | None, allow: Callable[[dict], bool]
) -> None:
    for k in (1, 4, 50):
        result = searcher.search("a dog runs", where=where, kind=kind, k=k)
        assert_same(result, brute_force(searcher.gallery, text_vector(searcher.model, "a dog runs"), k, allow))


def test_a_condition_that_was_asked_before_sees_what_was_removed_since(searcher: Searcher) -> None:
    condition = "kind = 'image'"
    before = {hit.path for hit in searcher.search("a red truck", where=condition, k=100).hits}
    assert before == {hit.path for hit in searcher.search("a dog", where=condition, k=100).hits}
    gone = searcher.search("a red truck", where=condition, k=1).hits[0]
    open_gallery(searcher.gallery.directory).remove_items([searcher.gallery.row(gone.id)["item"]])
    after = {hit.path for hit in searcher.search("a red truck", where=condition, k=100).hits}
    assert after == before - {gone.path}


def test_a_searcher_goes_with_its_last_user(gallery: Gallery, tiny_model: RetrievalModel) -> None:
    """Its mapped vectors, or those on the GPU, do not wait for the garbage collector."""
    searcher = Searcher(gallery, tiny_model)
    for _ in range(2):
        searcher.search("a dog", where="kind = 'image'", kind="image", like=3)
    index, thread = weakref.ref(searcher.index), next(iter(searcher._sentences._threads))
    gc.collect()
    gc.disable()
    try:
        del searcher
        assert index() is None
    finally:
        gc.enable()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_picture_finds_itself(searcher: Searcher, photos: Path) -> None:
    with Image.open(photos / "05.png") as picture:
        hit = searcher.search(image=picture.convert("RGB"), k=1).hits[0]
    assert hit.path == str(photos / "05.png")
    assert hit.score == pytest.approx(1, abs=1e-3)
    assert (hit.start, hit.end, hit.frame) == (None, None, None)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "I;16"])
def test_a_picture_of_any_mode_is_read_as_files_are(
    searcher: Searcher, photos: Path, tmp_path: Path, mode: str
) -> None:
    with Image.open(photos / "05.png") as file:
        picture = file.convert("RGB")
    if mode == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    else:
        picture = picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)
    picture.save(tmp_path / "picture.png")
    expected = searcher.search(image=open_image(tmp_path / "picture.png")).hits
    with Image.open(tmp_path / "picture.png") as file:
        assert searcher.search(image=file).hits == expected


def test_a_picture_that_says_how_it_is_turned_is_turned(searcher: Searcher, photos: Path, tmp_path: Path) -> None:
    with Image.open(photos / "05.png") as file:
        exif = file.getexif()
        exif[0x0112] = 6
        file.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    expected = searcher.search(image=open_image(tmp_path / "turned.jpg")).hits
    with Image.open(tmp_path / "turned.jpg") as file:
        assert searcher.search(image=file).hits == expected


@pytest.mark.parametrize("image", ["05.png", np.zeros((8, 8, 3), np.uint8)], ids=["path", "array"])
def test_what_is_no_picture_is_told_from_one(searcher: Searcher, image: object) -> None:
    with pytest.raises(GalleryError, match=r"The image is of the type \w+; give a picture"):
        searcher.search(image=image)  # type: ignore[arg-type]


def test_text_and_picture_are_summed(searcher: Searcher, photos: Path) -> None:
    with Image.open(photos / "05.png") as file:
        picture = file.convert("RGB")
    image_vector = searcher.model.encode_images(searcher.model.transform(picture)[None]).numpy()[0]
    query = unit(image_vector + text_vector(searcher.model, "a dog"))
    assert_same(searcher.search("a dog", image=picture, k=5), brute_force(searcher.gallery, query, 5))


def test_without_turns_the_query_away(searcher: Searcher) -> None:
    wanted, unwanted = text_vector(searcher.model, "a dog"), text_vector(searcher.model, "snow")
    query = unit(wanted - NEGATIVE_WEIGHT * unwanted)
    assert_same(searcher.search("a dog", without="snow"), brute_force(searcher.gallery, query, 10))


def test_more_like_a_row_leaves_its_item_out(searcher: Searcher) -> None:
    hit = searcher.search("a dog", kind="video", k=1).hits[0]
    row = searcher.gallery.row(hit.id)
    vector = searcher.snapshot.vectors[searcher.snapshot.positions(np.array([hit.id]))[0]].astype(np.float32)
    expected = brute_force(searcher.gallery, unit(vector), 14, lambda other: other["item"] != row["item"])
    assert_same(searcher.search(like=hit.id, k=14), expected)


def test_a_video_is_reported_at_its_best_moment(searcher: Searcher) -> None:
    for hit in searcher.search("a dog", kind="video").hits:
        row = searcher.gallery.row(hit.id)
        assert row["moment"]
        assert (row["start"], row["end"], row["frame_time"]) == (hit.start, hit.end, hit.frame)
        assert hit.start is not None
        assert hit.end is not None
        assert hit.frame is not None
        assert hit.start <= hit.frame <= hit.end


@pytest.mark.parametrize("text", ["", "   ", None])
def test_nothing_to_search_for(searcher: Searcher, text: str | None) -> None:
    with pytest.raises(GalleryError, match="nothing to search for"):
        searcher.search(text)
    with pytest.raises(GalleryError, match="nothing to search for"):
        searcher.search(text, without="snow")


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"k": 0}, "k is 0; ask for at least one hit"),
        ({"kind": "sound"}, "There is no kind 'sound'; ask for image or video"),
        ({"like": 12345}, "has no row 12345"),
        ({"where": "kind ="}, r"The filter 'kind =' cannot be used \(.*\); the columns are: id, item, kind"),
        ({"where": "colour = 'red'"}, r"No field named colour.*the columns are: .*caption"),
    ],
)
def test_bad_questions_get_a_sentence(searcher: Searcher, query: dict, sentence: str) -> None:
    with pytest.raises(GalleryError, match=sentence):
        searcher.search("a dog", **query)


def test_a_query_without_direction_is_refused(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = searcher.model.encode_texts
    monkeypatch.setattr(searcher.model, "encode_texts", lambda texts: encode(texts) * float("nan"))
    with pytest.raises(GalleryError, match="has no direction"):
        searcher.search("a dog")
    monkeypatch.setattr(searcher.model, "encode_texts", lambda texts: encode(texts) * 0)
    with pytest.raises(GalleryError, match="has no direction"):
        searcher.search("a dog")


def test_the_json_document(searcher: Searcher) -> None:
    result = searcher.search("a dog", k=2, where="kind = 'image'")
    document = result.to_json()
    assert document.keys() == {"query", "model", "took_ms", "hits"}
    assert document["took_ms"].keys() == {"encode", "search", "fetch"}
    assert all(hit.keys() >= JSON_HIT for hit in document["hits"])
    assert (document["query"], document["model"]) == ("a dog", searcher.model.name)
