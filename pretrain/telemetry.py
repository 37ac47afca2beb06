"""What a run says of itself: a progress line or bar on stderr, and one JSON object a line in log.jsonl."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pretrain.distributed import mean_over_ranks

_SHOWN = ("loss", "temperature", "positive_similarity", "negative_similarity", "pairs_per_second")


class Telemetry:
    """Rows of the log.

    Every rank counts its steps; values are means over all ranks, and only the first rank shows and writes them.

    A training row holds step, epoch, every scalar of the objective, the learning rate factor, the gradient norm,
    pairs per second (of all ranks), the share of the time spent waiting for data, and the peak memory of the device.
    A validation row holds the recalls.
    """

    def __init__(self, run: Path, steps: int, first_step: int, batch_size: int, active: bool) -> None:
        self.active = active
        self.batch_size = batch_size
        self.steps = steps
        self._since = time.perf_counter()
        self._waited = 0.0
        self._counted = 0
        self._scalars: dict[str, list[torch.Tensor]] = {}
        if not active:
            return
        # a run that starts from nothing leaves no rows of one that was stopped before its first checkpoint
        self._file = (run / "log.jsonl").open("a" if first_step else "w", encoding="utf-8")
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.completed}/{task.total} steps"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("training", total=steps, completed=first_step, figures="")
        self._progress.start()

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.active:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, scalars: dict[str, torch.Tensor], waited: float) -> None:
        """Count a step. The values stay on the device until `flush`, so that no step waits for the GPU."""
        self._counted += 1
        self._waited += waited
        for name, value in scalars.items():
            self._scalars.setdefault(name, []).append(value)
        if self.active:
            self._progress.advance(self._task)

    def flush(self, step: int, epoch: float, extra: dict[str, Any]) -> dict[str, float]:
        """Write a row with the means since the last one, over all ranks, and return them."""
        names = sorted(self._scalars)
        values = mean_over_ranks(torch.stack([torch.stack(self._scalars[name]).float().mean() for name in names]))
        means = dict(zip(names, values.tolist()))
        elapsed = time.perf_counter() - self._since
        means["pairs_per_second"] = self._counted * self.batch_size / elapsed
        means["data_wait"] = self._waited / elapsed
        if torch.cuda.is_available():
            means["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.active:
            self._write({"step": step, "epoch": round(epoch, 3), **means, **extra})
            figures = "  ".join(f"{name} {means[name]:.4g}" for name in _SHOWN if name in means)
            self._progress.update(self._task, figures=figures)
        self.restart()
        return means

    def restart(self) -> None:
        """Start counting anew, so that validation time does not count as training time."""
        self._since, self._waited, self._counted, self._scalars = time.perf_counter(), 0.0, 0, {}

    def validation(self, step: int, epoch: float, metrics: dict[str, Any]) -> None:
        if self.active:
            self._write({"step": step, "epoch": round(epoch, 3), "validation": metrics})

    def close(self) -> None:
        if self.active:
            self._progress.stop()
            self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()


def _plain(value: Any) -> Any:
    """A float to six digits; one that is not finite, for which JSON has no word, as null."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
