"""Processes that load data beside a training, of one that may hold a GPU.

On Linux a worker is forked from its parent in milliseconds, and shares what it reads. That is kept where no GPU is in
use. A process that holds a CUDA context must not be forked: its threads are lost half way through what they did, and
copying its mappings was seen to take seven seconds for each worker. Its workers are forked from a server instead: a
process that has imported what they run and nothing else, knows of no GPU, and begins as early as the training does. On
macOS they are spawned, as is its custom: there not even such a server may fork.

A worker heeds its trainer alone. Ctrl-C and SIGTERM, which a terminal or a scheduler sends to every process of a job,
are for the trainer, which may want batches until it has stopped; and when the trainer ends, however it does, so do its
workers. What a worker finds wrong is raised in the trainer as the worker would have raised it.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from threading import Thread
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, default_convert

from cots.errors import CotsError

_AHEAD = 4  # batches that each worker loads before they are asked for
_FOR_THE_TRAINER = (signal.SIGINT, signal.SIGTERM)
_PRELOADED = ["pretrain.loader", "pretrain.source_check", "pretrain.tokenizer_pictures"]
_started: WeakSet[BaseProcess] = WeakSet()


class WorkerLoader(DataLoader[Any]):
    """A `DataLoader` of so many workers; data set and collate function must pickle.

    torch puts a worker's traceback into the message of what it raised, and so turns a sentence into a page.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        workers: int,
        collate_fn: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        single = "batch_size" in options and options["batch_size"] is None
        collate = collate_fn or (default_convert if single else default_collate)
        with _no_advice():
            super().__init__(
                _Handed(dataset), collate_fn=_HandedCollate(collate, single), **options, **_worker_options(workers)
            )

    def __iter__(self) -> Any:
        before = set(multiprocessing.active_children())
        with _no_advice():
            batches = super().__iter__()  # the workers begin here, not with the first batch
        _started.update(set(multiprocessing.active_children()) - before)
        return _raise_handed(batches)


@contextmanager
def _no_advice() -> Iterator[None]:
    """torch warns of more workers than cores: harmless, and said of a default."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


class _Handed(Dataset[Any]):
    """Items, or in place of one the CotsError that it raised."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except CotsError as error:
            return error


class _HandedCollate:
    """A batch, or in place of one the first CotsError among its items."""

    def __init__(self, collate: Callable[[Any], Any], single: bool) -> None:
        self.collate, self.single = collate, single

    def __call__(self, items: Any) -> Any:
        for item in [items] if self.single else items:
            if isinstance(item, CotsError):
                return item
        return self.collate(items)


def _raise_handed(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, CotsError):
            raise batch
        yield batch


def _worker_options(workers: int) -> dict[str, Any]:
    context = None
    if workers and holds_gpu() and sys.platform == "linux":
        start_server()
        context = _ServedContext()
    return {
        "num_workers": workers,
        "prefetch_factor": _AHEAD if workers else None,
        "multiprocessing_context": context,
        "worker_init_fn": _begin,
        # the global generator belongs to the model's dropout: a resumed run must find it as it was
        "generator": torch.Generator(),
    }


def holds_gpu() -> bool:
    """Whether this process has a CUDA context."""
    return torch.cuda.is_initialized()


def start_server(further: Sequence[str] = ()) -> None:
    """Start the process that workers are forked from, if none runs; returns at once, while it still imports.

    Args:
        further: modules that it imports too, if they are installed.
    """
    forkserver.set_forkserver_preload([*_PRELOADED, *further])
    resource_tracker.ensure_running()  # multiprocessing starts it before, and then lets all signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_TRAINER)  # the server and its workers inherit this
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Served(ForkServerProcess):
    """A process forked from the server."""

    def start(self) -> None:
        with _main_left_alone():
            super().start()

    def terminate(self) -> None:
        self.kill()  # it ignores SIGTERM


class _ServedContext(ForkServerContext):
    Process = _Served


@contextmanager
def _main_left_alone() -> Iterator[None]:
    """Processes that are started meanwhile do not run the main script again.

    multiprocessing has each do so, for what it may define. A loader needs nothing of it, and a script that trains
    without asking for `__name__ == "__main__"` would begin a training in every worker. The `__main__` of a package is
    never run again, so the script is passed off as one.
    """
    main = sys.modules["__main__"]
    before = main.__spec__
    main.__spec__ = ModuleSpec("pretrain.__main__", None)
    try:
        yield
    finally:
        main.__spec__ = before


def _begin(_: int) -> None:
    """What a worker does first."""
    torch.set_num_threads(1)
    for number in _FOR_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _but_for_a_trainer_that_has_gone
    Thread(target=_end_with_trainer, daemon=True).start()


def _but_for_a_trainer_that_has_gone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Python's own hook, which multiprocessing calls in the thread that hands over what batches lie in: the trainer may
    end while it takes it."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


@atexit.register
def _kill_started() -> None:
    """multiprocessing sends SIGTERM to what still runs, such as the workers of a loader that an error holds, and waits
    for its end. This comes before, as what is registered last is called first."""
    left = [worker for worker in _started if worker.is_alive()]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would call it a fault
    for worker in left:
        worker.kill()


os.register_at_fork(after_in_child=_started.clear)


def _end_with_trainer() -> None:
    """torch's own workers look whether their parent still lives, which here is the server."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)
