"""Every protocol reads its data as they are distributed, and refuses what is not in order before anything runs."""

import csv
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import dataset_folders
import pytest
from dataset_folders import karpathy, msrvtt_1ka, msvd, reduced, write_clip, write_picture

from cots.errors import EvaluationError
from cots.evaluation import annotations
from cots.evaluation.evaluate import measure
from cots.evaluation.protocols import PROTOCOLS, Protocol, open_protocol
from cots.evaluation.references import REFERENCES, references
from cots.model.retrieval_model import RetrievalModel

LAYOUTS: dict[str, tuple[Callable[[Path], Protocol], dict[str, list[str]]]] = {
    "msrvtt_1ka": (
        msrvtt_1ka,
        {f"video{7020 + n}": [f"a dog number {n} runs"] for n in range(4)},
    ),
    "flickr30k_1k": (
        lambda folder: karpathy(folder, "flickr30k_1k"),
        {f"{n:04}.jpg": [f"a cat number {n} sits {word}" for word in "abcde"] for n in (0, 1, 3, 4)},
    ),
    "coco_5k": (
        lambda folder: karpathy(folder, "coco_5k"),
        {f"{n:04}.jpg": [f"a cat number {n} sits {word}" for word in "abcde"] for n in (0, 1, 3, 4)},
    ),
    "msrvtt_full": (
        dataset_folders.msrvtt_full,
        {f"video{n}": [f"a dog of {n}", f"a cat of {n}"] for n in (7010, 7011)},
    ),
    "msrvtt_9k": (dataset_folders.msrvtt_9k, {"video1": ["a dog of 1", "a cat of 1"]}),
    "msvd": (msvd, {name: ["a dog runs", "a cat"] for name in ("aaa_1_10", "bbb_5_9")}),
    "msvd as text": (
        lambda folder: msvd(folder, pickled=False),
        {name: ["a dog runs", "a cat"] for name in ("aaa_1_10", "bbb_5_9")},
    ),
    "didemo": (dataset_folders.didemo, {"1@N0_2_ab.mov": ["a dog runs then it sits"], "3@N0_4_cd.avi": ["a cat"]}),
    "lsmdc": (
        dataset_folders.lsmdc,
        {
            "1014_2012_00.00.51.926-00.00.54.129": ["SOMEONE walks 0."],
            "3015_X_00.01.02.000-00.01.03.000": ["SOMEONE walks 1."],
        },
    ),
    "activitynet": (
        dataset_folders.activitynet,
        {"v_x1": ["A man runs. He stops x1."], "v_y2": ["A man runs. He stops y2."]},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_as_it_is_distributed(name: str, tmp_path: Path, tiny_model: RetrievalModel) -> None:
    write, expected = LAYOUTS[name]
    test_set = open_protocol(write(tmp_path), tmp_path)
    assert {item.name: list(item.captions) for item in test_set.items} == expected
    assert all(item.sample for item in test_set.items)
    document = measure(test_set, tiny_model).to_json(resamples=20)
    assert document[f"{test_set.kind}s"] == len(expected)
    assert document["decode_failures"] == []
    frames = PROTOCOLS[name.split()[0]].frames
    assert (document["frames"], document["until"]) == (frames.count, frames.until)


def test_the_counts_are_those_of_the_literature() -> None:
    assert {name: (protocol.items, protocol.captions) for name, protocol in PROTOCOLS.items()} == {
        "flickr30k_1k": (1000, 5000),
        "coco_5k": (5000, 25000),
        "coco_1k_5fold": (5000, 25000),
        "msrvtt_1ka": (1000, 1000),
        "msrvtt_full": (2990, 59800),
        "msrvtt_7k": (7010, 140200),
        "msrvtt_9k": (9000, 180000),
        "msvd": (670, None),
        "didemo": (1004, 1004),
        "lsmdc": (1000, 1000),
        "activitynet": (4917, 4917),
    }


def test_coco_folds_are_a_fifth_each(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    karpathy(tmp_path, "coco_5k")
    assert PROTOCOLS["coco_1k_5fold"].folds == 5
    folded = replace(reduced("coco_1k_5fold", 4, 20), folds=2)
    ranks = measure(open_protocol(folded, tmp_path), tiny_model).rankings["text_to_image"].ranks
    assert ranks.max() <= 2  # each gallery holds two images


def test_a_didemo_video_counts_for_its_first_thirty_seconds(tmp_path: Path) -> None:
    protocol = dataset_folders.didemo(tmp_path)
    sample = open_protocol(protocol, tmp_path).items[0].sample
    assert sample is not None
    assert max(protocol.frames.read(sample, 64).times) < 30


def test_another_number_of_videos_is_refused(tmp_path: Path) -> None:
    msrvtt_1ka(tmp_path)
    with pytest.raises(EvaluationError, match=r"lists 4 videos, and msrvtt_1ka has 1,000: this is another list"):
        open_protocol("msrvtt_1ka", tmp_path)


def test_a_list_of_as_many_other_videos_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "MSRVTT_JSFUSION_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video_id", "sentence"), *((f"video{n}", "a dog") for n in range(1000))])
    with pytest.raises(EvaluationError, match="1,000 videos, but not those of msrvtt_1ka"):
        open_protocol("msrvtt_1ka", tmp_path)


