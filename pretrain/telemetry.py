"""What a run reports: a progress bar or lines on stderr, rows in log.jsonl, run.json, TensorBoard, wandb.

log.jsonl holds one JSON object a line. A training row has `step`, `epoch`, `seconds` (of training since the row
before), every scalar of the objective by its name, `gradient_norm`, `learning_rate`, `pairs_per_second` (of all
ranks), `pairs_per_second_per_gpu`, `mfu` (on a GPU), `data_wait` (share of the time) and `peak_memory_gib` (of a
rank). A validation row has `step`, `epoch`, `seconds` and `validation`: {source: {direction: metrics}}.

run.json names the machine, the number of ranks and the steps of every start of the run.
"""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pretrain.distributed import mean_over_ranks
from pretrain.log_writers import LogWriter, TensorBoardWriter, WandbWriter
from pretrain.run_log import short_names

_LINE_EVERY = 30.0  # seconds between two lines where no terminal shows a bar


class Telemetry:
    """Rows of the log.

    Every rank counts its steps and names what it could not read; values are means over all ranks, and only the first
    rank shows and writes them.

    Args:
        run: the run's directory.
        steps: of the whole training; `first_step` of them were taken before.
        batch_size: pairs of all ranks per step.
        active: whether this rank writes.
        ranks: how many processes train.
        settings: the run's configuration, for wandb.
        tensorboard: write run/tensorboard/ too.
        wandb: a project of Weights & Biases to log to; "": none.

    Raises:
        MissingDependency: tensorboard or wandb is asked for and not installed.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        first_step: int,
        batch_size: int,
        active: bool,
        *,
        ranks: int = 1,
        settings: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
        wandb: str = "",
    ) -> None:
        self.active = active
        self.batch_size = batch_size
        self.steps = steps
        self.ranks = ranks
        self._run = run
        self._matrix_rate: float | None = None
        self._flops = 0.0
        self._since = time.perf_counter()
        self._waited = 0.0
        self._counted = 0
        self._scalars: dict[str, list[torch.Tensor]] = {}
        if not active:
            return
        self._starts = [] if not first_step else _read_starts(run)
        self._starts.append({"first_step": first_step, "steps": steps, "batch_size": batch_size, **_machine(ranks)})
        self._writers: list[LogWriter] = []
        if tensorboard:
            self._writers.append(TensorBoardWriter(run / "tensorboard", first_step))
        if wandb:
            self._writers.append(WandbWriter(run, wandb, dict(settings or {}), self._starts[0]["started"]))
        self._write_starts()
        # a run that starts from nothing leaves no rows of one that was stopped before its first checkpoint
        log = run / "log.jsonl"
        if first_step:
            _drop_broken_line(log)
        self._file = log.open("a" if first_step else "w", encoding="utf-8")
        self._console = Console(stderr=True)
        self._shows_bar = sys.stderr.isatty()
        self._last_line = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=10),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not self._shows_bar,
        )
        self._task = self._progress.add_task("training", total=steps, completed=first_step, figures="")
        self._progress.start()

    def utilisation(self, flops_per_item: float, matrix_rate: float) -> None:
        """Give rows an MFU: the FLOPs of the steps over what the device could do (see flops.py, step_cost.py).

        Args:
            flops_per_item: of a picture with its captions, for run.json.
            matrix_rate: FLOP/s of a matrix product.
        """
        self._matrix_rate = matrix_rate
        if self.active:
            self._starts[-1] |= {"flops_per_item": flops_per_item, "matrix_rate": matrix_rate}
            self._write_starts()

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.active:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def name_bad(self, bad: Sequence[tuple[str, str]], *, alike: bool) -> None:
        """A line for each sample that could not be read: name and reason.

        Every rank names those that it met; if all ranks met them `alike`, the first does.
        """
        for name, reason in bad:
            if self.active or alike:
                self.say(f"skipped {name}: {reason}")
            else:
                sys.stderr.write(f"skipped {name}: {reason}\n")  # at once: print's two writes mix with other ranks'

    def step(self, scalars: Mapping[str, torch.Tensor], waited: float, flops: float = 0.0) -> None:
        """Count a step. The values stay on the device until `flush`, so that no step waits for the GPU."""
        self._counted += 1
        self._flops += flops
        self._waited += waited
        for name, value in scalars.items():
            self._scalars.setdefault(name, []).append(value)
        if self.active:
            self._progress.advance(self._task)

    def flush(self, step: int, epoch: float, extra: Mapping[str, Any]) -> dict[str, float]:
        """Write a row with the means since the last one, over all ranks, and return them."""
        names = sorted(self._scalars)
        values = mean_over_ranks(torch.stack([torch.stack(self._scalars[name]).float().mean() for name in names]))
        means = dict(zip(names, values.tolist()))
        elapsed = time.perf_counter() - self._since  # after the values came, so that the device has done its part
        means["seconds"] = elapsed
        means["pairs_per_second"] = self._counted * self.batch_size / elapsed
        means["pairs_per_second_per_gpu"] = means["pairs_per_second"] / self.ranks
        if self._matrix_rate:
            means["mfu"] = self._flops / elapsed / self._matrix_rate
        means["data_wait"] = self._waited / elapsed
        if torch.cuda.is_available():
            means["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.active:
            self._write({"step": step, "epoch": round(epoch, 3), **means, **extra})
            for writer in self._writers:
                writer.write(step, {"epoch": epoch, **means, **extra})
            self._show(step, means)
        self.restart()
        return means

    def restart(self) -> None:
        """Start counting anew, so that validation time does not count as training time."""
        self._since, self._waited, self._scalars = time.perf_counter(), 0.0, {}
        self._counted, self._flops = 0, 0.0

    def validation(self, step: int, epoch: float, metrics: Mapping[str, Any]) -> None:
        """Write the recalls {source: {direction: metrics}} as a row of their own."""
        if self.active:
            seconds, names = time.perf_counter() - self._since, short_names(metrics)
            self._write({"step": step, "epoch": round(epoch, 3), "seconds": seconds, "validation": metrics})
            recalls = {
                f"validation/{names[source]}/{direction}/{name}": value
                for source, directions in metrics.items()
                for direction, figures in directions.items()
                for name, value in figures.items()
            }
            for writer in self._writers:
                writer.write(step, recalls)

    def close(self) -> None:
        if self.active:
            self._progress.stop()
            self._file.close()
            for writer in self._writers:
                writer.close()

    def _show(self, step: int, means: Mapping[str, float]) -> None:
        figures = _figures(means)
        self._progress.update(self._task, figures=figures)
        if not self._shows_bar and time.perf_counter() - self._last_line >= _LINE_EVERY:
            self._last_line = time.perf_counter()
            self.say(f"step {step}/{self.steps}  {figures}")

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def _write_starts(self) -> None:
        (self._run / "run.json").write_text(json.dumps({"starts": self._starts}, indent=2) + "\n", encoding="utf-8")


def no_number(means: Mapping[str, float]) -> str | None:
    """What of a step's results is not finite, so that the weights are or will be none either: loss or gradient."""
    if not math.isfinite(means["loss"]):
        return "loss"
    return None if math.isfinite(means["gradient_norm"]) else "gradient"


def _figures(means: Mapping[str, float]) -> str:
    """What a bar shows: with step numbers of six digits it still fits into 80 columns."""
    parts = [f"loss {means['loss']:.3f}"] if "loss" in means else []
    parts.append(f"{means['pairs_per_second']:,.0f} pairs/s")
    if "mfu" in means:
        parts.append(f"MFU {means['mfu']:.0%}")
    parts.append(f"wait {means['data_wait']:.0%}")
    return "  ".join(parts)


def _machine(ranks: int) -> dict[str, Any]:
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
        "ranks": ranks,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def _read_starts(run: Path) -> list[dict[str, Any]]:
    """What the run's earlier starts noted; a run whose run.json is lost goes on without."""
    try:
        return json.loads((run / "run.json").read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError):
        return []


def _drop_broken_line(log: Path) -> None:
    """Cut off the row that a killed run was writing: what is appended to it would be lost with it."""
    if log.exists():
        content = log.read_bytes()
        with log.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
    """A float to six digits; one that is not finite, for which JSON has no word, as null."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
