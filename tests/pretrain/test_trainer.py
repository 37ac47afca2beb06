import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from killed import ENVIRONMENT, first_steps, kill_at, kill_in_a_checkpoint, rows
from typer.testing import CliRunner

from cots.commands.application import app
from cots.config import PretrainConfig
from cots.errors import ConfigError, SourceError, TrainingError
from cots.model.pretrained import load_model
from pretrain.checkpoint import latest_checkpoint
from pretrain.trainer import pretrain
from pretrain.validation import criterion

MakeConfig = Callable[..., PretrainConfig]
WriteShard = Callable[..., Path]
ROOT = Path(__file__).parents[2]


def _rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def _losses(run: Path) -> dict[int, float]:
    """The loss of every step; a step that was taken twice counts as it was the last time."""
    return {row["step"]: row["loss"] for row in _rows(run) if "loss" in row}


def _write(config: PretrainConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def _train_in_processes(config: PretrainConfig, path: Path, processes: int) -> str:
    """What the training wrote to stderr."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "pretrain",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(_write(config, path))], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_a_model_learns_its_pairs_and_the_best_one_is_kept(make_config: MakeConfig) -> None:
    model = make_config().model.model_dump()
    model["image_tower"]["pooling"] = model["text_tower"]["pooling"] = "mean"
    config = make_config(
        model=model,
        objective={"contrastive": {"queue_size": 50, "in_batch": "momentum"}, "momentum": 0.9},
        optimizer={"learning_rate": 5e-3},
        training={"epochs": 20, "batch_size": 16, "validate_every": 5},
    )
    run = pretrain(config)
    rows = _rows(run)
    validations = [next(iter(row["validation"].values())) for row in rows if "validation" in row]
    # 24 pictures: chance finds 21 % of them within the first five
    assert max(v["text_to_image"]["R@5"] for v in validations) > 70
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-10:]) < sum(losses[10:20])
    assert all(
        {"temperature", "positive_similarity", "negative_similarity", "pairs_per_second"} <= set(r)
        for r in rows
        if "loss" in r
    )
    model = load_model(str(run))
    assert model.encode_texts(["a red ball on black"]).shape == (1, 32)
    assert "| text to image |" in (run / "best" / "MODEL_CARD.md").read_text()
    assert "<svg" in (run / "report.html").read_text()


@pytest.mark.parametrize("in_batch", ["none", "online"])
def test_two_processes_take_the_same_steps_as_one_with_the_joined_batch(
    make_config: MakeConfig, tmp_path: Path, in_batch: str
) -> None:
    objective = {"contrastive": {"queue_size": 50, "in_batch": in_batch}, "momentum": 0.9}
    data = {"captions_per_item": 2}
    one = make_config("one", objective=objective, data=data)
    two = make_config("two", objective=objective, data=data)
    pretrain(one)
    _train_in_processes(two, tmp_path / "two.yaml", 2)
    alone, together = _losses(Path(one.training.output)), _losses(Path(two.training.output))
    assert len(alone) == 12
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-4)


def test_processes_do_not_wait_for_what_has_no_gradient(make_config: MakeConfig, tmp_path: Path) -> None:
    """A temporal transformer of single frames, and a network with a layer behind its features."""
    model = make_config().model.model_dump()
    model["image_tower"] = {"name": "mobilenetv3_small_050", "image_size": 64, "pooling": "mean", "freeze_norms": True}
    model["temporal"] = {"kind": "transformer"}
    common = {"model": model, "data": {"validation": []}, "training": {"epochs": 0.5}}
    one, two = make_config("one", **common), make_config("two", **common)
    pretrain(one)
    _train_in_processes(two, tmp_path / "two.yaml", 2)
    alone, together = _losses(Path(one.training.output)), _losses(Path(two.training.output))
    assert len(alone) == 3
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-4)


def test_a_run_killed_at_any_moment_goes_on_bit_identically(make_config: MakeConfig) -> None:
    """Killed three times between steps at random, once in the middle of a checkpoint, each time gone on with."""
    random = Random(0)
    dropping = make_config().model.model_dump()
    dropping["text_tower"]["dropout"] = 0.1
    training = {"averaging": 0.9, "epochs": 15, "validate_every": 0, "checkpoint_every": 99, "checkpoint_steps": 7}
    training["validate_steps"] = 10
    whole, parts = (make_config(name, model=dropping, training=training) for name in ("whole", "parts"))
    runs = [Path(config.training.output) for config in (whole, parts)]
    paths = [str(_write(config, run.with_suffix(".yaml"))) for config, run in zip((whole, parts), runs)]
    command = [sys.executable, "-m", "pretrain"]
    subprocess.run([*command, paths[0]], cwd=ROOT, env=ENVIRONMENT, check=True)
    resumed = [paths[1], "training.resume=true"]
    for step in (random.randint(8, 20), random.randint(21, 35), random.randint(36, 50)):
        kill_at(step, runs[1], [*command, *resumed], delay=random.uniform(0, 0.05))
    kill_in_a_checkpoint(runs[1], resumed)
    subprocess.run([*command, *resumed], cwd=ROOT, env=ENVIRONMENT, check=True)
    begun = first_steps(runs[1])
    assert begun[0] == 0
    assert all(0 < first < 90 for first in begun[1:])
    assert begun == sorted(begun)
    assert begun[-1] == begun[-2]  # of the half checkpoint nothing was used, nor is it left
    assert not list((runs[1] / "checkpoints").glob("*.tmp"))
    losses = _losses(runs[0])
    assert len(losses) == 90
    taken = [(row["step"], row["loss"]) for row in rows(runs[1])]
    assert len(taken) > 90  # some steps were taken again, alike each time
    assert set(taken) == set(losses.items())
    one, other = ({row["step"]: row["validation"] for row in _rows(run) if "validation" in row} for run in runs)
    assert sorted(one) == list(range(10, 91, 10))
    assert other == one
    kept = [(run / "best" / name).read_bytes() for run in runs for name in ("config.json", "MODEL_CARD.md")]
    assert kept[:2] == kept[2:]
    one, other = (torch.load(run / "checkpoints" / "step-00000090.pt") for run in runs)
    for part in ("network", "momentum", "average", "objective"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])


def test_validation_within_an_epoch_chooses_the_best_model(make_config: MakeConfig) -> None:
    """Between two rows that are due, whose steps none of them loses."""
    training = {"epochs": 2, "validate_every": 0, "validate_steps": 4, "log_every": 5, "checkpoint_every": 9}
    run = pretrain(make_config(training=training))
    rows = _rows(run)
    validated = {row["step"]: row["validation"] for row in rows if "validation" in row}
    assert list(validated) == [4, 8, 12]
    assert [row["step"] for row in rows if "loss" in row] == [4, 5, 6, 8, 10, 12]
    sums = {step: criterion(results) for step, results in validated.items()}
    state = torch.load(run / "checkpoints" / "step-00000012.pt", weights_only=True)
    assert state["best"]["step"] == max(sums, key=lambda step: sums[step])


def test_a_tower_with_a_rate_of_its_own_has_it_in_the_log(make_config: MakeConfig) -> None:
    run = pretrain(make_config(optimizer={"learning_rate": 1e-3, "image_tower_rate": 1e-4}, training={"epochs": 1}))
    rows = [row for row in _rows(run) if "loss" in row]
    assert len(rows) == 6
    for row in rows:
        assert row["learning_rate_image_tower"] == pytest.approx(row["learning_rate"] / 10, rel=1e-4)
        assert "learning_rate_text_tower" not in row
    assert "Learning rate <small>image tower</small>" in (run / "report.html").read_text()


def test_a_run_is_not_overwritten(make_config: MakeConfig) -> None:
    config = make_config()
    pretrain(config)
    with pytest.raises(ConfigError, match="holds a run already"):
        pretrain(config)
    changed = config.model_copy(
        update={
            "training": config.training.model_copy(update={"resume": True}),
            "optimizer": config.optimizer.model_copy(update={"learning_rate": 1e-2}),
        }
    )
    with pytest.raises(ConfigError, match=r"trained with optimizer\.learning_rate=0\.001, not 0\.01"):
        pretrain(changed)
    other_batches = config.training.model_copy(update={"resume": True, "batch_size": 4})
    with pytest.raises(ConfigError, match=r"trained with training\.batch_size=8, not 4"):
        pretrain(config.model_copy(update={"training": other_batches}))
    written = yaml.safe_load((Path(config.training.output) / "config.yaml").read_text())
    assert written == config.model_dump(mode="json")  # what was refused is not noted as what was trained


def test_a_run_of_another_architecture_is_refused_by_the_setting_that_differs(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(training={"epochs": 0.2})
    pretrain(config)
    path = str(_write(config, tmp_path / "run.yaml"))
    for override, sentence in (
        ("model.image_tower.architecture.depth=3", "model.image_tower.architecture.depth=2, not 3"),
        ("model.image_tower.name=resnet18", "model.image_tower.name=vit_tiny_patch16_224, not resnet18"),
        ("model.text_tower.layers=5", "model.text_tower.layers=2, not 5"),
    ):
        done = CliRunner().invoke(app, ["pretrain", path, "training.resume=true", override])
        assert isinstance(done.exception, ConfigError)
        said = str(done.exception)
        assert said.endswith(f"was trained with {sentence}; give the same value or start a new training.output.")


def test_a_run_goes_on_from_a_checkpoint_that_knows_fewer_settings(make_config: MakeConfig) -> None:
    run = pretrain(make_config(training={"epochs": 1}))
    path = latest_checkpoint(run)
    assert path is not None
    state = torch.load(path, weights_only=True)
    del state["config"]["objective"]["masked_modeling"]["stored_tokens"]
    torch.save(state, path)
    pretrain(make_config(training={"epochs": 1, "resume": True}))
    state["config"]["objective"]["temperature"] = 0.2
    torch.save(state, path)
    with pytest.raises(ConfigError, match=r"was trained with objective\.temperature=0\.2"):
        pretrain(make_config(training={"epochs": 1, "resume": True}))


def test_a_run_whose_sources_have_grown_does_not_go_on(
    make_config: MakeConfig, shape_shard: WriteShard, tmp_path: Path
) -> None:
    shape_shard(tmp_path / "a.tar")
    data = {"train": [{"path": str(tmp_path / "*.tar")}]}
    pretrain(make_config(data=data, training={"epochs": 1}))
    shape_shard(tmp_path / "b.tar")
    with pytest.raises(ConfigError, match=r"trained on sources of 24 items, which have 48 now; bring them back"):
        pretrain(make_config(data=data, training={"epochs": 1, "resume": True}))


def test_recalls_on_other_validation_pairs_are_not_compared(
    make_config: MakeConfig, shape_shard: WriteShard, tmp_path: Path
) -> None:
    run = pretrain(make_config(training={"checkpoint_steps": 9, "keep_checkpoints": 9}))
    state = torch.load(run / "checkpoints" / "step-00000009.pt", weights_only=True)
    state["best"] |= {"criterion": 600.0}
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    torch.save(state, run / "checkpoints" / "step-00000009.pt")
    easier = {"validation": [{"path": str(shape_shard(tmp_path / "held_out.tar"))}]}
    pretrain(make_config(data=easier, training={"checkpoint_steps": 9, "keep_checkpoints": 9, "resume": True}))
    assert "held_out.tar" in (run / "best" / "MODEL_CARD.md").read_text()


def test_a_run_without_a_checkpoint_is_resumed_from_nothing(
    make_config: MakeConfig, capsys: pytest.CaptureFixture
) -> None:
    run = pretrain(make_config(training={"resume": True, "epochs": 1}))
    assert "holds no checkpoint to resume from; this run begins with step 1" in capsys.readouterr().err
    assert _rows(run)[0]["step"] == 1


def test_bad_samples_are_named_and_too_many_end_the_run(
    make_config: MakeConfig, shape_shard: WriteShard, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def broken(count: int) -> dict[str, bytes]:
        pictures = {f"broken{i}.png": b"no picture" for i in range(count)}
        return pictures | {f"broken{i}.json": b'{"captions": ["a red ball"]}' for i in range(count)}

    def source(name: str, count: int) -> dict:
        return {"train": [{"path": str(shape_shard(tmp_path / f"{name}.tar", broken(count)))}], "validation": []}

    pretrain(make_config("lenient", data=source("few", 1)))
    assert "few.tar::broken0" in capsys.readouterr().err
    config = make_config("strict", data=source("many", 30))
    with pytest.raises(TrainingError, match=r"could not be read, more than data\.max_bad_share"):
        pretrain(config.model_copy(update={"training": config.training.model_copy(update={"epochs": 9})}))


@pytest.mark.parametrize("cache_side", [None, 64])
def test_ranks_name_what_they_could_not_read_once(
    make_config: MakeConfig,
    shape_shard: WriteShard,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    cache_side: int | None,
) -> None:
    pictures = {f"broken{i}.png": b"no picture" for i in range(8)}
    captions = {f"broken{i}.json": b'{"captions": ["a red ball"]}' for i in range(8)}
    shard = shape_shard(tmp_path / "pairs.tar", pictures | captions)
    data = {"train": [{"path": str(shard)}], "validation": [], "cache_side": cache_side}
    pretrain(make_config("one", data=data, training={"epochs": 1}))
    named = sorted(line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped"))
    assert {line.rpartition("::")[2][:7] for line in named} == {f"broken{i}" for i in range(8)}
    said = _train_in_processes(make_config("two", data=data, training={"epochs": 1}), tmp_path / "two.yaml", 2)
    assert sorted(line for line in said.splitlines() if line.startswith("skipped")) == named


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "best/config.json.tmp", "report.html"])
def test_a_disk_that_is_full_ends_the_run_with_a_sentence(make_config: MakeConfig, name: str) -> None:
    config = make_config(training={"epochs": 1})
    file = Path(config.training.output) / name
    file.parent.mkdir(parents=True)
    file.symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"cannot be written \(.*No space left on device.*\); make room or choose"):
        pretrain(config)


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("gpu", "training.device 'gpu' is no device that torch knows; set cpu or cuda"),
        ("meta", "training.device 'meta' is none that computes; set cpu or cuda"),
    ],
)
def test_a_device_that_does_not_compute_is_refused(make_config: MakeConfig, device: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        pretrain(make_config(training={"device": device}))


def test_a_place_that_no_run_can_be_written_to_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"file/run cannot be written \(Not a directory\); make room or choose"):
        pretrain(make_config(training={"output": str(tmp_path / "file" / "run")}))


def test_bad_samples_that_are_read_anew_on_resuming_are_not_counted_twice(
    make_config: MakeConfig, shape_shard: WriteShard, tmp_path: Path
) -> None:
    pictures = {f"broken{i}.png": b"no picture" for i in range(8)}
    captions = {f"broken{i}.json": b'{"captions": ["a red ball"]}' for i in range(8)}
    shard = shape_shard(tmp_path / "pairs.tar", pictures | captions)
    data = {"train": [{"path": str(shard)}], "validation": [], "cache_side": 64}  # 8 of 10 that may be bad
    run = pretrain(make_config(data=data, training={"checkpoint_steps": 1, "keep_checkpoints": 9}))
    max((run / "checkpoints").iterdir()).unlink()
    losses = _losses(run)
    pretrain(make_config(data=data, training={"checkpoint_steps": 1, "keep_checkpoints": 9, "resume": True}))
    assert _losses(run) == losses


def test_without_validation_pairs_the_last_model_is_kept(
    make_config: MakeConfig, capsys: pytest.CaptureFixture
) -> None:
    run = pretrain(make_config(data={"validation": []}, training={"epochs": 1}))
    assert "the last model, for data.validation names no source, is in" in capsys.readouterr().err
    assert load_model(str(run)).encode_texts(["a red ball"]).shape == (1, 32)
    assert "Not validated" in (run / "best" / "MODEL_CARD.md").read_text()


def test_more_workers_than_cores_or_shards_are_no_trouble(
    make_config: MakeConfig, shards: Path, recwarn: pytest.WarningsRecorder
) -> None:
    workers = (os.cpu_count() or 1) + 1
    data = {"train": [{"path": str(shards / "train-0.tar")}], "workers": workers}  # one shard
    few = pretrain(make_config("few", data={**data, "workers": 0}, training={"epochs": 1}))
    many = pretrain(make_config("many", data=data, training={"epochs": 1}))
    assert _losses(many) == _losses(few)
    assert not [warning for warning in recwarn if "DataLoader" in str(warning.message)]


def test_sources_that_cannot_be_trained_on(make_config: MakeConfig, shape_shard: WriteShard, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train names no source; give one"):
        pretrain(make_config("none", data={"train": []}))
    with pytest.raises(SourceError, match="fewer than a batch of 64"):
        pretrain(make_config(training={"batch_size": 64}))
    with pytest.raises(SourceError, match=r"nothing matches|no file or folder"):
        pretrain(make_config("missing", data={"train": [{"path": str(tmp_path / "nonesuch.tar")}]}))
    with pytest.raises(ConfigError, match="named like a test split"):
        pretrain(make_config("split", data={"validation": [{"path": str(shape_shard(tmp_path / "test-0.tar"))}]}))


def test_the_curves_are_drawn_of_a_run_that_an_error_ended(make_config: MakeConfig) -> None:
    optimizer = {"learning_rate": 1e30, "warmup": 0.0, "clip_norm": 0}
    config = make_config(optimizer=optimizer, training={"epochs": 20, "log_every": 1, "precision": "fp32"})
    with pytest.raises(TrainingError, match=r"no longer a number at step [2-9]"):
        pretrain(config)
    assert "<svg" in (Path(config.training.output) / "report.html").read_text()
