"""What the page shows and says, without a browser: requests to its search, its media routes and its pictures."""

import gc
import io
import mimetypes
import re
import threading
import weakref
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import ValidationError

from cots.errors import CotsError, GalleryError, MediaError
from cots.model.retrieval_model import RetrievalModel
from demo.app import build_app
from demo.cards import cards, clock, short_path
from demo.engine import Engine
from demo.page import Ask, answer, misunderstood
from demo.thumbnails import TILE_SIDE
from index.build import build
from index.search import Hit
from tests.demo.conftest import INJECTION


class Elements(HTMLParser):
    """Collects (tag, attributes) and text."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str, css_class: str = "") -> list[dict[str, str | None]]:
        return [given for name, given in self.found if name == tag and css_class in (given.get("class") or "")]


def hit(**changes: object) -> Hit:
    values = {
        "rank": 1, "score": 0.4321, "path": "/pictures/holiday/beach.jpg", "kind": "image",
        "caption": "a beach", "start": None, "end": None, "frame": None, "id": 7, "source": "holiday", "licence": "CC0",
    }  # fmt: skip
    return Hit(**(values | changes))


@pytest.fixture(scope="module")
def client(engine: Engine) -> TestClient:
    return TestClient(build_app(engine))


@pytest.fixture
def rows(engine: Engine) -> dict[str, Hit]:
    """Every item of the gallery by its file's name."""
    return {short_path(found.path).split("/")[-1]: found for found in engine.shelf.sample("", "", 0, 100)}


def test_a_card_shows_picture_caption_score_path_and_more_like_this() -> None:
    card = Elements(cards([hit()], "v1"))
    (picture,) = card.of("img")
    assert picture["alt"] == "a beach"
    assert picture["src"] == "thumb/7?v=v1"
    assert "a beach" in card.text
    assert "0.432" in card.text
    assert "holiday/beach.jpg" in card.text
    assert card.of("li")[0]["data-path"] == "/pictures/holiday/beach.jpg"
    assert card.of("button", "like")[0]["aria-label"] == "More like this: a beach"


def test_a_video_card_plays_its_moment_muted_and_fetches_nothing_before() -> None:
    card = Elements(cards([hit(kind="video", path="/a/clip.mp4", start=4.0, end=8.0, frame=6.0)], "v1"))
    (video,) = card.of("video")
    assert video["data-src"] == "media/7?v=v1#t=4.00,8.00"
    assert "src" not in video
    assert {"muted", "playsinline"} <= video.keys()
    assert "0:04\N{EN DASH}0:08" in card.text


def test_an_animated_picture_is_not_given_to_a_video_player() -> None:
    card = Elements(cards([hit(kind="video", path="/a/clip.gif", start=0.0, end=1.0, frame=0.5)], "v1"))
    assert not card.of("video")
    assert card.of("img", "moving")[0]["data-src"] == "media/7?v=v1"


def test_an_animated_webp_is_a_picture_on_machines_that_do_not_register_its_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mimetypes, "guess_type", mimetypes.MimeTypes().guess_type)  # without the system's list
    card = Elements(cards([hit(kind="video", path="/a/clip.webp", start=0.0, end=1.0, frame=0.5)], "v1"))
    assert not card.of("video")


def test_an_item_without_caption_is_called_by_its_file() -> None:
    for path, folder in (
        ("/my/pictures/holiday/beach.jpg", "pictures/holiday"),
        ("/beach.jpg", "/"),
        ("/data/train-0.tar::deep/beach.jpg", "train-0.tar"),
    ):
        card = Elements(cards([hit(caption="", path=path)], "v1", scored=False))
        assert card.of("img")[0]["alt"] == "beach.jpg"
        assert card.of("button", "path")[0]["title"] == f"Copy {path}"
        assert card.text == f"More like thisbeach.jpg{folder}"


def test_of_several_captions_the_card_shows_the_first_and_the_viewer_the_others() -> None:
    card = Elements(cards([hit(caption="a beach\nsand and sea\nholiday")], "v1"))
    assert card.of("img")[0]["alt"] == "a beach"
    assert card.of("li")[0]["data-others"] == "sand and sea\nholiday"