def test_another_number_of_captions_is_refused(tmp_path: Path) -> None:
    protocol = replace(karpathy(tmp_path, "coco_5k"), captions=25)
    with pytest.raises(EvaluationError, match="4 images with 20 captions, and coco_5k has 25"):
        open_protocol(protocol, tmp_path)


def test_missing_videos_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    ids = tuple(range(7000, 7015))
    protocol = msrvtt_1ka(tmp_path, ids)
    for number in ids[1:14]:
        (tmp_path / "videos" / f"video{number}.mp4").unlink()
    with pytest.raises(EvaluationError) as caught:
        open_protocol(protocol, tmp_path)
    message = str(caught.value)
    assert message.startswith("13 of the 15 videos of msrvtt_1ka are not below")
    assert [number for number in range(7000, 7015) if f"video{number}" in message] == list(range(7001, 7011))
    assert "and 3 more" in message


def test_a_missing_video_under_a_like_name_is_pointed_out(tmp_path: Path) -> None:
    protocol = msrvtt_1ka(tmp_path)
    (tmp_path / "videos" / "video7021.mp4").rename(tmp_path / "videos" / "Video7021.mp4")
    with pytest.raises(EvaluationError, match=r"video7021 \(there is a Video7021\.mp4\)"):
        open_protocol(protocol, tmp_path)


def test_a_video_of_another_number_is_not_pointed_out(tmp_path: Path) -> None:
    protocol = msrvtt_1ka(tmp_path)
    (tmp_path / "videos" / "video7021.mp4").rename(tmp_path / "videos" / "video702.mp4")
    with pytest.raises(EvaluationError, match=r"video7021\. Figures .* `cots evaluate --list` says where to get them"):
        open_protocol(protocol, tmp_path)


def test_two_files_of_one_video_are_refused(tmp_path: Path) -> None:
    protocol = msrvtt_1ka(tmp_path)
    write_clip(tmp_path / "more" / "video7021.mov", 99)
    with pytest.raises(
        EvaluationError, match=r"1 videos of msrvtt_1ka have more than one file: video7021 \(.*keep one"
    ):
        open_protocol(protocol, tmp_path)


def test_links_to_folders_are_followed_and_no_folder_is_entered_twice(tmp_path: Path) -> None:
    protocol = msrvtt_1ka(tmp_path / "real")
    (tmp_path / "real" / "lists").mkdir()
    (tmp_path / "real" / "MSRVTT_JSFUSION_test.csv").rename(tmp_path / "real" / "lists" / "MSRVTT_JSFUSION_test.csv")
    (tmp_path / "real" / "videos" / "again").symlink_to(tmp_path / "real")
    (tmp_path / "data").mkdir()
    for name in ("lists", "videos"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "real" / name)
    for folder in (tmp_path / "real", tmp_path / "data"):
        test_set = open_protocol(protocol, folder)
        assert [item.problem for item in test_set.items] == [""] * 4
        assert test_set.warnings == ()


