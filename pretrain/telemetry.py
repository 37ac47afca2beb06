"""What a run reports: a progress bar or lines on stderr, rows in log.jsonl, run.json, TensorBoard, wandb.

log.jsonl holds one JSON object a line. A training row has `step`, `epoch`, `seconds` (of training since the row
before), every scalar of the objective by its name, `gradient_norm`, `learning_rate` (and, of a tower with a rate of its
own, `learning_rate_image_tower` or `learning_rate_text_tower`), `pairs_per_second` (of all ranks),
`pairs_per_second_per_gpu`, `mfu` (on a GPU), `data_wait` (share of the time, of the rank that waited longest) and
`peak_memory_gib` (on a GPU, since the row before, of the rank that held most). A validation row has `step`, `epoch`,
`seconds` and `validation`: {source: {direction: metrics}}.

run.json names the machine, the number of ranks and the steps of every start of the run.
"""

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

from cots.config import PretrainConfig
from cots.tokenizer_config import VisualTokenizerTrainingConfig
from pretrain.distributed import Ranks, max_over_ranks, mean_over_ranks
from pretrain.log_writers import LogWriter, RowLog, StartLog, TensorBoardWriter, WandbWriter
from pretrain.run_log import short_names

_LINE_EVERY = 30.0  # seconds between two lines where no terminal shows a bar
Config = PretrainConfig | VisualTokenizerTrainingConfig


class Telemetry:
    """What is counted and measured of the steps of a training.

    Every rank counts its steps and names what it could not read; only the first one shows and writes. All ranks call
    `flush` after the same steps.

    Args:
        steps: of the whole training; `first_step` of them were taken before.

    Raises:
        MissingDependency: tensorboard or wandb is asked for and not installed.
    """

    def __init__(self, config: Config, ranks: Ranks, steps: int, first_step: int) -> None:
        self._batch_size = config.training.batch_size
        self._ranks = ranks
        self._output = _Output(config, ranks, steps, first_step) if ranks.first else None
        self._matrix_rate: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begin a row anew: neither the time nor the memory of a validation counts as that of training."""
        self._since = time.perf_counter()
        self._counted, self._waited, self._flops = 0, 0.0, 0.0
        self._scalars: dict[str, list[torch.Tensor]] = {}
        if self._ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._ranks.device)

    def utilisation(self, flops_per_item: float, matrix_rate: float) -> None:
        """Give rows an MFU: the FLOPs of the steps over what the device could do (see flops.py, step_cost.py).

        Args:
            flops_per_item: of a picture with its captions, for run.json.
            matrix_rate: FLOP/s of a matrix product.
        """
        self._matrix_rate = matrix_rate
        if self._output is not None:
            self._output.starts.add({"flops_per_item": flops_per_item, "matrix_rate": matrix_rate})

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self._output is not None:
            self._output.terminal.say(text)

    def name_bad(self, bad: Sequence[tuple[str, str]], *, alike: bool) -> None:
        """A line for each sample that could not be read: name and reason.

        Every rank names those that it met; if all ranks met them `alike`, the first does.
        """
        for name, reason in bad:
            if self._output is not None or alike:
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
        if self._output is not None:
            self._output.terminal.advance()

    def flush(self, step: int, epoch: float, extra: Mapping[str, Any]) -> dict[str, float]:
        """Write a row of the steps since the last one and return it: means over all ranks, the largest wait and memory.

        All ranks call it together.
        """
        names = sorted(self._scalars)
        values = mean_over_ranks(torch.stack([torch.stack(self._scalars[name]).float().mean() for name in names]))
        means = dict(zip(names, values.tolist()))
        elapsed = time.perf_counter() - self._since  # after the values came, so that the device has done its part
        means["seconds"] = elapsed
        means["pairs_per_second"] = self._counted * self._batch_size / elapsed
        means["pairs_per_second_per_gpu"] = means["pairs_per_second"] / self._ranks.count
        if self._matrix_rate:
            means["mfu"] = self._flops / elapsed / self._matrix_rate
        largest = {"data_wait": self._waited / elapsed}
        if self._ranks.device.type == "cuda":
            largest["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._ranks.device) / 2**30
        means |= dict(zip(largest, max_over_ranks(list(largest.values()))))
        if self._output is not None:
            self._output.row(step, epoch, means, extra)
        self.restart()
        return means

    def validation(self, step: int, epoch: float, metrics: Mapping[str, Any]) -> None:
        """Write the figures {source: {direction: metrics}} as a row of their own."""
        if self._output is not None:
            self._output.validation(step, epoch, time.perf_counter() - self._since, metrics)

    def close(self) -> None:
        if self._output is not None:
            self._output.close()


class _Output:
    """All that the first rank shows and writes."""

    def __init__(self, config: Config, ranks: Ranks, steps: int, first_step: int) -> None:
        training, run = config.training, Path(config.training.output)
        start = {"first_step": first_step, "steps": steps, "batch_size": training.batch_size}
        self.starts = StartLog(run / "run.json", start | _machine(ranks), append=first_step > 0)
        self.writers: list[LogWriter] = []
        if training.tensorboard:
            self.writers.append(TensorBoardWriter(run / "tensorboard", first_step))
        if training.wandb:
            settings = config.model_dump(mode="json")
            self.writers.append(WandbWriter(run, training.wandb, settings, self.starts.first["started"]))
        self.starts.add({})
        self.rows = RowLog(run / "log.jsonl", append=first_step > 0)
        self.terminal = _Terminal(steps, first_step)

    def row(self, step: int, epoch: float, means: Mapping[str, float], extra: Mapping[str, Any]) -> None:
        self.rows.write({"step": step, "epoch": round(epoch, 3), **means, **extra})
        for writer in self.writers:
            writer.write(step, {"epoch": epoch, **means, **extra})
        self.terminal.show(step, _figures(means))

    def validation(self, step: int, epoch: float, seconds: float, metrics: Mapping[str, Any]) -> None:
        self.rows.write({"step": step, "epoch": round(epoch, 3), "seconds": seconds, "validation": metrics})
        names = short_names(metrics)
        flat = {
            f"validation/{names[source]}/{direction}/{name}": value
            for source, directions in metrics.items()
            for direction, figures in directions.items()
            for name, value in figures.items()
        }
        for writer in self.writers:
            writer.write(step, flat)

    def close(self) -> None:
        self.terminal.close()
        self.rows.close()
        for writer in self.writers:
            writer.close()


class _Terminal:
    """stderr: a bar where it is a terminal, else a line now and then."""

    def __init__(self, steps: int, first_step: int) -> None:
        self._steps = steps
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

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self) -> None:
        self._progress.advance(self._task)

    def show(self, step: int, figures: str) -> None:
        self._progress.update(self._task, figures=figures)
        if not self._shows_bar and time.perf_counter() - self._last_line >= _LINE_EVERY:
            self._last_line = time.perf_counter()
            self.say(f"step {step}/{self._steps}  {figures}")

    def close(self) -> None:
        self._progress.stop()


def no_number(means: Mapping[str, float]) -> str | None:
    """Which result of a step is not finite, so that the weights are not or will not be: the loss or the gradient."""
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


def _machine(ranks: Ranks) -> dict[str, Any]:
    """What a rank computes on, and with which versions."""
    if ranks.device.type == "cuda":
        hardware = torch.cuda.get_device_name(ranks.device)
    else:
        hardware = f"{platform.machine()} {ranks.device.type.upper()}, {os.cpu_count()} cores"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
        "ranks": ranks.count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
