"""Where the log of a run is written: log.jsonl and run.json, and TensorBoard and Weights & Biases, both optional."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cots.errors import MissingDependency


class RowLog:
    """log.jsonl: a JSON object a line.

    Args:
        append: to the rows of a run that is resumed; else those of one that was stopped before its first checkpoint
            are dropped.
    """

    def __init__(self, path: Path, *, append: bool) -> None:
        if append:
            _drop_broken_line(path)
        self._file = path.open("a" if append else "w", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class StartLog:
    """run.json: what is known of every start of a run.

    Args:
        append: to the starts of a run that is resumed; one whose run.json is lost goes on without.
        start: facts of this one.
    """

    def __init__(self, path: Path, start: Mapping[str, Any], *, append: bool) -> None:
        self._path = path
        self._starts = [*(_read_starts(path) if append else []), dict(start)]

    @property
    def first(self) -> dict[str, Any]:
        return self._starts[0]

    def add(self, facts: Mapping[str, Any]) -> None:
        """Add facts of this start and write the file."""
        self._starts[-1] |= facts
        self._path.write_text(json.dumps({"starts": self._starts}, indent=2) + "\n", encoding="utf-8")


class LogWriter(Protocol):
    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of a step by name; "a/b" puts b into the group a."""

    def close(self) -> None: ...


class TensorBoardWriter:
    """Event files in `directory`; what an interrupted run wrote after `first_step` is hidden.

    Raises:
        MissingDependency: tensorboard is not installed.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependency("tensorboard", "pip install tensorboard") from error
        self._writer = SummaryWriter(str(directory), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(_grouped(name), value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A run of a Weights & Biases project, continued when the training is resumed.

    Args:
        started: when the run was first started, which tells it from an earlier one in the same directory.

    Raises:
        MissingDependency: wandb is not installed.
    """

    def __init__(self, run: Path, project: str, settings: dict[str, Any], started: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingDependency("wandb", "pip install wandb") from error
        identity = hashlib.blake2b(f"{run.resolve()} {started}".encode(), digest_size=8).hexdigest()
        self._run = wandb.init(
            project=project, name=run.name, dir=str(run), config=settings, id=identity, resume="allow"
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({_grouped(name): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def _grouped(name: str) -> str:
    """Losses side by side: "loss_contrastive" is "loss/contrastive"."""
    return name.replace("loss_", "loss/", 1) if name.startswith("loss_") else name


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


def _read_starts(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError):
        return []
