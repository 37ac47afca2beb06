import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cots.data.image_io import open_image
from cots.errors import EvaluationError, SourceError
from cots.evaluation.evaluate import EvaluationResult, evaluate, measure
from cots.evaluation.evaluation_set import read_evaluation_set
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


def _counts(result: EvaluationResult) -> tuple[int, int]:
    return len(result.test_set.items), len(result.test_set.captions)


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
    assert (result.kind, _counts(result), result.failures) == ("image", (12, 18), {})
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
    assert {*promised, "fingerprint", "versions", "decode_failures", "seconds", "intervals"} <= document.keys()
    for direction in ("text_to_image", "image_to_text"):
        assert {"R@1", "R@5", "R@10", "MedR", "MeanR"} <= document[direction].keys()
    assert document["protocol"] == str(file)
    assert (document["images"], document["captions"]) == (12, 18)
    recalls = [document[way][f"R@{k}"] for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    assert document["RSum"] == pytest.approx(sum(recalls))
    for way in ("text_to_image", "image_to_text"):
        for name, (low, high) in document["intervals"][way].items():
            assert low <= document[way][name] <= high
    assert document["normalised"]["note"] == "uses the whole test set"
    assert document["normalised"]["dual_softmax"].keys() == {"text_to_image", "image_to_text"}
    assert {"decoding", "encoding", "captions", "scoring", "total"} == document["seconds"].keys()
    assert "torch" in document["versions"]
    ranks = document["queries"]["text_to_image"]["ranks"]
    assert document["text_to_image"]["R@5"] == pytest.approx(100 * np.mean(np.array(ranks) <= 5))


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
    assert _counts(split) == (12, 18)
    assert split.directions == joined.directions


def test_an_unreadable_item_is_named_and_never_found(
    pictures: list[dict], tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    (tmp_path / "00.png").write_bytes(b"")  # found by the walk, not readable
    (tmp_path / "01.png").unlink()  # not even there
    good = (tmp_path / "02.png").read_bytes()
    (tmp_path / "02.png").write_bytes(good[: len(good) // 2])  # looks like a picture until it is decoded
    result = evaluate(_write(tmp_path / "pairs.jsonl", pictures), tiny_model, max_bad_share=0.25)
    assert {Path(path).name: reason for path, reason in result.failures.items()} == {
        "00.png": "the file is empty (0 bytes) (named in " + str(tmp_path / "pairs.jsonl") + ", line 1)",
        "01.png": "no such file or directory (named in " + str(tmp_path / "pairs.jsonl") + ", line 2)",
        "02.png": result.failures[str(tmp_path / "02.png")],
    }
    assert _counts(result) == (12, 18)
    whole = evaluate(_write(tmp_path / "rest.jsonl", pictures[3:]), tiny_model).directions["text_to_image"]
    # 14 captions find their items among 9 as before, the 4 of unreadable items come behind all of these
    assert result.directions["text_to_image"]["R@1"] == pytest.approx(whole["R@1"] * 14 / 18)
    assert result.directions["text_to_image"]["MeanR"] == pytest.approx((whole["MeanR"] * 14 + 12 * 4) / 18)


def test_too_many_unreadable_items_are_an_error(
    pictures: list[dict], tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    (tmp_path / "00.png").write_bytes(b"")
    file = _write(tmp_path / "pairs.jsonl", pictures)
    with pytest.raises(EvaluationError, match=r"1 of 12 items .* more than 1%: .*00\.png: the file is empty"):
        evaluate(file, tiny_model)
    assert len(evaluate(file, tiny_model, max_bad_share=1 / 12).failures) == 1


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


def test_items_of_a_group_are_relevant_to_each_others_captions(
    pictures: list[dict], tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    """Every two neighbours share a group: a caption finds either, and pushes neither down."""
    apart = evaluate(_write(tmp_path / "apart.jsonl", pictures), tiny_model)
    for number, row in enumerate(pictures):
        row["group"] = f"g{number // 2}"
    together = evaluate(_write(tmp_path / "together.jsonl", pictures), tiny_model)
    pixels = [tiny_model.transform(open_image(tmp_path / row["image"])) for row in pictures]
    items = np.stack([tiny_model.encode_images(one[None])[0].numpy() for one in pixels])
    owner = [item for item, row in enumerate(pictures) for _ in row["captions"]]
    texts = tiny_model.encode_texts([caption for row in pictures for caption in row["captions"]]).numpy()
    expected = []
    for line, own in zip((texts @ items.T).round(6), owner):
        relevant = [item // 2 == own // 2 for item in range(12)]
        best = max(s for s, r in zip(line, relevant) if r)
        expected.append(1 + sum(s >= best and not r for s, r in zip(line, relevant)))
    assert together.rankings["text_to_image"].ranks.tolist() == expected
    assert (together.rankings["text_to_image"].ranks <= apart.rankings["text_to_image"].ranks).all()
    units = together.queries()["text_to_image"].units
    assert units.tolist() == [item // 2 for item in owner]  # a group is resampled as a whole
    assert "bootstrap over 6 groups of 12 images, " in together.to_json(resamples=10)["intervals"]["method"]
    assert "bootstrap over 12 images, " in apart.to_json(resamples=10)["intervals"]["method"]


def test_a_shards_group_counts_as_a_tables_does(
    pictures: list[dict], tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for number, row in enumerate(pictures):
            row["group"] = f"g{number // 3}"
            shard.add(tmp_path / row["image"], f"{number:02}.png")
            content = json.dumps({"captions": row["captions"], "group": row["group"]}).encode()
            member = tarfile.TarInfo(f"{number:02}.json")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    from_shard = evaluate(tmp_path / "shard.tar", tiny_model)
    from_table = evaluate(_write(tmp_path / "table.jsonl", pictures), tiny_model)
    assert from_shard.directions == from_table.directions
    assert from_shard.test_set.digest == from_table.test_set.digest


def test_folds_are_galleries_of_their_own(pictures: list[dict], tmp_path: Path, tiny_model: RetrievalModel) -> None:
    """The ranks of two folds are those of two files."""
    test_set = read_evaluation_set(_write(tmp_path / "all.jsonl", pictures))
    folded = measure(replace(test_set, folds=2), tiny_model)
    halves = [
        evaluate(_write(tmp_path / f"{name}.jsonl", part), tiny_model)
        for name, part in (("first", pictures[:6]), ("second", pictures[6:]))
    ]
    for way in ("text_to_image", "image_to_text"):
        apart = [rank for half in halves for rank in half.rankings[way].ranks.tolist()]
        assert folded.rankings[way].ranks.tolist() == apart


@pytest.mark.parametrize("source", [".", "*.tar"])
def test_shards_that_are_measured_as_one_set_are_named(pictures: list[dict], tmp_path: Path, source: str) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, rows in (("train.tar", pictures[:4]), ("val.tar", pictures[4:7])):
        with tarfile.open(shards / name, "w") as shard:
            for row in rows:
                content = row["captions"][0].encode()
                member = tarfile.TarInfo(row["image"].replace(".png", ".txt"))
                member.size = len(content)
                shard.add(tmp_path / row["image"], row["image"])
                shard.addfile(member, io.BytesIO(content))
    (warning,) = read_evaluation_set(shards / source).warnings
    assert warning.startswith("2 files are measured as one set of 7 items: ")
    assert warning.endswith(f"{shards}/train.tar (4), {shards}/val.tar (3)")
    assert read_evaluation_set(shards / "val.tar").warnings == ()


def test_paths_with_dots_name_one_item(pictures: list[dict], tmp_path: Path, tiny_model: RetrievalModel) -> None:
    (tmp_path / "lists").mkdir()
    for row in pictures:
        row["image"] = "../" + row["image"]
    assert evaluate(_write(tmp_path / "lists" / "pairs.jsonl", pictures), tiny_model).failures == {}


def test_one_content_under_two_paths_is_named_unless_a_group_says_so(pictures: list[dict], tmp_path: Path) -> None:
    shutil.copy(tmp_path / pictures[2]["image"], tmp_path / "copy.png")
    copy = {"image": "copy.png", "captions": ["another caption"]}
    (warning,) = read_evaluation_set(_write(tmp_path / "pairs.jsonl", [*pictures, copy])).warnings
    assert warning.startswith("1 times one content stands under several paths")
    assert "copy.png" in warning
    grouped = [*pictures[:2], pictures[2] | {"group": "g"}, *pictures[3:], copy | {"group": "g"}]
    assert read_evaluation_set(_write(tmp_path / "grouped.jsonl", grouped)).warnings == ()


def test_a_picture_among_videos_is_named(tmp_path: Path) -> None:
    rows = [{"video": _clip(tmp_path / f"{n}.gif", n).name, "captions": [f"a {WORDS[n]}"]} for n in range(3)]
    Image.new("RGB", (64, 64)).save(tmp_path / "still.mp4", "PNG")
    rows.append({"video": "still.mp4", "captions": ["a square"]})
    with pytest.raises(EvaluationError, match=r"images and videos; .*1 of 4 are images: .*still\.mp4"):
        read_evaluation_set(_write(tmp_path / "clips.jsonl", rows))


def test_a_caption_file_in_another_encoding_is_refused(
    pictures: list[dict], tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    file = tmp_path / "latin.jsonl"
    rows = "".join(json.dumps(row | {"captions": ["un garçon"]}, ensure_ascii=False) + "\n" for row in pictures)
    file.write_bytes(rows.encode("latin-1"))
    with pytest.raises(EvaluationError, match=r"12 rows cannot be used, the first: .*latin\.jsonl, line 1: not UTF-8"):
        evaluate(file, tiny_model)
    file.write_bytes(rows.encode("utf-16"))
    with pytest.raises(EvaluationError, match=r"latin\.jsonl, line 1: not UTF-8 \(byte 0xff\)"):
        evaluate(file, tiny_model)


def test_sound_without_pictures_and_a_file_without_frames_are_named(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    rows = [{"video": _clip(tmp_path / f"{n}.gif", n).name, "captions": [f"a {WORDS[n]}"]} for n in range(4)]
    _sound_only(tmp_path / "sound.mp4")
    (tmp_path / "nothing.mp4").write_bytes(b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2" + bytes(64))
    rows += [{"video": name, "captions": ["a dog"]} for name in ("sound.mp4", "nothing.mp4")]
    file = _write(tmp_path / "clips.jsonl", rows)
    with pytest.raises(EvaluationError, match="2 of 6 items"):
        evaluate(file, tiny_model)
    result = evaluate(file, tiny_model, max_bad_share=0.5)
    assert {Path(path).name for path in result.failures} == {"sound.mp4", "nothing.mp4"}
    assert result.rankings["text_to_video"].ranks[-2:].tolist() == [6, 6]
    assert all(reason for reason in result.failures.values())


def _sound_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
