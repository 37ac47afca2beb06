"""Workers as processes of this machine: one a GPU, or the cores of a CPU shared out among them.

A process is more than a thread here: a decoder that crashes takes only its process with it. Each has a pipe of its own,
because a process that is killed while it holds a lock that others share would stop them all.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from cots.embed import cores
from cots.errors import CotsError
from index.crew import Death, Outcomes, Recipe, Task, work
from index.interrupts import interrupts_blocked

CPU_WINDOW = 128
GPU_WINDOW = 4096
THREAD_WINDOW = 16
_GONE = (BrokenPipeError, ConnectionResetError)  # what sending to a process that has ended raises


class ProcessCrew:
    """Spawned processes, each with a model.

    Args:
        size: how many.
        recipe: of the model; device "cuda" stands for all GPUs that this process sees, in turn.
    """

    def __init__(self, size: int, recipe: Recipe) -> None:
        self.size = size
        gpus = torch.cuda.device_count() if recipe.device == "cuda" else 0
        threads = recipe.threads or max(cores() // size, 1)
        self.window = window(threads, on_gpu=recipe.device.startswith("cuda"))
        devices = [f"cuda:{worker % gpus}" if gpus else recipe.device for worker in range(size)]
        self._recipes = [replace(recipe, device=device, threads=threads) for device in devices]
        self._spawning = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, tuple[int, Any]] = {}
        self._connections: dict[int, Connection] = {}
        for worker in range(size):
            self.replace(worker)

    def replace(self, worker: int) -> None:
        ours, theirs = self._spawning.Pipe()
        process = self._spawning.Process(target=_serve, args=(theirs, self._recipes[worker]), daemon=True)
        with interrupts_blocked():
            process.start()
        theirs.close()
        self._processes[ours] = (worker, process)
        self._connections[worker] = ours

    def give(self, worker: int, task: Task) -> None:
        with suppress(*_GONE):
            self._connections[worker].send(task)

    def wait(self) -> Iterator[tuple[int, Outcomes | Death]]:
        for connection in wait(list(self._processes)):
            assert isinstance(connection, Connection)
            worker, process = self._processes[connection]
            try:
                message = connection.recv()
            except (EOFError, OSError):  # all that it had sent has been read
                del self._processes[connection]
                connection.close()
                process.join()
                yield worker, Death(_cause(process.exitcode))
                continue
            if isinstance(message, CotsError):
                raise message
            yield worker, message

    def close(self) -> None:
        for _, process in self._processes.values():
            process.kill()
        for connection, (_, process) in self._processes.items():
            process.join()
            connection.close()
        self._processes.clear()


def window(threads: int, on_gpu: bool) -> int:
    """Images that a worker of so many threads is given ahead: twice what its own pipeline holds."""
    return (GPU_WINDOW if on_gpu else CPU_WINDOW) + THREAD_WINDOW * threads


def _serve(connection: Connection, recipe: Recipe) -> None:
    """What a process runs; it ends when the coordinating process does."""
    inbox: SimpleQueue[Task] = SimpleQueue()
    Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    try:
        model = recipe.load()
    except CotsError as error:
        with suppress(*_GONE):
            connection.send(error)
        return
    with suppress(*_GONE):
        connection.send(Outcomes())
        work(inbox, model, recipe, connection.send)


def _receive(connection: Connection, inbox: "SimpleQueue[Task]") -> None:
    """Always read what comes, so that neither side waits for the other to read first."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)


def _cause(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"the signal {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
