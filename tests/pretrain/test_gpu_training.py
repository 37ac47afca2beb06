"""Training on a GPU against the same training on the CPU. Skipped where there is none; no timings."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cots.config import AugmentationConfig, PretrainConfig, SourceConfig
from cots.data.device_augmentation import DRAWS, DeviceAugmentation
from cots.data.transforms import TrainingTransform
from cots.model.caption_tokenizer import WordPieceTokenizer
from cots.model.pretrained import load_model
from cots.tokenizer_config import VisualTokenizerTrainingConfig
from pretrain.loader import TrainingPairs
from pretrain.pair_sources import open_source
from pretrain.trainer import pretrain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")

MakeConfig = Callable[..., PretrainConfig]
ROOT = Path(__file__).parents[2]


def _rows(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def _command(config: PretrainConfig | VisualTokenizerTrainingConfig, processes: int = 1) -> list[str]:
    path = Path(config.training.output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*launcher, "pretrain", str(path)]


def _train(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_fp32_steps_are_those_of_the_cpu_and_bf16_steps_near_them(make_config: MakeConfig, every_level: dict) -> None:
    every_level["masked_modeling"] = {}  # what is hidden is drawn on the device
    common = {"objective": every_level, "data": {"captions_per_item": 2}}
    losses = {}
    for name, training in {
        "cpu": {"device": "cpu"},
        "fp32": {"device": "cuda", "precision": "fp32"},
        "bf16": {"device": "cuda"},
    }.items():
        run = pretrain(make_config(name, **common, training=training))
        losses[name] = [row["loss"] for row in _rows(run)]
    assert losses["fp32"] == pytest.approx(losses["cpu"], rel=2e-3)
    assert losses["bf16"] == pytest.approx(losses["cpu"], rel=0.05)


def test_a_compiled_run_compiles_nothing_after_its_first_steps(make_config: MakeConfig, every_level: dict) -> None:
    training = {"device": "cuda", "compile": True, "averaging": 0.9}
    config = make_config(objective=every_level, data={"captions_per_item": 2}, training=training)
    program = (
        "import sys, torch\n"
        "from cots.config import read_config\n"
        "from pretrain.step import TrainingStep\n"
        "from pretrain.trainer import pretrain\n"
        "take = TrainingStep.take\n"
        "def watched(stepper, batch, step, steps):\n"
        "    torch._dynamo.config.error_on_recompile = step >= 2\n"
        "    return take(stepper, batch, step, steps)\n"
        "TrainingStep.take = watched\n"
        "pretrain(read_config(sys.argv[1]))\n"
    )
    _train([sys.executable, "-c", program, _command(config)[-1]])
    rows = _rows(Path(config.training.output))
    assert len(rows) == 12
    assert 0 < rows[-1]["mfu"] < 1


@pytest.mark.parametrize("changes", [{"activation_checkpointing": True}, {"accumulation": 4}])
def test_saving_memory_changes_no_loss(make_config: MakeConfig, every_level: dict, changes: dict) -> None:
    training = {"device": "cuda", "precision": "fp32"}
    plain = pretrain(make_config("plain", objective=every_level, training=training))
    thrifty = pretrain(make_config("thrifty", objective=every_level, training={**training, **changes}))
    first, second = ([row["loss"] for row in _rows(run)] for run in (plain, thrifty))
    assert second == pytest.approx(first, rel=1e-3)


def test_pixels_kept_on_the_gpu_train(make_config: MakeConfig) -> None:
    run = pretrain(
        make_config(
            objective={"contrastive": {"queue_size": 0, "in_batch": "online"}},
            data={"cache_side": 72, "captions_per_item": 2},
            optimizer={"learning_rate": 5e-3},
            training={"device": "cuda", "epochs": 12, "batch_size": 16},
        )
    )
    losses = [row["loss"] for row in _rows(run)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_reading_an_item_leaves_the_generator_of_dropout_alone(shards: Path, vocabulary_file: Path) -> None:
    source = open_source(SourceConfig(path=str(shards / "train-0.tar")))
    tokenizer = WordPieceTokenizer.from_file(vocabulary_file, 16)
    pairs = TrainingPairs([source], tokenizer, TrainingTransform(32, AugmentationConfig()), 1, 1, seed=0)
    before = torch.cuda.get_rng_state()
    first = pairs[0, 0][0]
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert not torch.equal(pairs[1, 0][0], first)


def test_the_host_waits_for_no_crop() -> None:
    config = AugmentationConfig(grayscale=0.5, rand_augment=2, erase=0.5)
    augment = DeviceAugmentation(32, config)
    squares = torch.randint(256, (8, 3, 48, 48), dtype=torch.uint8, device="cuda")
    draws, may_flip = torch.rand(8, DRAWS, device="cuda"), torch.ones(8, dtype=torch.bool, device="cuda")
    augment(squares, draws, may_flip)  # whatever has to be loaded first
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert augment(squares, draws, may_flip).shape == (8, 3, 32, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("changes", [{}, {"deterministic": True}, {"deterministic": True, "compile": True}])
def test_a_resumed_run_takes_the_steps_of_one_that_was_never_stopped(
    make_config: MakeConfig, every_level: dict, changes: dict
) -> None:
    """To the last bit where that is asked for, the weights at the end too."""
    common = {
        "objective": every_level,
        "data": {"captions_per_item": 2, "augmentation": {"color": 0.4, "crop_scale": [0.5, 1.0]}},
        "training": {"device": "cuda", "averaging": 0.9, "checkpoint_steps": 5, **changes},
    }
    whole, parts = (make_config(name, **common) for name in ("whole", "parts"))
    for config in (whole, parts):
        _train(_command(config))
    for later in sorted((Path(parts.training.output) / "checkpoints").glob("*.pt"))[1:]:
        later.unlink()  # as if it had been killed after the first of them
    _train([*_command(parts), "training.resume=true"])
    runs = [Path(config.training.output) for config in (whole, parts)]
    first, second = ({row["step"]: row["loss"] for row in _rows(run)} for run in runs)
    assert second == pytest.approx(first, rel=1e-3)
    if changes:
        assert second == first
        weights = [torch.load(max((run / "checkpoints").glob("*.pt"))) for run in runs]
        torch.testing.assert_close(*(state["network"] for state in weights), rtol=0, atol=0)


@two_gpus
@pytest.mark.parametrize(
    "changes", [{}, {"compile": True}, {"sharding": "sharded"}, {"sharding": "sharded", "compile": True}]
)
def test_two_gpus_take_the_steps_of_one(make_config: MakeConfig, every_level: dict, changes: dict) -> None:
    data = {"captions_per_item": 2, "augmentation": {"color": 0.4, "crop_scale": [0.5, 1.0]}}
    common = {"objective": every_level, "data": data}
    training = {"device": "auto", "precision": "fp32", "averaging": 0.9}
    one = make_config("one", **common, training=training)
    two = make_config("two", **common, training={**training, **changes})
    _train(_command(one), CUDA_VISIBLE_DEVICES="0")
    _train(_command(two, processes=2))
    first, second = (_rows(Path(config.training.output)) for config in (one, two))
    for name in ("loss", "loss_alignment", "filter_kept", "temperature"):
        assert [row[name] for row in second] == pytest.approx([row[name] for row in first], rel=2e-3, abs=1e-3)
    texts = ["a red ball on black", "a yellow boat"]
    one_model, two_model = (load_model(config.training.output, device="cpu") for config in (one, two))
    torch.testing.assert_close(two_model.encode_texts(texts), one_model.encode_texts(texts), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_visual_tokenizer_learns_the_same_from_loader_processes(
    shards: Path, tmp_path: Path, deterministic: bool
) -> None:
    losses = []
    for workers in (0, 2):
        config = VisualTokenizerTrainingConfig.model_validate(
            {
                "visual_tokenizer": {"codebook_size": 32, "code_dim": 8, "width": 16, "min_width": 8, "image_size": 32},
                "data": {"train": [{"path": str(shards / "train-*.tar")}], "workers": workers},
                "training": {
                    "output": str(tmp_path / f"{workers}-workers"),
                    "epochs": 1,
                    "batch_size": 12,
                    "device": "cuda",
                    "precision": "fp32",
                    "log_every": 1,
                    "deterministic": deterministic,
                },
            }
        )
        _train(_command(config))
        losses.append([row["loss"] for row in _rows(Path(config.training.output))])
    assert losses[1] == (losses[0] if deterministic else pytest.approx(losses[0], rel=1e-3))


def test_the_embedded_model_gives_the_cpus_embeddings() -> None:
    pixels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = ["a dog on the beach", "two red cars", "snow"]
    on_cpu, on_gpu = load_model("embedded", device="cpu"), load_model("embedded", device="cuda")
    pixels = torch.nn.functional.interpolate(pixels.float(), size=on_cpu.image_size, mode="bilinear").byte()
    for ours, theirs in (
        (on_gpu.encode_images(pixels), on_cpu.encode_images(pixels)),
        (on_gpu.encode_texts(texts), on_cpu.encode_texts(texts)),
    ):
        assert (ours * theirs).sum(dim=1).min() > 0.999
