import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import yaml
from killed import first_steps, kill_at
from PIL import Image

from cots.config import PretrainConfig
from cots.errors import ConfigError, SourceError, TrainingError
from cots.model.visual_tokenizer import load_visual_tokenizer
from cots.tokenizer_config import VisualTokenizerTrainingConfig
from pretrain.checkpoint import latest_checkpoint
from pretrain.distributed import process_group
from pretrain.launch import launch
from pretrain.loader import StepSampler
from pretrain.pair_sources import open_source
from pretrain.tokenizer_pictures import SquareFrames, decode_all, squares_from_loader, squares_in_memory
from pretrain.tokenizer_training import TokenizerRun, train_visual_tokenizer
from pretrain.tokenizer_validation import figures, reconstruction_sheet
from pretrain.trainer import pretrain

ROOT = Path(__file__).parents[2]
MakeConfig = Callable[..., VisualTokenizerTrainingConfig]
WriteShard = Callable[..., Path]


@pytest.fixture
def make_tokenizer_config(shards: Path, tmp_path: Path) -> MakeConfig:
    """A tiny training into tmp_path/NAME; keyword arguments replace parts of the sections."""

    def make(name: str = "run", **sections: dict) -> VisualTokenizerTrainingConfig:
        values: dict = {
            "visual_tokenizer": {
                "codebook_size": 32,
                "code_dim": 8,
                "width": 24,
                "min_width": 12,
                "blocks": 1,
                "image_size": 32,
            },
            "objective": {"revival_every": 5, "kl_weight": 0.002},
            "data": {
                "train": [{"path": str(shards / "train-*.tar")}],
                "validation": [{"path": str(shards / "val-0.tar")}],
                "augmentation": {"color": 0.1, "crop_scale": [0.6, 1.0]},
                "cache_side": 40,
                "workers": 0,
            },
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0},
            "training": {
                "output": str(tmp_path / name),
                "epochs": 2,
                "batch_size": 12,
                "device": "cpu",
                "log_every": 1,
            },
        }
        for section, changes in sections.items():
            values[section] = {**values[section], **changes}
        return VisualTokenizerTrainingConfig.model_validate(values)

    return make


def _rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def _losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in _rows(run) if "loss" in row}


def _write(config: VisualTokenizerTrainingConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def test_a_tokenizer_learns_its_pictures(make_tokenizer_config: MakeConfig, shards: Path) -> None:
    config = make_tokenizer_config(training={"epochs": 40, "validate_every": 10, "weights_dtype": "float16", "seed": 1})
    run = train_visual_tokenizer(config)
    rows = _rows(run)
    first = next(row for row in rows if "loss" in row)
    logged = {"loss", "reconstruction_error", "kl", "kl_batch", "temperature", "kl_weight", "gradient_norm"}
    assert logged <= first.keys()
    validations = [
        row["validation"][str(shards / "val-0.tar")]["reconstruction"] for row in rows if "validation" in row
    ]
    assert len(validations) == 4
    pictures = decode_all([open_source(config.data.validation[0])], 32, 0).frames.float() / 255
    one_color = (pictures - pictures.mean(dim=(2, 3), keepdim=True)).square().mean().item()
    best = min(v["reconstruction_error"] for v in validations)
    assert best < 0.5 * one_color  # every picture painted in its own mean colour
    last = validations[-1]
    assert last["codebook_usage"] > 0.5
    assert 6 < last["codebook_perplexity"] <= 32 * last["codebook_usage"]
    # the one kept is the best, and paints as well as was measured
    kept = load_visual_tokenizer(str(run))
    shown = (pictures * 255).round().to(torch.uint8)
    error = (kept.reconstruct(kept.tokens(shown, 4)) - pictures).square().mean().item()
    assert error == pytest.approx(best, rel=0.02)
    assert f"{best:.5f}" in (run / "best" / "MODEL_CARD.md").read_text()
    sheets = sorted((run / "reconstructions").glob("*.png"))
    assert [sheet.name for sheet in sheets] == [f"step-{step:08d}.png" for step in (40, 80, 120, 160)]
    with Image.open(sheets[0]) as sheet:
        assert sheet.size == (12 * 36 - 4, 4 * 36 - 4)


def test_a_resumed_run_is_bit_identical_to_one_that_was_never_stopped(make_tokenizer_config: MakeConfig) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # another number of threads adds in another order
    command = [sys.executable, "-m", "pretrain"]
    changes = {"training": {"epochs": 8, "checkpoint_steps": 3, "averaging": 0.9}}
    whole, parts = make_tokenizer_config("whole", **changes), make_tokenizer_config("parts", **changes)
    runs = [Path(config.training.output) for config in (whole, parts)]
    paths = [_write(config, run.with_suffix(".yaml")) for config, run in zip((whole, parts), runs)]
    subprocess.run([*command, str(paths[0])], cwd=ROOT, env=environment, check=True)
    # the checkpoint of step 3 is there when the row of step 4 is
    random = Random(0)
    kill_at(random.randint(4, 16), runs[1], [*command, str(paths[1])], delay=random.uniform(0, 0.05))
    subprocess.run([*command, str(paths[1]), "training.resume=true"], cwd=ROOT, env=environment, check=True)
    begun = first_steps(runs[1])
    assert begun[0] == 0 < begun[1] < 32
    assert len(_losses(runs[0])) == 32
    assert _losses(runs[1]) == _losses(runs[0])
    one, other = (load_visual_tokenizer(str(run)).fingerprint() for run in runs)
    assert one == other


def test_sigterm_saves_and_ends_well_and_ctrl_c_in_one_line(make_tokenizer_config: MakeConfig, tmp_path: Path) -> None:
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        config = make_tokenizer_config(number.name, training={"epochs": 5000})
        process = subprocess.Popen(
            [sys.executable, "-m", "pretrain", str(_write(config, tmp_path / f"{number.name}.yaml"))],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        run = Path(config.training.output)
        while not (run / "log.jsonl").exists() or not (run / "log.jsonl").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in said
        if number == signal.SIGTERM:
            assert "resume with training.resume=true" in said
            assert list((run / "checkpoints").glob("step-*.pt"))
        else:
            assert said.endswith("Interrupted.\n")


def test_two_processes_take_the_steps_of_one(make_tokenizer_config: MakeConfig, tmp_path: Path) -> None:
    config = make_tokenizer_config("two", training={"epochs": 1})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pretrain"]
    done = subprocess.run(
        [*command, str(_write(config, tmp_path / "two.yaml"))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = _losses(Path(config.training.output))
    alone = _losses(train_visual_tokenizer(make_tokenizer_config("one", training={"epochs": 1})))
    # the draws of codes differ between ranks; pictures, weights and order are the same
    assert together.keys() == alone.keys()
    assert list(together.values()) == pytest.approx(list(alone.values()), rel=0.3)
    checkpoint = latest_checkpoint(Path(config.training.output))
    assert checkpoint is not None
    state = torch.load(checkpoint)  # that of both, so that any number of processes can go on from it
    assert state["samples"] == [48, 0]
    assert state["objective"]["counts"].sum() == 48 * (32 // 8) ** 2


def test_pictures_are_the_same_from_memory_and_from_loader_processes(shards: Path) -> None:
    sources = [open_source(source) for source in _sources(shards)]
    frames = SquareFrames(sources, 40)
    sampler = StepSampler([len(source) for source in sources], [1.0, 1.0], 10, 0, 0, 1).between(3, 7)
    cpu = torch.device("cpu")
    in_memory = list(squares_in_memory(decode_all(sources, 40, 0), sampler, 0, cpu))
    loaded = list(squares_from_loader(frames, sampler, 0, 0, cpu))
    assert len(in_memory) == len(loaded) == 4
    for one, other in zip(in_memory, loaded):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.draws, other.draws)


def _sources(shards: Path) -> list:
    from cots.config import SourceConfig

    return [SourceConfig(path=str(shards / f"train-{number}.tar")) for number in (0, 1)]


@pytest.mark.parametrize("cache_side", [40, None])
def test_bad_pictures_are_named_and_too_many_end_the_run(
    make_tokenizer_config: MakeConfig,
    shape_shard: WriteShard,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    cache_side: int | None,
) -> None:
    def source(name: str, count: int) -> dict:
        broken = {f"broken{i}.png": b"no picture" for i in range(count)}
        broken |= {f"broken{i}.json": b'{"captions": ["a red ball"]}' for i in range(count)}
        path = str(shape_shard(tmp_path / f"{name}.tar", broken))
        return {"train": [{"path": path}], "validation": [], "cache_side": cache_side}

    train_visual_tokenizer(make_tokenizer_config("lenient", data=source("few", 1)))
    assert "few.tar::broken0" in capsys.readouterr().err
    with pytest.raises(TrainingError, match=r"could not be read, more than data\.max_bad_share"):
        train_visual_tokenizer(make_tokenizer_config("strict", data=source("many", 30), training={"epochs": 9}))


def test_runs_that_cannot_be(make_tokenizer_config: MakeConfig, shape_shard: WriteShard, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="fewer than a batch of 64"):
        train_visual_tokenizer(make_tokenizer_config(training={"batch_size": 64}))
    with pytest.raises(ConfigError, match=r"data\.cache_side 24 is less than the 32 px of the crops"):
        train_visual_tokenizer(make_tokenizer_config(data={"cache_side": 24}))
    with pytest.raises(ConfigError, match=r"data\.image_size 36 is not a multiple of the stride 8"):
        train_visual_tokenizer(make_tokenizer_config(data={"image_size": 36}))
    test_split = {"validation": [{"path": str(shape_shard(tmp_path / "test-0.tar"))}]}
    with pytest.raises(ConfigError, match="named like a test split"):
        train_visual_tokenizer(make_tokenizer_config(data=test_split))
    broken = {"validation": [{"path": str(shape_shard(tmp_path / "val.tar", {"b.png": b"", "b.json": b"{}"}))}]}
    with pytest.raises(TrainingError, match="a validation source must be whole"):
        train_visual_tokenizer(make_tokenizer_config(data=broken))
    with pytest.raises(ConfigError, match="names no source"):
        train_visual_tokenizer(make_tokenizer_config(data={"train": []}))
    config = make_tokenizer_config(training={"epochs": 1})
    train_visual_tokenizer(config)
    with pytest.raises(ConfigError, match="holds a run already"):
        train_visual_tokenizer(config)
    other = make_tokenizer_config(training={"epochs": 1, "resume": True}, objective={"kl_weight": 0.5})
    with pytest.raises(ConfigError, match=r"trained with objective\.kl_weight=0\.002, not 0\.5"):
        train_visual_tokenizer(other)


def test_another_kind_of_training_is_not_gone_on_with(
    make_tokenizer_config: MakeConfig, make_config: Callable[..., PretrainConfig]
) -> None:
    config = make_tokenizer_config(training={"epochs": 1})
    train_visual_tokenizer(config)
    same = {"output": config.training.output, "resume": True}
    with pytest.raises(ConfigError, match="is of another kind of training"):
        pretrain(make_config(training=same))
    shutil.rmtree(config.training.output)
    pretrain(make_config(training={"output": config.training.output, "epochs": 1}))
    with pytest.raises(ConfigError, match="is of another kind of training"):
        train_visual_tokenizer(make_tokenizer_config(training={"epochs": 1, "resume": True}))


def test_a_setting_that_is_newer_than_the_checkpoint_has_its_default(make_tokenizer_config: MakeConfig) -> None:
    config = make_tokenizer_config(training={"epochs": 1})
    train_visual_tokenizer(config)
    checkpoint = latest_checkpoint(Path(config.training.output))
    assert checkpoint is not None
    state = torch.load(checkpoint)
    del state["config"]["objective"]["revival_end"]
    torch.save(state, checkpoint)
    train_visual_tokenizer(make_tokenizer_config(training={"epochs": 1, "resume": True}))


def test_a_loss_that_is_no_number_ends_the_run_and_its_items_are_named(make_tokenizer_config: MakeConfig) -> None:
    config = make_tokenizer_config(
        optimizer={"learning_rate": 1e20, "clip_norm": 0, "warmup": 0}, training={"log_every": 2}
    )
    with pytest.raises(TrainingError, match="no longer a number at step 2; the items of the last steps are named in"):
        train_visual_tokenizer(config)
    named = Path(config.training.output) / "last-items-rank0.jsonl"
    steps = [json.loads(line) for line in named.read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(len(row["items"]) == 12 and "train-" in row["items"][0] for row in steps)


def test_a_check_says_what_it_found_and_leaves_nothing(
    make_tokenizer_config: MakeConfig, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = _write(make_tokenizer_config(), tmp_path / "t.yaml")
    launch(path, [], check=True)
    said = capsys.readouterr().out
    assert "48 items" in said
    assert "one step of 12 pictures done on cpu" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(TrainingError, match="1 thing would stop this run"):
        launch(path, [f"data.train=[{{path: {tmp_path / 'nonesuch.tar'}}}]"], check=True)


def test_figures_and_sheet_by_hand() -> None:
    m = figures(0.01, torch.tensor([4.0, 4.0, 0.0, 0.0]))
    assert m == pytest.approx(
        {"reconstruction_error": 0.01, "psnr": 20.0, "codebook_usage": 0.5, "codebook_perplexity": 2.0}
    )
    inputs = torch.zeros(13, 3, 8, 8, dtype=torch.uint8)
    sheet = np.asarray(reconstruction_sheet(inputs, inputs + 100))
    assert sheet.shape == (4 * 12 - 4, 12 * 12 - 4, 3)
    assert (sheet[:8, :8] == 0).all()
    assert (sheet[12:20, :8] == 100).all()
    assert (sheet[24:32, :8] == 0).all()
    assert (sheet[24:, 12:] == 255).all()  # the second row holds one picture


def test_clips_are_left_out_where_no_decoder_is_installed(
    make_tokenizer_config: MakeConfig, shape_shard: WriteShard, tmp_path: Path
) -> None:
    clip = io.BytesIO()
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    frames[0].save(clip, "GIF", save_all=True, append_images=frames[1:])
    # a GIF needs no decoder, an mp4 does; its first bytes tell what it is
    mp4 = b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2" + bytes(100)
    further = {
        "a.gif": clip.getvalue(),
        "a.json": b'{"captions": ["x"]}',
        "b.mp4": mp4,
        "b.json": b'{"captions": ["x"]}',
    }
    source = {"train": [{"path": str(shape_shard(tmp_path / "clips.tar", further))}]}
    config = make_tokenizer_config(data=source, training={"epochs": 1})
    program = (
        "import sys; sys.modules['av'] = sys.modules['decord'] = None\n"
        "from pretrain.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, str(_write(config, tmp_path / "clips.yaml"))]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 clip is left out: av (PyAV) is not installed" in done.stderr


def test_the_sharpness_comes_back_from_its_bound(make_tokenizer_config: MakeConfig) -> None:
    """Beyond a clamp it would have no gradient."""
    with process_group("cpu") as ranks:
        run = TokenizerRun(make_tokenizer_config(), ranks)
    sharpness = run.tokenizer.log_sharpness
    sharpness.data.fill_(math.log(150.0))
    run.take_step(next(run._samples()))
    assert sharpness.exp().item() == pytest.approx(100.0)

    def pull_down(*_: object) -> None:
        assert sharpness.grad is not None
        assert sharpness.grad != 0
        sharpness.grad.fill_(1.0)

    run.optimizer.register_step_pre_hook(pull_down)
    run.step = 1
    run.take_step(next(run._samples()))
    run.telemetry.close()
    assert sharpness.exp().item() < 99.9
