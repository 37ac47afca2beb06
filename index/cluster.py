"""Workers as actors of a Ray cluster: one a GPU, or one a node where there are none.

    cots index build /shared/photos --gallery /shared/gallery --cluster auto

The actors read the files themselves, so the paths must mean the same on every node (a shared file system). They send
vectors, which are small; the process that called is the only one that writes the table, so that ids are unique and an
item's rows appear in one commit, whichever worker dies when.

Plain actors and not Ray Data's `map_batches`: that gives a block to an actor again for ever if it kills the actor, can
only drop whole blocks, and says of a block that it is done, where a build must know it of each sample.
"""

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Thread
from typing import Any

from cots.data.shards import split_member
from cots.errors import CotsError, MissingDependency, SourceError
from index.crew import Death, Outcomes, Recipe, Task, work
from index.workers import window


@dataclass(frozen=True)
class Node:
    """What a node of the cluster offers."""

    cpus: int
    gpus: int


class RayCrew:
    """Actors, each with a model, spread over a cluster.

    Args:
        ray: the module, connected to a cluster; see `connection`.
        size: how many; None: one a GPU, or one a node.
        most: as many are of use.
        recipe: of the model; its device and threads are set by what the cluster has.

    Raises:
        CotsError: the cluster is too small.
    """

    def __init__(self, ray: Any, size: int | None, most: int, recipe: Recipe) -> None:
        self._ray = ray
        nodes = nodes_of(ray)
        gpus = sum(node.gpus for node in nodes)
        self.size = min(size or gpus or len(nodes), most)
        threads = cores_each(nodes, self.size)
        self._recipe = replace(recipe, device="cuda:0" if gpus else "cpu", threads=threads)
        self.window = window(threads, on_gpu=gpus > 0)
        self._actor_class = self._ray.remote(EmbeddingActor).options(
            num_cpus=threads, num_gpus=int(gpus > 0), max_concurrency=2, max_restarts=0, scheduling_strategy="SPREAD"
        )
        self._actors: dict[int, Any] = {}
        self._awaited: dict[Any, int] = {}
        for worker in range(self.size):
            self.replace(worker)

    def replace(self, worker: int) -> None:
        self._actors[worker] = self._actor_class.remote(self._recipe)
        self._await(worker)

    def give(self, worker: int, task: Task) -> None:
        self._actors[worker].put.remote(task)

    def wait(self) -> Iterator[tuple[int, Outcomes | Death]]:
        ready, _ = self._ray.wait(list(self._awaited), num_returns=1)
        more, _ = self._ray.wait(list(self._awaited), num_returns=len(self._awaited), timeout=0)
        for reference in {*ready, *more}:
            worker = self._awaited.pop(reference)
            try:
                message, missing, node = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                with suppress(self._ray.exceptions.RayError):  # it may live on behind a broken connection
                    self._ray.kill(self._actors[worker])
                yield worker, Death(_cause(error))
                continue
            if isinstance(message, CotsError):
                raise type(message)(f"On the node {node}: {message}") from message
            for path in missing:
                if os.path.exists(_file(path)):
                    raise SourceError(
                        f"The node {node} has no file {path}, which is there on this machine; put the sources where "
                        "all nodes find them by the same path."
                    )
            self._await(worker)
            yield worker, message

    def close(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)

    def _await(self, worker: int) -> None:
        self._awaited[self._actors[worker].get.remote()] = worker


class EmbeddingActor:
    """What runs on a node: a thread embeds, while one call brings samples and another waits for results."""

    def __init__(self, recipe: Recipe) -> None:
        import ray

        self._node = ray.util.get_node_ip_address()
        self._inbox: SimpleQueue[Task] = SimpleQueue()
        self._outbox: SimpleQueue[Outcomes | CotsError] = SimpleQueue()
        Thread(target=self._run, args=(recipe,), daemon=True).start()

    def put(self, task: Task) -> None:
        self._inbox.put(task)

    def get(self) -> tuple[Outcomes | CotsError, list[str], str]:
        """Results, or what the user has to mend; which of the unreadable files are not there; and the node."""
        message = self._outbox.get()
        failed = message.failed if isinstance(message, Outcomes) else []
        return message, [path for _, path, _ in failed if not os.path.exists(_file(path))], self._node

    def _run(self, recipe: Recipe) -> None:
        try:
            model = recipe.load()
            self._outbox.put(Outcomes())
            work(self._inbox, model, recipe, self._outbox.put)
        except CotsError as error:
            self._outbox.put(error)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


def cores_each(nodes: Sequence[Node], workers: int) -> int:
    """The most cores that each of so many workers can have; where there are GPUs, a worker needs one besides.

    Raises:
        CotsError: they do not fit.
    """
    gpus = any(node.gpus for node in nodes)

    def fitting(cores: int) -> int:
        return sum(min(node.cpus // cores, node.gpus if gpus else node.cpus) for node in nodes)

    for cores in range(max((node.cpus for node in nodes), default=0), 0, -1):
        if fitting(cores) >= workers:
            return cores
    have = f"{sum(node.gpus for node in nodes)} GPUs" if gpus else f"{sum(node.cpus for node in nodes)} cores"
    raise CotsError(f"The Ray cluster has {have}, too few for {workers} workers; ask for fewer with --workers.")


@contextmanager
def connection(address: str) -> Iterator[Any]:
    """Ray's module, connected to a cluster until the body ends; a connection that the process has already is used.

    Args:
        address: of the cluster, or "auto" for the one that this machine belongs to.

    Raises:
        MissingDependency: Ray is not installed.
        CotsError: there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingDependency("ray", "pip install 'cots[cluster]'") from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CotsError(
            f"There is no Ray cluster at {address!r} ({reason}); start one (`ray start --head`) or give its address."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def nodes_of(ray: Any) -> list[Node]:
    """The cluster's nodes that can compute."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [Node(int(offer.get("CPU", 0)), int(offer.get("GPU", 0))) for offer in resources]
    return [node for node in nodes if node.cpus]


def _file(path: str) -> str:
    """The file in which a sample lies."""
    return path if os.path.exists(path) else split_member(path)[0]


def _cause(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}, {lines[-1]}" if lines else type(error).__name__
