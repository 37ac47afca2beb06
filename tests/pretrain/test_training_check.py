import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageEnhance
from typer.testing import CliRunner

from cots.commands.application import app
from cots.config import PretrainConfig
from cots.errors import MediaError, SourceError, TrainingError
from pretrain.check import CheckReport, _judge_trial, check, examine
from pretrain.trainer import pretrain
from pretrain.trial import try_out

MakeConfig = Callable[..., PretrainConfig]
WriteShard = Callable[..., Path]

LONG = {"epochs": 20}  # so long that one bad item in twenty-five is drawn too often


def _encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def _photo(seed: int, side: int = 96) -> Image.Image:
    """Coarse noise, smoothly enlarged: no two alike."""
    noise = np.random.default_rng(seed).integers(20, 230, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def _item(name: str, media: bytes, *captions: str) -> dict[str, bytes]:
    return {f"{name}.png": media, f"{name}.json": json.dumps({"captions": captions or ["a red ball"]}).encode()}


def _found(config: PretrainConfig) -> str:
    report = examine(config)
    return "\n".join([*report.problems, *report.warnings])


def _only(path: Path) -> dict:
    return {"train": [{"path": str(path)}], "validation": []}


def test_a_sound_training_is_checked_without_leaving_a_trace(
    make_config: MakeConfig, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    before = set(tmp_path.iterdir())
    check(make_config())
    out = capsys.readouterr().out
    assert "Nothing found that would stop this run" in out
    assert "12 steps of 8 pairs" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert set(tmp_path.iterdir()) == before


def test_items_that_are_broken_tiny_twice_or_too_long_are_named(
    make_config: MakeConfig, shape_shard: WriteShard, tmp_path: Path
) -> None:
    twin = _encoded(_photo(1))
    shard = shape_shard(
        tmp_path / "mixed.tar",
        _item("broken", b"no picture")
        | _item("small", _encoded(_photo(2, 20)))
        | _item("one", twin)
        | _item("other", twin)
        | _item("talk", _encoded(_photo(3)), "a red ball on white " * 5)
        | {"mute.png": _encoded(_photo(4))},
    )
    report = examine(make_config(data=_only(shard), training=LONG))
    (broken,) = report.problems
    assert "2 of 30 items cannot be used" in broken
    assert "broken: " in broken
    assert "mute: it has no caption" in broken
    assert "max_bad_share=0.01" in broken
    text = "\n".join(report.warnings)
    assert "in 1 of 30 pictures the shorter side is under 32 px" in text
    assert "mixed.tar::small: 20 px" in text
    assert "1 picture lies in 2 items" in text
    assert "mixed.tar::one = mixed.tar::other" in text
    assert "The longest has 27 (mixed.tar::talk)" in text  # five times five words, [CLS] and [SEP]
    with pytest.raises(TrainingError, match="1 thing would stop this run"):
        check(make_config(data=_only(shard), training=LONG))


def test_few_broken_items_are_skipped_and_stop_nothing(
    make_config: MakeConfig, shape_shard: WriteShard, tmp_path: Path
) -> None:
    shard = shape_shard(tmp_path / "mixed.tar", _item("broken", b"no picture"))
    for changes in ({"data": {"max_bad_share": 0.1}, "training": LONG}, {}):
        report = examine(make_config(**{**changes, "data": {**_only(shard), **changes.get("data", {})}}))
        assert report.problems == []
        assert any("They will be skipped" in warning for warning in report.warnings)
    pretrain(make_config(data=_only(shard)))
    with pytest.raises(TrainingError, match=r"more than data\.max_bad_share allows"):
        pretrain(make_config("long", data=_only(shard), training=LONG))
    assert "max_bad_share" in examine(make_config("long2", data=_only(shard), training=LONG)).problems[0]


def test_a_validation_source_must_be_whole(make_config: MakeConfig, shape_shard: WriteShard, tmp_path: Path) -> None:
    shard = shape_shard(tmp_path / "val.tar", _item("broken", b"no picture"))
    config = make_config(data={"validation": [{"path": str(shard)}], "max_bad_share": 0.5})
    assert "a validation source must be whole" in "\n".join(examine(config).problems)
    with pytest.raises(MediaError, match=r"broken.*; every item of data\.validation must be readable, so that results"):
        pretrain(config)


def test_pictures_in_training_and_validation_are_leaks_even_when_saved_again(
    make_config: MakeConfig, shape_shard: WriteShard, tmp_path: Path
) -> None:
    same, again, fresh = _photo(1), _photo(2), _photo(3)
    brighter = ImageEnhance.Brightness(again).enhance(1.02)
    train = shape_shard(tmp_path / "train.tar", _item("a", _encoded(same)) | _item("b", _encoded(again)))
    validation = _write(
        tmp_path / "val.tar",
        _item("x", _encoded(same)) | _item("y", _encoded(brighter, "JPEG")) | _item("z", _encoded(fresh)),
    )
    config = make_config(data={"train": [{"path": str(train)}], "validation": [{"path": str(validation)}]})
    report = examine(config)
    leaks = [(Path(leak.validation).name, Path(leak.train).name, leak.identical) for leak in report.leaks]
    assert leaks == [("val.tar::x", "train.tar::a", True), ("val.tar::y", "train.tar::b", False)]
    assert "2 validation pictures are in the training sources too (1 identical, 1 near-identical)" in _found(config)


def _write(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"training": {"batch_size": 64}}, "fewer than a batch of 64"),
        ({"data": {"train": [{"path": "nonesuch-*.tar"}]}}, "Nothing matches nonesuch-"),
        ({"data": {"train": []}}, r"data.train names no source"),
        ({"data": {"validation": [{"path": "flickr-test.tar"}]}}, "named like a test split"),
        ({"data": {"validation": [{"path": "flickr/test/pairs.tar"}]}}, "named like a test split"),
        ({"data": {"validation": [{"path": "latest.tar"}]}}, "latest.tar"),
        (
            {"data": {"train": []}, "objective": {"masked_modeling": {"image_weight": 1, "visual_tokenizer": "gone"}}},
            "There is no directory gone",
        ),
    ],
)
def test_what_would_stop_the_run_is_found_before(make_config: MakeConfig, sections: dict, words: str) -> None:
    report = examine(make_config(**sections))
    assert words in "\n".join(report.problems)
    assert report.trial is None


