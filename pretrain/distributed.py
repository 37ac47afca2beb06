"""The process group: one process a GPU under torchrun, or one process alone."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cots.errors import ConfigError

DEVICES = ("cpu", "cuda", "mps")
_MOST_STEPS = 10  # between two looks for a signal
_UNHEEDED = 5.0  # seconds that a signal may wait


@dataclass(frozen=True)
class Ranks:
    """Attributes:
    rank: this process's number among `count`.
    device: where it computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Join torchrun's process group (nccl on cuda, gloo on cpu) if there is one, and leave it at the end.

    A rank that fails does not leave it but dies with its error: to leave, NCCL waits for what other ranks have begun,
    who wait for this one.

    Raises:
        ConfigError: the device does not exist, or there are fewer GPUs than processes.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        target = torch.device(chosen)
    except RuntimeError as error:
        raise ConfigError(f"training.device {device!r} is no device that torch knows; set cpu or cuda.") from error
    if target.type not in DEVICES:
        raise ConfigError(f"training.device {device!r} is none that computes; set cpu or cuda.")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"training.device is {device!r}, but torch sees no GPU; set training.device=cpu.")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"training.device is {device!r}, but torch sees {torch.cuda.device_count()} GPU(s).")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        if target.index is not None:
            torch.cuda.set_device(target)
        yield Ranks(0, 1, target)
        return
    if target.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ConfigError(
                f"torchrun started process {local + 1} on a machine of {gpus} GPU(s), and each needs one of its own; "
                f"set --nproc-per-node {gpus}."
            )
        target = torch.device("cuda", local)
        torch.cuda.set_device(target)
    # Others wait while the first rank validates; of one that died, torchrun ends the others at once.
    dist.init_process_group("nccl" if target.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    yield Ranks(dist.get_rank(), count, target)
    dist.destroy_process_group()


def lost_another_rank(error: RuntimeError) -> bool:
    """Whether a rank cannot go on because another one has gone; what gloo raises then has no class of its own."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


@contextmanager
def ending_at_sigterm() -> Iterator[None]:
    """Before the first step there is nothing to save: SIGTERM ends the process at once.

    With exit code 0; of several ranks with that of a process which the signal has killed, or torchrun would take a rank
    that it reached alone for one that is done, and let the others wait for it.
    """

    def end(*_: object) -> None:
        sys.stderr.write("Stopped before the first step; there was nothing to save.\n")
        raise SystemExit(0 if int(os.environ.get("WORLD_SIZE", "1")) == 1 else 128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """Notices SIGTERM: the step in flight is finished and all ranks stop after the same one.

    Several ranks look every few steps only, for it takes them a meeting; of slow steps at every one, for torchrun
    kills what has not saved and ended half a minute after the signal.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._every, self._steps = 1, 0  # steps between two meetings, and since the last one
        self._since = time.perf_counter()
        self._received = False
        self._before: Any = None

    def __enter__(self) -> "StopRequest":
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def requested(self) -> bool:
        """Whether to stop after the step just taken; the same answer on every rank."""
        if self._ranks.count == 1:
            return self._received
        self._steps += 1
        if self._steps < self._every:
            return False
        seconds = (time.perf_counter() - self._since) / self._steps
        seen = torch.tensor([float(self._received), seconds], device=self._ranks.device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        received, slowest = seen.tolist()
        self._every = min(_MOST_STEPS, max(1, int(_UNHEEDED / max(slowest, 1e-6))))
        self._steps, self._since = 0, time.perf_counter()
        return bool(received)

    def _receive(self, *_: object) -> None:
        self._received = True


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a detached scalar over all ranks, on every rank."""
    if not dist.is_initialized():
        return value
    value = value.detach().clone().float()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def sum_over_ranks(counts: Sequence[int]) -> list[int]:
    """The sums of whole numbers over all ranks, on every rank."""
    if not dist.is_initialized():
        return list(counts)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def max_over_ranks(values: Sequence[float]) -> list[float]:
    """The largest of each number over all ranks, on every rank."""
    if not dist.is_initialized():
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()