def test_markup_in_captions_paths_and_sources_stays_text() -> None:
    path = f"/a/{INJECTION}.png"
    markup = cards([hit(caption=INJECTION, path=path, source=INJECTION, licence=INJECTION)], "v1")
    card = Elements(markup)
    assert not card.of("script")
    assert [picture.get("class") for picture in card.of("img")] == ["still"]
    assert not any("onerror" in attributes for _, attributes in card.found)
    assert card.of("img")[0]["alt"] == INJECTION
    assert card.of("li")[0]["data-path"] == path


def test_times_and_paths_are_short() -> None:
    assert [clock(seconds) for seconds in (0, 7.9, 83, 3723)] == ["0:00", "0:07", "1:23", "1:02:03"]
    assert short_path("/data/photos/cat.webp") == "photos/cat.webp"
    assert short_path("/data/train-0.tar::deep/cat.webp") == "train-0.tar/cat.webp"


def test_before_a_search_the_page_shows_all_kinds_and_sources(engine: Engine) -> None:
    reply = answer(engine, Ask())
    shown = Elements(reply["cards"])
    assert len(shown.of("li")) == 10
    assert {card["data-source"] for card in shown.of("li")[:4]} == {"paints", "clips", "shard.tar", INJECTION}
    assert not shown.of("span", "score")
    assert reply["introduction"].startswith("8 pictures and 2 videos")
    assert set(reply["sources"]) == {"paints", "clips", "shard.tar", INJECTION}


def test_a_search_replies_with_cards_and_its_times(engine: Engine) -> None:
    reply = answer(engine, Ask(text="a dog", k=4))
    assert len(Elements(reply["cards"]).of("span", "score")) == 4
    assert reply["more"]
    line = Elements(reply["timing"]).text
    assert re.fullmatch(r"10 items encoding [\d.]+ ms search [\d.]+ ms fetching [\d.]+ ms .+", line)


def test_show_more_continues_without_repeating(engine: Engine) -> None:
    for ask in ({"text": "a dog"}, {}):
        pages = [answer(engine, Ask(**ask, skip=skip, k=skip + 4)) for skip in (0, 4, 8)]
        ids = [card["data-id"] for page in pages for card in Elements(page["cards"]).of("li")]
        assert len(ids) == len(set(ids)) == 10
        assert [page["more"] for page in pages] == [True, True, False]


def test_filters_by_kind_and_source(engine: Engine) -> None:
    videos = Elements(answer(engine, Ask(text="a dog", kind="video"))["cards"]).of("li")
    assert {card["data-kind"] for card in videos} == {"video"}
    for ask in (Ask(text="a dog", source=INJECTION), Ask(source=INJECTION)):
        assert len(Elements(answer(engine, ask)["cards"]).of("li")) == 1


def test_captions_are_searched_by_words_and_scores_shown_only_of_vectors(engine: Engine) -> None:
    by_words = Elements(answer(engine, Ask(text="red", mode="text"))["cards"])
    assert [Path(card["data-path"] or "").name for card in by_words.of("li")] == ["flicker.gif"]
    assert not by_words.of("span", "score")
    assert len(Elements(answer(engine, Ask(text="red", mode="hybrid"))["cards"]).of("li")) == 10
    like = Ask(mode="text", like=1)
    assert len(Elements(answer(engine, like)["cards"]).of("li")) == 9


def test_more_like_this_leaves_out_the_item_itself(engine: Engine, rows: dict[str, Hit]) -> None:
    found = Elements(answer(engine, Ask(like=rows["red.png"].id))["cards"]).of("li")
    assert len(found) == 9
    assert rows["red.png"].path not in {card["data-path"] for card in found}


def test_nothing_found_is_a_sentence(engine: Engine) -> None:
    with pytest.raises(CotsError, match=r"No picture from clips matches; choose another kind or source\."):
        answer(engine, Ask(text="a dog", kind="image", source="clips"))