def test_a_picture_called_like_a_video_is_refused(tmp_path: Path) -> None:
    protocol = msrvtt_1ka(tmp_path)
    picture = write_picture(tmp_path / "x.png", 1)
    picture.rename(tmp_path / "videos" / "video7022.mp4")
    with pytest.raises(EvaluationError, match=r"1 files of msrvtt_1ka are no videos.*video7022\.mp4 \(an image\)"):
        open_protocol(protocol, tmp_path)


def test_of_one_content_under_many_ids_ten_are_named(tmp_path: Path) -> None:
    protocol = msrvtt_1ka(tmp_path, tuple(range(7000, 7015)))
    for number in range(7001, 7015):
        shutil.copy(tmp_path / "videos" / "video7000.mp4", tmp_path / "videos" / f"video{number}.mp4")
    (copies,) = open_protocol(protocol, tmp_path).warnings
    assert copies.endswith("video7008 = video7009 and 5 more")


def test_one_content_under_two_ids_is_named_and_extra_videos_are_left_out(
    tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    protocol = msrvtt_1ka(tmp_path)
    shutil.copy(tmp_path / "videos" / "video7020.mp4", tmp_path / "videos" / "video7023.mp4")
    write_clip(tmp_path / "videos" / "video1.mp4", 50)
    test_set = open_protocol(protocol, tmp_path)
    extra, copies = test_set.warnings
    assert extra == "1 video files are no part of msrvtt_1ka and are left out: videos/video1.mp4"
    assert copies.endswith("several ids (mislabelled?): video7020 = video7023")
    assert measure(test_set, tiny_model).to_json(resamples=20)["warnings"] == [extra, copies]


def test_a_video_that_cannot_be_opened_or_decoded_counts_as_never_found(
    tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    protocol = msrvtt_1ka(tmp_path)
    (tmp_path / "videos" / "video7020.mp4").write_bytes(b"")
    whole = (tmp_path / "videos" / "video7021.mp4").read_bytes()
    (tmp_path / "videos" / "video7021.mp4").write_bytes(whole[: len(whole) // 3])
    test_set = open_protocol(protocol, tmp_path)
    result = measure(test_set, tiny_model, max_bad_share=0.5)
    assert set(result.failures) == {"video7020", "video7021"}
    assert result.rankings["text_to_video"].ranks[:2].tolist() == [4, 4]
    with pytest.raises(
        EvaluationError, match=r"2 of 4 items of msrvtt_1ka cannot be read, more than 1%: video7020: .*; video7021: "
    ):
        measure(test_set, tiny_model)


def test_a_missing_annotation_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"needs dataset_coco\.json .*Where to get it: .*karpathy"):
        open_protocol("coco_5k", tmp_path)
    with pytest.raises(EvaluationError, match="There is no folder"):
        open_protocol("coco_5k", tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match=r"no protocol and no file msrvtt_1k; did you mean msrvtt_1ka\?"):
        open_protocol("msrvtt_1k", tmp_path)
    with pytest.raises(EvaluationError, match="did you mean msrvtt_1ka or msrvtt_full or msrvtt_7k or msrvtt_9k"):
        open_protocol("msrvtt", tmp_path)


def test_an_annotation_file_in_another_encoding_or_format_is_refused(tmp_path: Path) -> None:
    protocol = msrvtt_1ka(tmp_path)
    table = tmp_path / "MSRVTT_JSFUSION_test.csv"
    good = table.read_text()
    table.write_bytes(good.replace("dog", "garçon").encode("latin-1"))
    with pytest.raises(
        EvaluationError, match=r"MSRVTT_JSFUSION_test\.csv is not UTF-8 \(byte 0xe7 at position \d+\); convert"
    ):
        open_protocol(protocol, tmp_path)
    table.write_bytes(good.encode("utf-16"))
    with pytest.raises(EvaluationError, match="iconv -f utf-16 -t utf-8"):
        open_protocol(protocol, tmp_path)
    table.write_text(good.replace("video_id", "name"))
    with pytest.raises(EvaluationError, match="has no column video_id"):
        open_protocol(protocol, tmp_path)
    table.write_text(good + "ret9,msr9,video9\n")
    with pytest.raises(EvaluationError, match=r"Line 6 of .*MSRVTT_JSFUSION_test\.csv ends before its column sentence"):
        open_protocol(protocol, tmp_path)
    table.write_text(good.replace("a dog number 0 runs\n", "\n").replace(",video7020,", ""))
    with pytest.raises(EvaluationError, match=r"Line 2 of .* ends before its column video_id"):
        open_protocol(protocol, tmp_path)
    table.write_text(good + f'ret9,msr9,video9,"{"a dog " * 30_000}')  # a quote that nothing closes
    longest = csv.field_size_limit(100_000)  # other modules raise it, for the whole process
    with pytest.raises(EvaluationError, match=r"is not a table with commas between its columns: Error field larger"):
        open_protocol(protocol, tmp_path)
    csv.field_size_limit(longest)
    table.write_text(good + good.splitlines()[1] + "\n")
    with pytest.raises(EvaluationError, match="lists 1 videos twice"):
        open_protocol(protocol, tmp_path)
    table.write_bytes(b"\xef\xbb\xbf" + good.encode())  # as a spreadsheet saves UTF-8
    assert len(open_protocol(protocol, tmp_path).items) == 4
    coco = karpathy(tmp_path / "coco", "coco_5k")
    (tmp_path / "coco" / "dataset_coco.json").write_text(json.dumps({"images": [{"split": "test"}]}))
    with pytest.raises(EvaluationError, match=r"dataset_coco\.json is not a Karpathy file.*KeyError 'filename'"):
        open_protocol(coco, tmp_path / "coco")
    (tmp_path / "coco" / "dataset_coco.json").write_text('{"images": [')
    with pytest.raises(EvaluationError, match="is not JSON"):
        open_protocol(coco, tmp_path / "coco")


def test_a_caption_with_a_separator_of_unicode_is_one_line(tmp_path: Path) -> None:
    caption = "a dog\u2028runs\x85home"
    (tmp_path / "lsmdc.csv").write_text(f"clip\t0\t1\t0\t1\t{caption}\r\n", encoding="utf-8", newline="")
    assert annotations.lsmdc([tmp_path / "lsmdc.csv"]) == {"clip": [caption]}
    (tmp_path / "list.txt").write_text("clip\r\n", newline="")
    (tmp_path / "described.txt").write_text(f"clip {caption}\n", encoding="utf-8")
    assert annotations.msvd([tmp_path / "list.txt", tmp_path / "described.txt"]) == {"clip": [caption]}


def test_a_pickle_that_would_run_something_is_not_loaded(tmp_path: Path) -> None:
    protocol = msvd(tmp_path)

    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "run",)

    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({"aaa_1_10": Evil()}))
    with pytest.raises(EvaluationError, match="only plain lists and words are read"):
        open_protocol(protocol, tmp_path)
    assert not (tmp_path / "run").exists()


def test_every_reference_belongs_to_a_protocol_and_names_its_source() -> None:
    assert {row.protocol for row in REFERENCES} <= PROTOCOLS.keys()
    for row in REFERENCES:
        assert "arXiv:" in row.source
        assert row.text_to_item[0] is not None
    settings = [row.setting for row in references("msrvtt_1ka")]
    assert settings == sorted(
        settings, key=["zero-shot", "zero-shot, re-ranked", "fine-tuned", "fine-tuned, re-ranked"].index
    )


def test_there_is_something_to_compare_with_on_whatever_is_evaluated() -> None:
    for protocol in PROTOCOLS.values():
        assert bool(references(protocol.name)) != protocol.is_training


def test_a_reference_says_what_it_was_trained_on_where_that_differs() -> None:
    conditions = {row.model: row.conditions for row in references("msrvtt_1ka")}
    assert conditions["CLIP4Clip meanP ViT-B/32"] == "fine-tuned on 9k"
    assert conditions["CLIP-ViP ViT-B/16 + dual softmax"] == "fine-tuned on 9k, re-ranked"
    assert conditions["PE core G/14 448"] == "zero-shot"
