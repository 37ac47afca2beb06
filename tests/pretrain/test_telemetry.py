import json
from pathlib import Path

import pytest
import torch

from pretrain.telemetry import Telemetry


def _log(run: Path, first_step: int, *losses: float) -> list[dict]:
    telemetry = Telemetry(run, steps=9, first_step=first_step, batch_size=4, active=True)
    for step, loss in enumerate(losses, first_step + 1):
        telemetry.step({"loss": torch.tensor(loss)}, waited=0.0)
        telemetry.flush(step, step / 9, {"rate_factor": 1 / 3})
    telemetry.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_row_holds_the_means_since_the_last_one(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, steps=9, first_step=0, batch_size=4, active=True)
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