def test_words_that_no_caption_has_are_a_sentence(engine: Engine) -> None:
    with pytest.raises(CotsError, match="No caption in this gallery has these words"):
        answer(engine, Ask(text="zebra", mode="text"))


def test_wishes_that_words_of_captions_cannot_meet_are_a_sentence_in_the_words_of_the_page(engine: Engine) -> None:
    picture = engine.keep_picture(b"P6 1 1 255 abc")
    for ask in (
        Ask(text="red", without="blue", mode="text"),
        Ask(text="red", like=1, mode="text"),
        Ask(text="red", picture=picture, mode="text"),
    ):
        with pytest.raises(CotsError, match=r"choose Refine, Find: Both\.$") as caught:
            answer(engine, ask)
        assert "mode" not in str(caught.value)
    assert answer(engine, Ask(text="red", without="blue", mode="hybrid"))["cards"]


@pytest.mark.parametrize("mode", ["text", "hybrid"])
def test_a_gallery_without_captions_says_so_in_the_words_of_the_page(
    media_folder: Path, tiny_model: RetrievalModel, engine: Engine, tmp_path: Path, mode: str
) -> None:
    build([media_folder / "red.png"], tmp_path, tiny_model)
    bare = Engine(tmp_path, tiny_model)
    assert not answer(bare, Ask(text="red"))["captioned"]
    assert answer(engine, Ask(text="red"))["captioned"]
    with pytest.raises(CotsError, match="No item of this gallery has a caption; choose Refine, Find"):
        answer(bare, Ask(text="red", mode=mode))


def test_too_many_words_are_a_sentence() -> None:
    with pytest.raises(ValidationError) as caught:
        Ask(text="dog " * 300)
    assert misunderstood(caught.value) == "Ask with fewer words: a search takes 1,000 characters."


