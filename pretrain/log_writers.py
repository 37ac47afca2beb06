"""Other places that a log is written to: TensorBoard and Weights & Biases, both optional."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cots.errors import MissingDependency


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
    """A run of a Weights & Biases project, gone on with when the training is resumed.

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
