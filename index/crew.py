"""Embedding by several workers, wherever they run: what a worker does, and how their results become one stream.

`index.workers` runs them as processes of this machine, `index.cluster` as actors of a Ray cluster. A worker keeps a
model and embeds what it is given as one stream, so that decoding, encoding and sending overlap.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cots.data.samples import Sample
from cots.embed import Embedded, Progress, embed
from cots.errors import MediaError, ModelError
from cots.moments import Moment
from index.ledger import Ledger

if TYPE_CHECKING:
    from cots.model.retrieval_model import RetrievalModel

SEND_RESULTS = 64
SEND_SECONDS = 0.5

Task = list[tuple[int, Sample]]  # samples and their positions


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to know of the model.

    Attributes:
        model: its name; a directory's is absolute.
        fingerprint: what the model that is loaded by this name must have.
        device: a torch device.
        threads: cores that are the worker's; None: its share of what there is.
        batch_size: see `cots.embed.embed`.
        bulk: see `RetrievalModel`.
    """

    model: str
    fingerprint: str
    device: str
    threads: int | None
    batch_size: int | None
    bulk: bool = False

    def load(self) -> "RetrievalModel":
        """Load the model and take no more cores than are the worker's.

        Raises:
            ModelError: there is none of this name, or another than the coordinating process has.
            MissingDependency: it needs open_clip, which is not installed.
        """
        import torch

        from cots.model.pretrained import load_model

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)
        model = load_model(self.model, self.device, bulk=self.bulk)
        if model.fingerprint != self.fingerprint:
            raise ModelError(
                f"A worker finds another model by the name {self.model} ({model.fingerprint[:8]}) than the one that "
                f"builds the gallery ({self.fingerprint[:8]}); give all of them the same files."
            )
        return model


@dataclass
class Outcomes:
    """Results of some samples, as they travel: a few large things instead of many small ones.

    Attributes:
        done: for each readable sample its position, its moments, content hash, width, height and duration.
        vectors: of each of these, (V, D) float32.
        failed: for each unreadable sample its position, the path in the error, and the reason.
    """

    done: list[tuple[int, tuple[Moment, ...], str, int, int, float | None]] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)
    failed: list[tuple[int, str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.done) + len(self.failed)

    def __getstate__(self) -> tuple:
        joined = np.concatenate(self.vectors) if self.vectors else None
        return self.done, joined, self.failed

    def __setstate__(self, state: tuple) -> None:
        self.done, joined, self.failed = state
        self.vectors = []
        start = 0
        for _, moments, *_ in self.done:
            stop = start + 1 + len(moments)
            self.vectors.append(joined[start:stop])
            start = stop


@dataclass(frozen=True)
class Death:
    """The end of a worker, and what ended it, as "the signal SIGSEGV"."""

    cause: str


class Crew(Protocol):
    """Workers, numbered from 0 to `size` - 1.

    Attributes:
        window: images that a worker may hold unacknowledged.
    """

    size: int
    window: int

    def wait(self) -> Iterable[tuple[int, Outcomes | Death]]:
        """What workers have sent, at least one message; the first of each is empty and says that it is ready.

        Raises:
            CotsError: a worker cannot load the model.
        """

    def give(self, worker: int, task: Task) -> None:
        """Hand a worker samples; one that has died meanwhile is not told of here."""

    def replace(self, worker: int) -> None:
        """Start another worker in the place of one that died."""

    def close(self) -> None:
        """End all workers at once."""


def work(inbox: "SimpleQueue[Task]", model: "RetrievalModel", recipe: Recipe, send: Callable[[Outcomes], None]) -> None:
    """A worker's life: embed what comes and send what becomes of it.

    What comes in time is one stream; a stream ends when the inbox is empty, so that nobody waits for a batch to fill.
    """
    while True:
        _work_off(inbox.get(), inbox, model, recipe, send)


def _work_off(
    task: Task,
    inbox: "SimpleQueue[Task]",
    model: "RetrievalModel",
    recipe: Recipe,
    send: Callable[[Outcomes], None],
) -> None:
    positions: dict[str, int] = {}
    outcomes = Outcomes()
    sent = time.monotonic()

    def samples() -> Iterator[Sample]:
        following: Task = task
        while True:
            for position, sample in following:
                positions[sample.path] = position
                yield sample
            try:
                following = inbox.get_nowait()
            except Empty:
                return

    def send_when_due() -> None:
        nonlocal outcomes, sent
        if len(outcomes) >= SEND_RESULTS or time.monotonic() - sent > SEND_SECONDS:
            send(outcomes)
            outcomes, sent = Outcomes(), time.monotonic()

    def failed(error: MediaError) -> None:
        outcomes.failed.append((positions.pop(error.path), error.path, error.reason))
        send_when_due()

    results = embed(samples(), model, on_error=failed, batch_size=recipe.batch_size, workers=recipe.threads)
    for result in results:
        facts = (result.moments, result.content_hash, result.width, result.height, result.duration)
        outcomes.done.append((positions.pop(result.sample.path), *facts))
        outcomes.vectors.append(result.vectors)
        send_when_due()
    if outcomes:
        send(outcomes)


def embed_with(
    crew: Crew,
    samples: Sequence[Sample],
    *,
    on_error: Callable[[MediaError], None],
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[Embedded]:
    """As `cots.embed.embed`, by a crew, and in the order in which results come. The crew ends with it.

    A sample that kills its worker twice is unreadable, and the run goes on.

    Raises:
        CotsError: workers cannot load the model, or die whatever they are given.
    """
    ledger = Ledger(samples, crew.size, crew.window)
    ready: set[int] = set()
    started = time.perf_counter()
    done = failed = 0

    def tell() -> None:
        if progress is not None:
            progress(Progress(done, failed, len(samples), time.perf_counter() - started))

    def fail(error: MediaError) -> None:
        nonlocal failed
        failed += 1
        on_error(error)
        tell()

    with closing(crew):
        while not ledger.finished:
            for worker, event in crew.wait():
                if isinstance(event, Death):
                    ready.discard(worker)
                    condemned = ledger.bury(worker, event.cause)
                    if condemned is not None:
                        reason = f"whoever reads it crashes, each time (by {event.cause})"
                        fail(MediaError(samples[condemned].path, reason))
                    if not ledger.finished:
                        crew.replace(worker)
                    continue
                if not ready:
                    started = time.perf_counter()
                ready.add(worker)
                for position, path, reason in event.failed:
                    if ledger.settle(worker, position):
                        fail(MediaError(path, reason))
                for (position, moments, content, width, height, duration), vectors in zip(event.done, event.vectors):
                    if ledger.settle(worker, position):
                        done += 1
                        yield Embedded(samples[position], vectors, moments, content, width, height, duration)
                        tell()
            for worker in ready:
                positions = ledger.take(worker)
                if positions:
                    crew.give(worker, [(position, samples[position]) for position in positions])