def test_the_first_picture_finds_the_model_warm(
    engine: Engine, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, encode = threading.Event(), tiny_model.encode_images

    def encode_and_tell(pixels: torch.Tensor) -> torch.Tensor:
        vectors = encode(pixels)
        encoded.set()
        return vectors

    monkeypatch.setattr(tiny_model, "encode_images", encode_and_tell)
    engine.warm_up()
    assert encoded.wait(timeout=60)


def test_an_empty_search_is_a_sentence(engine: Engine) -> None:
    with pytest.raises(CotsError, match="Type a few words"):
        engine.search("  ")
    with pytest.raises(CotsError, match="type a few words"):
        answer(engine, Ask(without="people"))


def test_the_page_follows_its_gallery(tmp_path: Path, media_folder: Path, tiny_model: RetrievalModel) -> None:
    engine = Engine(tmp_path / "later", tiny_model)
    with pytest.raises(GalleryError, match=r"no gallery at .*later; make one with: cots index build"):
        answer(engine, Ask())
    build([media_folder / "red.png"], tmp_path / "later", tiny_model)
    assert answer(engine, Ask())["introduction"].startswith("1 picture,")
    build([media_folder / "blue.png"], tmp_path / "later", tiny_model)
    assert len(Elements(answer(engine, Ask(text="blue"))["cards"]).of("li")) == 2


def test_an_older_version_goes_when_the_page_follows(
    tmp_path: Path, media_folder: Path, tiny_model: RetrievalModel
) -> None:
    engine = Engine(tmp_path, tiny_model)
    build([media_folder / "red.png"], tmp_path, tiny_model)
    answer(engine, Ask(text="red", source=media_folder.name))
    older = weakref.ref(engine.shelf.searcher)
    build([media_folder / "blue.png"], tmp_path, tiny_model)
    gc.collect()
    gc.disable()
    try:
        answer(engine, Ask(text="blue"))
        assert older() is None
    finally:
        gc.enable()


def test_thumbnails_are_small_squares(client: TestClient, rows: dict[str, Hit]) -> None:
    for name in ("green.png", "rising.mp4", "flicker.gif", "orange.png"):
        reply = client.get(f"/thumb/{rows[name].id}")
        assert reply.headers["content-type"] == "image/webp"
        picture = Image.open(io.BytesIO(reply.content))
        assert picture.width == picture.height <= TILE_SIDE


def test_a_video_is_shown_by_the_frame_of_its_moment(client: TestClient, engine: Engine) -> None:
    moments = [
        row
        for row in engine.shelf.searcher.snapshot.rows.to_pylist()
        if row["path"].endswith("rising.mp4") and row["moment"]
    ]
    levels = []
    for row in moments:
        picture = Image.open(io.BytesIO(client.get(f"/thumb/{row['id']}").content)).convert("L")
        levels.append(picture.getpixel((5, 5)))
    assert len(levels) >= 2
    assert levels == sorted(set(levels))


def test_media_come_whole_or_in_ranges(client: TestClient, rows: dict[str, Hit]) -> None:
    for name, mime in (("rising.mp4", "video/mp4"), ("orange.png", "image/png")):
        whole = client.get(f"/media/{rows[name].id}")
        assert whole.headers["content-type"] == mime
        part = client.get(f"/media/{rows[name].id}", headers={"Range": "bytes=10-19"})
        assert part.status_code == 206
        assert part.content == whole.content[10:20]
        assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
    assert whole.content.startswith(b"\x89PNG")


def test_a_file_that_is_gone_is_not_found(tmp_path: Path, tiny_model: RetrievalModel, media_folder: Path) -> None:
    copy = tmp_path / "copy.png"
    copy.write_bytes((media_folder / "red.png").read_bytes())
    build([copy], tmp_path / "gallery", tiny_model)
    engine = Engine(tmp_path / "gallery", tiny_model)
    client = TestClient(build_app(engine))
    (shown,) = engine.shelf.sample("", "", 0, 1)
    copy.unlink()
    for route in (f"/media/{shown.id}", f"/thumb/{shown.id}"):
        reply = client.get(route)
        assert reply.status_code == 404
        assert "copy.png" in reply.json()["detail"]


def test_files_outside_the_gallery_are_not_served(client: TestClient, media_folder: Path) -> None:
    outside = [
        str(media_folder / "left_out.png"),
        str(media_folder / "secret.txt"),
        str(media_folder / "red.png"),
        "/etc/passwd",
    ]
    asked = [
        "/media/999999",
        "/media/..%2f..%2fetc%2fpasswd",
        "/media/1/../../etc/passwd",
        "/page/../app.py",
        "/page/..%2fapp.py",
    ]
    for path in outside:
        asked += [f"/media/{path}", f"/thumb/{path}", f"/page/{path}", f"/file={path}", f"/file/{path}"]
        asked += [f"/gradio_api/file={path}", f"/gradio_api/file/{path}", f"/gradio_api/proxy=file://{path}"]
    for address in asked:
        assert client.get(address).status_code in (403, 404, 422), address


def test_a_picture_is_kept_for_the_search_and_shown_in_the_box(
    client: TestClient, engine: Engine, media_folder: Path
) -> None:
    token = client.post("/query-picture", content=(media_folder / "blue.png").read_bytes()).json()["token"]
    assert client.get(f"/query-picture/{token}").headers["content-type"] == "image/webp"
    assert Elements(answer(engine, Ask(picture=token, text="square"))["cards"]).of("li")
    found = Elements(answer(engine, Ask(picture=token))["cards"]).of("li")
    assert found[0]["data-path"].endswith("blue.png")


@pytest.mark.parametrize("content", [b"", b"plain text", b"\x89PNG\r\n\x1a\n0000"])
def test_a_broken_picture_is_answered_by_a_sentence(client: TestClient, engine: Engine, content: bytes) -> None:
    reply = client.post("/query-picture", content=content)
    assert reply.status_code == 415
    assert re.search(r"; choose another picture\.$", reply.json()["detail"])
    with pytest.raises(MediaError):
        engine.keep_picture(content)


def test_a_forgotten_picture_is_a_sentence(engine: Engine) -> None:
    with pytest.raises(CotsError, match="drop it in again"):
        answer(engine, Ask(picture="unknown"))
