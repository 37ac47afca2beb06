"""Checkpoints of the whole training state: written whole or not at all, the last few kept.

A checkpoint holds the encoder, its momentum and slow averages, the objective with its queues, the optimizer, the
number of the step (which is the loader's position), the best validation so far, the random state of every rank, and
the configuration. Only the random state is a rank's own: another number of ranks can go on from it.
"""

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from cots.errors import ConfigError, TrainingError
from pretrain.distributed import Ranks

_PATTERN = "step-*.pt"
FORMAT = 2  # of what a checkpoint's numbers mean: 2 counts epochs in samples, and draws jitter and masks by sample
_CANNOT_WRITE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST,
}  # fmt: skip


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C takes effect afterwards: torch.save would hide it behind an error about places in its file."""
    if threading.current_thread() is not threading.main_thread():  # no signal interrupts another one
        yield
        return
    received = False

    def hold(*_: object) -> None:
        nonlocal received
        received = True

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)


@_interrupts_held()
def save_checkpoint(run: Path, state: dict[str, Any], step: int, keep: int) -> Path:
    """Write checkpoints/step-N.pt through a temporary file and remove all but the last `keep`, and broken-off ones."""
    directory = run / "checkpoints"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{step:08d}.pt"
    scratch = path.with_suffix(".tmp")
    try:
        with scratch.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        scratch.unlink(missing_ok=True)
        before = latest_checkpoint(run)
        left = "and there is no earlier one" if before is None else f"{before} is intact"
        raise TrainingError(
            f"The checkpoint {path} cannot be written ({_reason(error)}), {left}; make room and resume with "
            "training.resume=true."
        ) from error
    broken_off = directory.glob("step-*.tmp")  # what a killed run was writing
    for old in [*sorted(directory.glob(_PATTERN))[:-keep], *broken_off]:
        old.unlink()
    return path


def _reason(error: BaseException) -> str:
    """What the system said; torch hides it behind a sentence about positions in its file."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__cause__ or cause.__context__
    return str(error) if cause is None else str(cause.strerror)


@contextmanager
def writing_to(run: Path) -> Iterator[None]:
    """What a run does while its log, its settings, its best model and its report are written into its directory.

    Raises:
        TrainingError: the disk is full, or the directory cannot be made or written to.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        what, own = Path(getattr(error, "filename", None) or run), run.absolute()
        elsewhere = not (what.absolute().is_relative_to(own) or own.is_relative_to(what.absolute()))
        if elsewhere or (isinstance(error, OSError) and error.errno not in _CANNOT_WRITE):
            raise  # such as a file that was to be read
        raise TrainingError(
            f"{what} cannot be written ({_reason(error)}); make room or choose another training.output. Checkpoints "
            "that are there are intact."
        ) from error


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run, if there is one."""
    return max((run / "checkpoints").glob(_PATTERN), default=None)


def checkpoint_to_resume(run: Path, resume: bool) -> Path | None:
    """The checkpoint that a training into `run` goes on from; None if it begins.

    Raises:
        ConfigError: there is one, and the training is not to `resume`.
    """
    path = latest_checkpoint(run)
    if path is not None and not resume:
        raise ConfigError(
            f"{run} holds a run already; resume with training.resume=true or choose another training.output."
        )
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as tensors of the CPU, whose pages are read from the file when they are first used.

    So processes of one machine share the memory. What is written to a tensor does not reach the file, and removing the
    file, as later checkpoints do, takes nothing from a process that has opened it.

    Raises:
        TrainingError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle and I/O errors of many classes
        # torch advises to save one file in another form, and to load the other one unsafely
        foreign = isinstance(error, UnpicklingError) or not (isinstance(error, OSError) or is_zipfile(path))
        reason = "not a whole PyTorch file" if foreign else str(error).strip().partition("\n")[0].partition(". ")[0]
        raise TrainingError(
            f"The checkpoint {path} is damaged ({reason}); remove it to go on from an earlier one."
        ) from error


def refuse_other_format(path: Path, state: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: an earlier version wrote the checkpoint, whose further steps would have had other samples.
    """
    if state.get("format") != FORMAT:
        raise ConfigError(
            f"{path} is of an earlier version of COTS, whose steps to come had other samples; finish the run with that "
            "version, or start a new training.output from its model (start.model)."
        )


def refuse_other_training(path: Path, before: dict[str, Any], now: dict[str, Any], free: dict[str, set[str]]) -> None:
    """A run goes on with the settings that it began with; how it reads, computes and logs may change.

    Args:
        free: the settings of each section that may.

    Raises:
        ConfigError: a setting that affects the weights, the averages or the order of samples is another one.
    """
    if before.keys() != now.keys():
        raise ConfigError(f"{path} is of another kind of training; start a new training.output.")
    for section in before:
        for name in before[section] | now[section]:
            values = before[section].get(name), now[section].get(name)
            if name not in free.get(section, ()) and values[0] != values[1]:
                setting, earlier, given = _first_difference(f"{section}.{name}", *values)
                raise ConfigError(
                    f"{path} was trained with {setting}={earlier}, not {given}; give the same value or start a new "
                    "training.output."
                )


def _first_difference(setting: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first single setting below one in which two values differ, and its two values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return setting, before, now
    name = next(name for name in before | now if before.get(name) != now.get(name))
    return _first_difference(f"{setting}.{name}", before.get(name), now.get(name))


def refuse_other_items(path: Path, before: list[int] | None, now: list[int]) -> None:
    """The place in the data is the number of the step, and the queues name items by their numbers: of other sources,
    both mean something else.

    Args:
        before, now: how many items each training source has; None: the checkpoint is of a version that did not say.

    Raises:
        ConfigError: they differ.
    """
    if before is not None and before != now:
        raise ConfigError(
            f"{path} was trained on sources of {_join(before)} items, which have {_join(now)} now; bring them back as "
            "they were or start a new training.output."
        )


def _join(numbers: list[int]) -> str:
    return " + ".join(f"{number:,}" for number in numbers)


def random_state(device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The random state of every rank, in rank order, on every rank; `device` is where this one computes."""
    own = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    if not dist.is_initialized():
        return [own]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, own)
    return states


def restore_random_state(states: list[dict[str, torch.Tensor]], ranks: Ranks, *seeds: int) -> None:
    """Give this rank back its random state; if another number of ranks saved theirs, one drawn from (seeds, rank)."""
    if ranks.count != len(states):
        torch.manual_seed(int(np.random.SeedSequence([*seeds, ranks.rank]).generate_state(1, np.uint64)[0]))
        return
    own = states[ranks.rank]
    torch.set_rng_state(own["cpu"])
    if "cuda" in own and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], ranks.device)
