"""Two real processes, in every thrifty way, take the steps of one."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml

from cots.config import ModelConfig, PretrainConfig
from pretrain.trainer import pretrain

ROOT = Path(__file__).parents[2]
Configure = Callable[..., PretrainConfig]
Values = dict[str, list[float]]
LOGGED = (
    "loss",
    "loss_contrastive",
    "loss_alignment",
    "loss_masked_image",
    "loss_masked_text",
    "masked_image_accuracy",
    "masked_text_accuracy",
    "direction_agreement",
    "queue_fill",
    "filter_kept",
    "filter_threshold",
    "temperature",
    "gradient_norm",
)
WAYS: dict[str, dict] = {
    "copies": {},
    "copies-parts": {"accumulation": 2},
    "sharded": {"sharding": "sharded"},
    "sharded-parts-recomputed": {"sharding": "sharded", "accumulation": 2, "activation_checkpointing": True},
}
_ONE_AFTER_ANOTHER = """
import os, sys
from pretrain.__main__ import main

os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # each run has a meeting place of its own
for port, path in zip(sys.argv[1::2], sys.argv[2::2]):
    os.environ["MASTER_PORT"] = port
    main([path])
"""


@pytest.fixture(scope="module")
def configure(
    tiny_model_config: ModelConfig,
    vocabulary_file: Path,
    shards: Path,
    visual_tokenizer: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Configure:
    """A tiny training with all levels and two captions an item; keyword arguments are settings of `training`."""
    directory = tmp_path_factory.mktemp("ranks")
    model = tiny_model_config.model_dump()
    model["text_tower"]["tokenizer"] = str(vocabulary_file)
    masked = {"image_weight": 0.5, "text_weight": 0.5, "visual_tokenizer": visual_tokenizer}

    def make(name: str, **training: object) -> PretrainConfig:
        values = {
            "model": model,
            "data": {
                "train": str(shards / "train-*.tar"),
                "captions_per_item": 2,
                "augmentation": {"color": 0.4, "flip": 0.5, "crop_scale": [0.5, 1.0]},
                "workers": 0,
            },
            "objective": {
                "momentum": 0.9,
                "learn_temperature": True,
                "contrastive": {"queue_size": 50, "in_batch": "online"},
                "masked_modeling": masked,
                "task_alignment": {"weight": 0.3},
                "noise_filter": {"queue_size": 16, "start": 0.0},
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {
                "output": str(directory / name),
                "epochs": 1,
                "batch_size": 8,
                "log_every": 1,
                "device": "cpu",
            },
        }
        values["training"] |= training
        return PretrainConfig.model_validate(values)

    return make


@pytest.fixture(scope="module")
def expected(configure: Configure) -> Values:
    """What one process logs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    values = _logged(pretrain(configure("one")))
    torch.set_num_threads(threads)
    assert min(values["filter_kept"]) < 1
    assert len(set(values["temperature"])) == len(values["loss"]) == 6
    return values


def _logged(run: Path) -> Values:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {name: [row[name] for row in rows if "loss" in row] for name in LOGGED}


@pytest.fixture(scope="module")
def two_processes(configure: Configure) -> tuple[dict[str, Path], str]:
    """The runs of WAYS, by name, of two processes that are launched once, and what these wrote to stderr."""
    runs: dict[str, Path] = {}
    arguments: list[str] = []
    for (name, training), port in zip(WAYS.items(), _free_ports(len(WAYS))):
        config = configure(name, **training)
        runs[name] = Path(config.training.output)
        path = runs[name].with_suffix(".yaml")
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        arguments += [str(port), str(path)]
    script = runs["copies"].with_name("one_after_another.py")
    script.write_text(_ONE_AFTER_ANOTHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return runs, done.stderr


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_with_every_level_take_the_steps_of_one(
    two_processes: tuple[dict[str, Path], str], expected: Values, way: str
) -> None:
    """Queues, filter and losses are those of the global batch, and so is what is augmented and hidden."""
    runs, said = two_processes
    assert (runs[way] / "report.html").exists(), said[-3000:]
    values = _logged(runs[way])
    for name in LOGGED:
        assert values[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
