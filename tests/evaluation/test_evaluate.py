import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cots.data.image_io import open_image
from cots.errors import EvaluationError, SourceError
from cots.evaluation.evaluate import evaluate
from cots.model.retrieval_model import RetrievalModel

WORDS = ("dog", "cat", "bird", "boat", "car", "truck", "snow", "grass")


def _picture(path: Path, seed: int) -> Path:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((64, 64), Image.Resampling.NEAREST).save(path)
    return path


def _clip(path: Path, seed: int) -> Path:
    """An animation of three seconds: a video that any Pillow writes."""
    frames = [
        Image.fromarray(np.random.default_rng([seed, n]).integers(0, 256, (64, 64, 3), np.uint8)) for n in range(3)
    ]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000, loop=0)
    return path


def _write(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> list[dict]:
    """Twelve pictures with one or two captions each, as rows."""
    return [
        {
            "image": _picture(tmp_path / f"{n:02}.png", n).name,
            "captions": [f"a {WORDS[n % 8]} {n % 5}", "red"][: 1 + n % 2],
        }
        for n in range(12)
    ]


def _brute_force(rows: Sequence[dict], folder: Path, model: RetrievalModel) -> tuple[list[int], list[int]]:
    """Pessimistic ranks of every caption's item, and of every item's best caption."""
    pixels = [model.transform(open_image(folder / row["image"])) for row in rows]
    items = np.stack([model.encode_images(one[None])[0].numpy() for one in pixels])
    owner = [item for item, row in enumerate(rows) for _ in row["captions"]]
    texts = np.stack([model.encode_texts([caption])[0].numpy() for row in rows for caption in row["captions"]])
    scores = (texts @ items.T).round(5)
    to_image = [int(1 + sum(s >= line[o] for i, s in enumerate(line) if i != o)) for line, o in zip(scores, owner)]
    to_text = []
    for item, column in enumerate(scores.T):
        best = max(score for score, o in zip(column, owner) if o == item)
        to_text.append(1 + sum(score >= best for score, o in zip(column, owner) if o != item))
    return to_image, to_text


def test_ranks_are_those_of_brute_force(pictures: list[dict], tmp_path: Path, tiny_model: RetrievalModel) -> None:
    # captions that several items share would tie exactly, and in brute force only up to rounding
    for number, row in enumerate(pictures):
        row["captions"] = [f"{caption} {WORDS[number % 8]} {'x' * number}" for caption in row["captions"]]
    result = evaluate(_write(tmp_path / "pairs.jsonl", pictures), tiny_model, batch_size=5)
    assert (result.kind, result.items, result.captions, result.unreadable) == ("image", 12, 18, [])
    for direction, ranks in zip(("text_to_image", "image_to_text"), _brute_force(pictures, tmp_path, tiny_model)):
        metrics = result.directions[direction]
        for k in (1, 5, 10):
            assert metrics[f"R@{k}"] == pytest.approx(100 * np.mean(np.array(ranks) <= k))
        assert metrics["MedR"] == np.median(ranks)
        assert metrics["MeanR"] == pytest.approx(np.mean(ranks))


def test_the_json_document(pictures: list[dict], tmp_path: Path, tiny_model: RetrievalModel) -> None:
    file = _write(tmp_path / "pairs.jsonl", pictures)
    document = json.loads(json.dumps(evaluate(file, tiny_model).to_json()))
    promised = ["protocol", "model", "images", "captions", "text_to_image", "image_to_text", "RSum"]
    assert set(document) == {*promised, "fingerprint", "unreadable", "seconds"}
    for direction in ("text_to_image", "image_to_text"):
        assert {"R@1", "R@5", "R@10", "MedR", "MeanR"} <= document[direction].keys()
    assert document["protocol"] == str(file)
    assert (document["images"], document["captions"]) == (12, 18)
    recalls = [document[way][f"R@{k}"] for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    assert document["RSum"] == pytest.approx(sum(recalls))


def test_videos(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    rows = [{"video": _clip(tmp_path / f"{n}.gif", n).name, "captions": [f"a {WORDS[n]}"]} for n in range(4)]
    document = evaluate(_write(tmp_path / "clips.jsonl", rows), tiny_model).to_json()
    assert document["videos"] == 4
    assert "images" not in document
    assert document["text_to_video"]["R@5"] == document["video_to_text"]["R@5"] == 100


def test_rows_of_one_path_are_one_item(pictures: list[dict], tmp_path: Path, tiny_model: RetrievalModel) -> None:
    apart = [{"image": row["image"], "captions": [caption]} for row in pictures for caption in row["captions"]]
    joined = evaluate(_write(tmp_path / "joined.jsonl", pictures), tiny_model)
    split = evaluate(_write(tmp_path / "split.jsonl", apart), tiny_model)
    assert (split.items, split.captions) == (12, 18)
    assert split.directions == joined.directions


def test_an_unreadable_item_is_named_and_never_found(
    pictures: list[dict], tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    (tmp_path / "00.png").write_bytes(b"")  # found by the walk, not readable
    (tmp_path / "01.png").unlink()  # not even there
    good = (tmp_path / "02.png").read_bytes()
    (tmp_path / "02.png").write_bytes(good[: len(good) // 2])  # looks like a picture until it is decoded
    result = evaluate(_write(tmp_path / "pairs.jsonl", pictures), tiny_model, max_bad_share=0.25)
    assert [Path(path).name for path in result.unreadable] == ["00.png", "01.png", "02.png"]
    assert (result.items, result.captions) == (12, 18)
    whole = evaluate(_write(tmp_path / "rest.jsonl", pictures[3:]), tiny_model).directions["text_to_image"]
    # 14 captions find their items among 9 as before, the 4 of unreadable items come behind all of these
    assert result.directions["text_to_image"]["R@1"] == pytest.approx(whole["R@1"] * 14 / 18)
    assert result.directions["text_to_image"]["MeanR"] == pytest.approx((whole["MeanR"] * 14 + 12 * 4) / 18)


def test_too_many_unreadable_items_are_an_error(
    pictures: list[dict], tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    (tmp_path / "00.png").write_bytes(b"")
    file = _write(tmp_path / "pairs.jsonl", pictures)
    with pytest.raises(EvaluationError, match=r"1 of 12 items .* more than 1%; the last: .*00\.png: the file is empty"):
        evaluate(file, tiny_model)
    assert evaluate(file, tiny_model, max_bad_share=1 / 12).items == 12


def test_files_that_cannot_be_evaluated(pictures: list[dict], tmp_path: Path, tiny_model: RetrievalModel) -> None:
    silent = _write(tmp_path / "silent.jsonl", [*pictures, {"image": _picture(tmp_path / "x.png", 99).name}])
    with pytest.raises(EvaluationError, match=r"1 items of .* have no caption, the first is .*x\.png"):
        evaluate(silent, tiny_model)
    clip = {"video": _clip(tmp_path / "x.gif", 1).name, "captions": ["a dog"]}
    with pytest.raises(EvaluationError, match="images and videos; evaluate them apart"):
        evaluate(_write(tmp_path / "mixed.jsonl", [*pictures, clip]), tiny_model)
    nothing = _write(tmp_path / "nothing.jsonl", [{"image": "gone.png", "captions": ["a dog"]}])
    with pytest.raises(EvaluationError, match="neither images nor videos that can be read"):
        evaluate(nothing, tiny_model)
    with pytest.raises(EvaluationError, match="1 rows cannot be used"):
        evaluate(_write(tmp_path / "row.jsonl", [*pictures, {"image": "", "captions": ["a dog"]}]), tiny_model)
    with pytest.raises(SourceError, match="no file or folder"):
        evaluate(tmp_path / "none.jsonl", tiny_model)
