"""`cots evaluate`: files, protocols, the list, reports and comparisons, and what it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_faults import assert_one_sentence

from cots.evaluation import protocols

Cots = Callable[..., Any]

LIST = "MSRVTT_JSFUSION_test.csv"


@pytest.fixture
def msrvtt(tmp_path: Path) -> Path:
    """A dozen clips laid out as 1k-A, whose real list has a thousand."""
    folder = tmp_path / "msrvtt"
    (folder / "videos").mkdir(parents=True)
    rows = ["key,vid_key,video_id,sentence"]
    for number in range(7020, 7032):
        rows.append(f"ret,msr{number},video{number},a person does number {number}")
        noise = np.random.default_rng(number).integers(0, 256, (3, 48, 64, 3), np.uint8)
        frames = [Image.fromarray(picture) for picture in noise]
        frames[0].save(folder / "videos" / f"video{number}.gif", save_all=True, append_images=frames[1:], duration=500)
    (folder / LIST).write_text("\n".join(rows) + "\n")
    return folder


def test_the_list(cots: Cots) -> None:
    outcome = cots("evaluate", "--list")
    assert outcome.code == 0
    assert "msrvtt_1ka  MSR-VTT, 1k-A" in outcome.out
    assert "recalled, not re-checked" in outcome.out
    one = cots("evaluate", "msrvtt_full", "--list")
    assert one.code == 0
    assert "CLIP2Video" in one.out
    assert "msrvtt_1ka" not in one.out
    assert_one_sentence(cots("evaluate", "msrvtt_ful", "--list"), "did you mean msrvtt_full")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--list", "--json", "out.json"), "--list does not go with --json"),
        (("--compare", "a.json", "b.json", "--report", "out"), "--compare does not go with --report"),
        (("msrvtt_1ka", "--compare", "a.json", "b.json"), "--compare does not go with msrvtt_1ka"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(cots: Cots, given: tuple[str, ...], message: str) -> None:
    outcome = cots("evaluate", *given)
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())


def test_a_report_and_a_comparison(cots: Cots, media: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", media / "pictures.jsonl", "--model", tiny_model_dir)
    outcome = cots(*arguments, "--json", tmp_path / "a.json", "--report", tmp_path / "report")
    assert outcome.code == 0
    assert "95 % intervals" in outcome.out
    assert "uses the whole test set" in outcome.out
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"index.html", "report.md", "report.json"}
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads((tmp_path / "report/report.json").read_text())
    compared = cots("evaluate", "--compare", tmp_path / "a.json", tmp_path / "report" / "report.json")
    assert compared.code == 0
    assert "text to image R@1" in compared.out
    document = cots("evaluate", "--compare", tmp_path / "a.json", tmp_path / "a.json", "--json", "-").document
    assert document["RSum"] == {"value": 0.0, "interval": [0.0, 0.0], "p_value": 1.0}


def test_what_could_not_be_written_is_refused_before_anything_is_read(cots: Cots, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ("evaluate", tmp_path / "none.jsonl")
    assert_one_sentence(cots(*arguments, "--json", tmp_path / "none" / "a.json"), "cannot be written.*no folder")
    assert_one_sentence(cots(*arguments, "--json", tmp_path), "cannot be written.*it is a folder")
    assert_one_sentence(cots(*arguments, "--report", tmp_path / "file"), "The report cannot be written to .*file: File")


def test_a_list_of_another_length_is_refused(cots: Cots, msrvtt: Path, tiny_model_dir: Path) -> None:
    outcome = cots("evaluate", "msrvtt_1ka", "--data", msrvtt, "--model", tiny_model_dir)
    assert_one_sentence(outcome, f"{LIST} lists 12 videos, and msrvtt_1ka has 1,000: this is another list")


def test_a_protocol_runs_to_the_end(
    cots: Cots, msrvtt: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(protocols.PROTOCOLS["msrvtt_1ka"], items=12, captions=12, ids_digest="")
    monkeypatch.setitem(protocols.PROTOCOLS, "msrvtt_1ka", few)
    arguments = ("evaluate", "msrvtt_1ka", "--data", msrvtt, "--model", tiny_model_dir, "--json", "-")
    document = cots(*arguments).document
    assert (document["videos"], document["captions"], document["frames"]) == (12, 12, 12)
    (msrvtt / "videos" / "video7025.gif").write_bytes(b"not a video")
    assert_one_sentence(cots(*arguments), "1 of 12 items of msrvtt_1ka cannot be read.*video7025")
    outcome = cots(*arguments, "--max-failures", 0.1)
    assert [one["path"] for one in outcome.document["decode_failures"]] == ["video7025"]
    assert "counted as never found: video7025: not an image or a video" in outcome.err


@pytest.fixture
def training_list(msrvtt: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two of the clips as the 9k list, whose real one has nine thousand."""
    (msrvtt / "MSRVTT_train.9k.csv").write_text("video_id\nvideo7020\nvideo7021\n")
    sentences = [{"video_id": f"video{n}", "caption": "a dog"} for n in (7020, 7021)]
    (msrvtt / "MSRVTT_data.json").write_text(json.dumps({"sentences": sentences}))
    few = replace(protocols.PROTOCOLS["msrvtt_9k"], items=2, captions=2, ids_digest="")
    monkeypatch.setitem(protocols.PROTOCOLS, "msrvtt_9k", few)
    return msrvtt


