import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from cots.config import PretrainConfig
from cots.errors import MissingDependency
from pretrain.distributed import Ranks
from pretrain.telemetry import Telemetry, _figures

ALONE = Ranks(0, 1, torch.device("cpu"))
OF_TWO = [Ranks(rank, 2, torch.device("cpu")) for rank in (0, 1)]
ROOT = Path(__file__).parents[2]
_SLOW_SECOND_RANK = """
import os, sys, time
from pretrain import trainer

def slow(run, batches=trainer.Run._batches):
    for batch in batches(run):
        time.sleep(0.3)
        yield batch

if os.environ["RANK"] == "1":
    trainer.Run._batches = slow
from pretrain.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def _telemetry(run: Path, *, first_step: int = 0, ranks: Ranks = ALONE, **training: object) -> Telemetry:
    config = PretrainConfig.model_validate({"training": {"output": str(run), "batch_size": 4, **training}})
    return Telemetry(config, ranks, steps=9, first_step=first_step)


def _log(run: Path, first_step: int, *losses: float) -> list[dict]:
    telemetry = _telemetry(run, first_step=first_step)
    for step, loss in enumerate(losses, first_step + 1):
        telemetry.step({"loss": torch.tensor(loss)}, waited=0.0)
        telemetry.flush(step, step / 9, {"rate_factor": 1 / 3})
    telemetry.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_row_holds_the_means_since_the_last_one(tmp_path: Path) -> None:
    telemetry = _telemetry(tmp_path)
    for loss in (1.0, 2.0, 6.0):
        telemetry.step({"loss": torch.tensor(loss)}, waited=0.0)
    means = telemetry.flush(3, 0.5, {})
    telemetry.close()
    assert means["loss"] == pytest.approx(3.0)
    assert {"pairs_per_second", "data_wait"} <= means.keys()
    assert json.loads((tmp_path / "log.jsonl").read_text())["loss"] == 3.0


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    rows = _log(tmp_path, 0, float("nan"), float("inf"), 0.5)
    assert [row["loss"] for row in rows] == [None, None, 0.5]


def test_a_resumed_run_goes_on_with_the_log_and_a_new_one_begins_it_anew(tmp_path: Path) -> None:
    _log(tmp_path, 0, 3.0, 2.0)
    assert [row["step"] for row in _log(tmp_path, 2, 1.0)] == [1, 2, 3]
    assert [row["step"] for row in _log(tmp_path, 0, 5.0)] == [1]


def test_the_rate_is_given_per_gpu_and_as_a_share_of_what_the_device_can_do(tmp_path: Path) -> None:
    telemetry = _telemetry(tmp_path, ranks=OF_TWO[0])
    telemetry.utilisation(flops_per_item=100.0, matrix_rate=1000.0)
    telemetry.step({"loss": torch.tensor(1.0)}, waited=0.0, flops=200.0)
    means = telemetry.flush(1, 0.1, {"learning_rate": 1e-3})
    telemetry.close()
    assert means["pairs_per_second_per_gpu"] == pytest.approx(means["pairs_per_second"] / 2)
    assert means["mfu"] == pytest.approx(means["pairs_per_second_per_gpu"] * 100 / 1000)
    assert json.loads((tmp_path / "log.jsonl").read_text())["learning_rate"] == 1e-3
    start = json.loads((tmp_path / "run.json").read_text())["starts"][0]
    assert (start["ranks"], start["batch_size"], start["matrix_rate"]) == (2, 4, 1000.0)


def test_a_gpu_that_is_not_used_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    (row,) = _log(tmp_path, 0, 1.0)
    assert "peak_memory_gib" not in row
    assert " CPU, " in json.loads((tmp_path / "run.json").read_text())["starts"][0]["hardware"]


def test_the_memory_of_a_validation_is_not_that_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = {"cuda:1": 0}

    def hold(gib: int) -> None:
        peak["cuda:1"] = max(peak["cuda:1"], gib << 30)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[str(device)])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.update({str(device): 0}))
    telemetry = _telemetry(tmp_path, ranks=Ranks(0, 1, torch.device("cuda:1")))
    peaks = []
    for step in (1, 2):
        telemetry.step({"loss": torch.tensor(1.0)}, waited=0.0)
        hold(3)
        peaks.append(telemetry.flush(step, 0.5, {})["peak_memory_gib"])
        hold(7)
        telemetry.validation(step, 0.5, {})
        telemetry.restart()
    telemetry.close()
    assert peaks == [3, 3]
    assert json.loads((tmp_path / "run.json").read_text())["starts"][0]["hardware"] == "GPU cuda:1"


def test_the_wait_is_that_of_the_rank_that_waits_longest(
    make_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    config = make_config("two", training={"epochs": 1, "log_every": 2, "checkpoint_steps": 5, "validate_steps": 3})
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (tmp_path / "slow.py").write_text(_SLOW_SECOND_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, str(tmp_path / "slow.py"), str(tmp_path / "two.yaml")], cwd=ROOT, env=environment, check=True
    )
    lines = (Path(config.training.output) / "log.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 3, 4, 5, 6]
    waits = [row["data_wait"] for row in rows]
    assert statistics.median(waits) > 0.5
    assert max(waits) <= 1


def test_a_run_killed_in_the_middle_of_a_row_goes_on_with_a_row_of_its_own(tmp_path: Path) -> None:
    _log(tmp_path, 0, 3.0, 2.0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in _log(tmp_path, 2, 1.0)] == [1, 2, 3]
    assert [start["first_step"] for start in json.loads((tmp_path / "run.json").read_text())["starts"]] == [0, 2]


def test_a_rank_names_a_bad_sample_in_one_write_so_that_lines_of_many_ranks_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    _telemetry(tmp_path, ranks=OF_TWO[1]).name_bad([("a.tar::1", "no picture")], alike=False)
    assert written == ["skipped a.tar::1: no picture\n"]


def test_a_long_run_on_eighty_columns_shows_its_figures_in_one_line() -> None:
    figures = _figures({"loss": 13.1234, "pairs_per_second": 12345.6, "mfu": 0.523, "data_wait": 0.012})
    assert figures == "loss 13.123  12,346 pairs/s  MFU 52%  wait 1%"
    assert len(f"123456/123456 {'=' * 10} 10:00:00 {figures}") <= 80


def test_tensorboard_reads_every_value_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry = _telemetry(tmp_path, tensorboard=True)
    telemetry.step({"loss": torch.tensor(2.0), "loss_contrastive": torch.tensor(1.5)}, waited=0.0)
    telemetry.flush(1, 0.1, {"learning_rate": 1e-3})
    telemetry.validation(1, 0.1, {"data/val.tar": {"text_to_image": {"R@1": 12.5}}})
    one_name = {"coco/val.tar": {"text_to_image": {"R@1": 1.0}}, "flickr/val.tar": {"text_to_image": {"R@1": 2.0}}}
    telemetry.validation(2, 0.2, one_name)
    telemetry.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss/contrastive")] == [1.5]
    assert [event.value for event in events.Scalars("validation/val.tar/text_to_image/R@1")] == [12.5]
    for name, value in (("coco", 1.0), ("flickr", 2.0)):
        scalars = events.Scalars(f"validation/{name}/val.tar/text_to_image/R@1")
        assert [event.value for event in scalars] == [value]


@pytest.mark.parametrize(
    ("module", "arguments"), [("torch.utils.tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "cots"})]
)
def test_a_log_that_needs_a_missing_package_names_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, arguments: dict
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    package = module.rpartition(".")[2]
    with pytest.raises(MissingDependency, match=f"{package} is not installed; install it with: pip install {package}"):
        _telemetry(tmp_path, **arguments)
