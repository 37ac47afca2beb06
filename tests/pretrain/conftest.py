"""Pairs that a model of a few thousand parameters can learn: coloured shapes and what they are."""

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from cots.config import ModelConfig, PretrainConfig
from cots.model.visual_tokenizer import VisualTokenizer, save_visual_tokenizer
from cots.tokenizer_config import VisualTokenizerConfig

COLORS = {"red": (220, 30, 30), "green": (30, 180, 50), "blue": (40, 60, 220), "yellow": (235, 220, 40)}
SHAPES = ("square", "ball", "boat")
GROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other's threads, minutes long when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _picture(color: str, shape: str, ground: str, random: np.random.Generator) -> bytes:
    image = Image.new("RGB", (72, 72), GROUNDS[ground])
    draw = ImageDraw.Draw(image)
    x, y = random.integers(8, 20, 2)
    box = (x, y, x + 40, y + 40)
    if shape == "square":
        draw.rectangle(box, fill=COLORS[color])
    elif shape == "ball":
        draw.ellipse(box, fill=COLORS[color])
    else:
        draw.polygon([(x, y + 20), (x + 40, y + 20), (x + 20, y + 40)], fill=COLORS[color])
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _shape_members(seed: int) -> list[tuple[str, bytes]]:
    """24 pairs, two captions each."""
    random = np.random.default_rng(seed)
    members = []
    for color, shape, ground in itertools.product(COLORS, SHAPES, GROUNDS):
        captions = [f"a {color} {shape} on {ground}", f"{color} {shape} and {ground}"]
        members.append((f"{color}_{shape}_{ground}.png", _picture(color, shape, ground, random)))
        members.append((f"{color}_{shape}_{ground}.json", json.dumps({"captions": captions}).encode()))
    return members


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train-0.tar, train-1.tar and val-0.tar of 24 pairs each."""
    directory = tmp_path_factory.mktemp("shards")
    for seed, name in enumerate(("train-0", "train-1", "val-0")):
        _write_shard(directory / f"{name}.tar", _shape_members(seed))
    return directory


@pytest.fixture(scope="session")
def shape_shard() -> Callable[..., Path]:
    """Writes the 24 pairs and further members (name -> content) to a path, and returns it."""

    def write(path: Path, further: dict[str, bytes] | None = None) -> Path:
        return _write_shard(path, [*_shape_members(0), *(further or {}).items()])

    return write


@pytest.fixture
def make_config(
    tiny_model_config: ModelConfig, vocabulary_file: Path, shards: Path, tmp_path: Path
) -> Callable[..., PretrainConfig]:
    """A tiny training into tmp_path/NAME; keyword arguments replace whole sections or, as mappings, parts of them."""

    def make(name: str = "run", **sections: dict) -> PretrainConfig:
        model = tiny_model_config.model_dump()
        model["text_tower"]["tokenizer"] = str(vocabulary_file)
        values: dict = {
            "model": model,
            "data": {
                "train": [{"path": str(shards / "train-*.tar")}],
                "validation": [{"path": str(shards / "val-0.tar")}],
                "augmentation": {"color": 0.0},
                "workers": 0,
            },
            "objective": {"contrastive": {"queue_size": 50}, "momentum": 0.9},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"output": str(tmp_path / name), "epochs": 2, "batch_size": 8, "log_every": 1, "device": "cpu"},
        }
        for section, changes in sections.items():
            values[section] = {**values.get(section, {}), **changes}
        return PretrainConfig.model_validate(values)

    return make


@pytest.fixture(scope="session")
def visual_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("visual_tokenizer")
    config = VisualTokenizerConfig(codebook_size=32, code_dim=8, width=16, min_width=8, blocks=1, image_size=32)
    save_visual_tokenizer(directory, VisualTokenizer(config))
    return str(directory)


@pytest.fixture
def every_level(visual_tokenizer: str) -> dict:
    """The section of an objective with all levels on."""
    return {
        "momentum": 0.9,
        "learn_temperature": True,
        "contrastive": {"queue_size": 50, "in_batch": "online"},
        "masked_modeling": {"image_weight": 0.5, "text_weight": 0.5, "visual_tokenizer": visual_tokenizer},
        "task_alignment": {"weight": 0.3},
        "noise_filter": {"queue_size": 16, "start": 0.0},
    }