def test_an_empty_shard_and_a_table_without_captions_hold_no_pairs(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty.tar").write_bytes(b"\0" * 10240)
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": "a.png"}) + "\n")
    (tmp_path / "a.png").write_bytes(_encoded(_photo(1)))
    for name in ("empty.tar", "list.jsonl"):
        assert "no pair of a picture and a caption" in _found(make_config(data=_only(tmp_path / name)))
    assert "a.png: it has no caption" in _found(make_config(data=_only(tmp_path / "list.jsonl")))
    rows = [json.dumps({"path": f"{name}.png", "caption": "a dog"}) for name in ("gone", "lost")]
    (tmp_path / "gone.jsonl").write_text("\n".join(rows))
    found = _found(make_config(data=_only(tmp_path / "gone.jsonl")))
    assert "for none of its 2 entries can be used: " in found
    assert "gone.png: no such file" in found


def test_rows_of_a_table_that_are_left_out_are_named(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = [{"path": f"{name}.png", "caption": "a red ball"} for name in "abcdefghi"] + [{"path": "mute.png"}]
    for number, row in enumerate(rows):
        (tmp_path / row["path"]).write_bytes(_encoded(_photo(number)))
    (tmp_path / "b.png").unlink()
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = _found(make_config(data=_only(tmp_path / "list.jsonl")))
    assert "list.jsonl: 2 entries are left out" in text
    assert "b.png: no such file or directory" in text
    assert "mute.png: it has no caption" in text


def test_a_filter_that_would_never_begin_is_told(make_config: MakeConfig) -> None:
    report = examine(make_config(objective={"noise_filter": {"queue_size": 5000}}))
    assert [warning for warning in report.warnings if "begins once it has seen 5,000 pairs" in warning]


def test_a_queue_longer_than_an_epoch_is_told(make_config: MakeConfig) -> None:
    def warnings(queue: int, captions: int) -> list[str]:
        config = make_config(objective={"contrastive": {"queue_size": queue}}, data={"captions_per_item": captions})
        return [warning for warning in examine(config).warnings if "contrastive.queue_size" in warning]

    (warning,) = warnings(49, 1)
    assert "objective.contrastive.queue_size is 49, and an epoch has 48 pairs" in warning
    assert warnings(96, 2) == []  # each caption of an item is a pair


def test_too_many_entries_that_are_left_out_stop_the_run_as_its_check_says(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(_encoded(_photo(number)))
    rows = [{"path": f"{number}.png", "caption": "a red ball"} for number in range(20)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = r"11 of 20 entries of data\.train cannot be used, more than data\.max_bad_share allows"
    config = make_config(data=_only(tmp_path / "list.jsonl"))
    with pytest.raises(TrainingError, match=words):
        pretrain(config)
    assert any(re.search(words, problem) for problem in examine(config).problems)


def test_entries_that_a_validation_source_lacks_stop_the_run_as_its_check_says(
    make_config: MakeConfig, shape_shard: WriteShard, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(_encoded(_photo(1)))
    rows = [{"path": f"{name}.png", "caption": "a red ball"} for name in "ab"]
    table = tmp_path / "held_out.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    config = make_config(data={"validation": [{"path": str(table)}]})
    words = r"1 of 2 entries of .*held_out\.jsonl cannot be used, the first: .*b\.png: no such file.*must be whole"
    with pytest.raises(SourceError, match=words):
        pretrain(config)
    assert any(re.search(words, problem) for problem in examine(config).problems)
    shard = shape_shard(tmp_path / "val.tar", {"mute.png": _encoded(_photo(1))})
    with pytest.raises(MediaError, match=r"val\.tar::mute: it has no caption"):
        pretrain(make_config("mute", data={"validation": [{"path": str(shard)}]}))


def test_a_run_that_is_there_already_is_not_overwritten(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    checkpoints = Path(config.training.output) / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-00000004.pt").write_bytes(b"")
    assert "holds a run already; resume with training.resume=true" in _found(config)


def test_settings_that_do_not_fit_each_other_fail_in_the_step(make_config: MakeConfig) -> None:
    model = make_config().model.model_dump()
    model["text_tower"]["vocabulary"] = 20
    assert "set model.text_tower.vocabulary" in _found(make_config(model=model))


def test_memory_grows_with_the_part_of_the_batch_that_is_held_at_once(make_config: MakeConfig) -> None:
    def memory(**training: object) -> dict[str, int]:
        return try_out(make_config(training=training)).memory

    plain, doubled = memory(batch_size=16), memory(batch_size=32)
    assert doubled["activations"] == pytest.approx(2 * plain["activations"], rel=0.1)
    assert memory(batch_size=32, accumulation=2)["activations"] == pytest.approx(plain["activations"], rel=0.1)
    assert memory(batch_size=16, activation_checkpointing=True)["activations"] < 0.7 * plain["activations"]
    assert plain["optimizer"] == pytest.approx(2 * plain["gradients"], rel=0.01)


def test_a_training_larger_than_the_memory_of_the_machine_is_told(make_config: MakeConfig) -> None:
    trial = try_out(make_config())
    assert trial.device_memory is not None
    assert trial.device_memory > 2**30
    trial.memory["activations"] = 2 * trial.device_memory
    report = CheckReport()
    _judge_trial(make_config(), trial, report)
    assert "and this machine has" in report.warnings[0]
    assert "raise training.accumulation" in report.warnings[0]


def test_sharing_out_the_weights_is_told_to_halve_what_it_halves(
    make_config: MakeConfig, capsys: pytest.CaptureFixture
) -> None:
    model = make_config().model.model_dump()
    model["text_tower"] |= {"width": 64, "layers": 12, "intermediate": 512, "heads": 2}  # most of it in layers
    trial = try_out(make_config(model=model, training={"averaging": 0.9}))
    alone = sum(trial.memory.values())
    assert list(trial.sharded) == [2, 4, 8]
    assert alone / 2 < trial.sharded[2] < alone
    # what remains whole on each, and what is shared: a half, a quarter and an eighth of it
    halves = trial.sharded[2] - trial.sharded[4], trial.sharded[4] - trial.sharded[8]
    assert halves[0] == pytest.approx(2 * halves[1], rel=0.001)
    assert 4 * halves[0] == pytest.approx(alone - trial.memory["queues"], rel=0.001)
    assert list(try_out(make_config("odd", training={"batch_size": 6})).sharded) == [2]
    check(make_config("said", model=model))
    assert "on each of 4 GPUs" in " ".join(capsys.readouterr().out.split())
    model["image_tower"] = {"name": "test_efficientnet", "image_size": 64, "pooling": "mean"}
    assert try_out(make_config("norms", model=model)).sharded == {}


def test_the_command_line_checks_and_says_so_by_its_exit_code(make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    done = CliRunner().invoke(app, ["pretrain", "--check", str(path)])
    assert done.exit_code == 0, done.output
    failed = CliRunner().invoke(app, ["pretrain", str(path), "training.batch_size=900", "--check"])
    assert failed.exit_code == 1
    assert not Path(make_config().training.output).exists()