def test_a_training_list_is_verified_only(cots: Cots, training_list: Path) -> None:
    outcome = cots("evaluate", "msrvtt_9k", "--data", training_list)
    assert outcome.code == 0
    assert "2 videos and 2 captions, all there" in outcome.out
    assert "R@1" not in outcome.out


def test_videos_of_a_training_list_that_cannot_be_opened_are_named(cots: Cots, training_list: Path) -> None:
    (training_list / "videos" / "video7021.gif").write_bytes(b"")
    arguments = ("evaluate", "msrvtt_9k", "--data", training_list)
    outcome = cots(*arguments, "--max-failures", 0.5)
    assert outcome.code == 0
    assert "unreadable: video7021: the file is empty" in outcome.err
    assert "2 videos and 2 captions; 1 of the videos cannot be opened" in outcome.out
    assert "all there" not in outcome.out
    outcome = cots(*arguments)
    assert (outcome.code, outcome.out) == (1, "")
    assert "unreadable: video7021: the file is empty" in outcome.err
    assert "1 of 2 videos of msrvtt_9k cannot be opened, more than 1%" in outcome.err


def test_no_result_is_promised_of_a_training_list(cots: Cots, training_list: Path, tmp_path: Path) -> None:
    for option in (("--json", "-"), ("--json", tmp_path / "a.json"), ("--report", tmp_path / "report")):
        outcome = cots("evaluate", "msrvtt_9k", "--data", training_list, *option)
        assert (outcome.code, outcome.out) == (2, "")
        assert "msrvtt_9k is a training list, which is verified only" in " ".join(outcome.err.split())
    assert not (tmp_path / "report").exists()


def test_what_is_refused(cots: Cots, media: Path, tmp_path: Path) -> None:
    assert_one_sentence(cots("evaluate", "msrvt_1ka", "--data", tmp_path), "did you mean msrvtt_1ka")
    assert_one_sentence(cots("evaluate", "coco_5k", "--data", tmp_path), r"needs dataset_coco\.json")
    assert_one_sentence(cots("evaluate", tmp_path / "none.jsonl"), "no file or folder")
    (tmp_path / "pairs.json").write_text("[]")
    assert_one_sentence(cots("evaluate", tmp_path / "pairs.json"), r"pairs\.json is no list of .*; give a \.jsonl, ")
    assert_one_sentence(cots("evaluate", "--compare", tmp_path / "a.json", tmp_path / "b.json"), "cannot be read")
    (tmp_path / "pairs.jsonl").write_text("")
    for_a_file = cots("evaluate", tmp_path / "pairs.jsonl", "--data", media)
    assert for_a_file.code == 2
    assert "--data is for a protocol" in " ".join(for_a_file.err.split())
    without = cots("evaluate", "coco_5k")
    assert without.code == 2
    assert "--data DIR" in without.err


def test_a_folder_that_is_called_like_a_protocol_does_not_hide_it(
    cots: Cots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "coco_5k").mkdir()
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(cots("evaluate", "coco_5k", "--data", "coco_5k"), r"needs dataset_coco\.json")
