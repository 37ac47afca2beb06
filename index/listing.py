"""Listing sources by several processes, because a GPU embeds pictures as quickly as one process lists them."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path

from cots.data.samples import Entry, Sample, each_once, entries, holds_many, samples_of
from cots.errors import MediaError
from index.interrupts import end_with_parent, interrupts_blocked

FILES = 256  # of a job
FEWEST_JOBS = 8  # fewer are done sooner than processes are there
AHEAD = 4  # jobs for each process

Job = list[Entry]
Listed = tuple[list[Sample], list[tuple[str, str]]]  # samples, and paths and reasons of errors


def list_samples(
    sources: Sequence[str | Path], on_error: Callable[[MediaError], None], processes: int
) -> Iterator[Sample]:
    """As `cots.data.samples.iter_samples`, by several processes if there is much to list.

    Raises:
        SourceError: as there, but during iteration.
    """
    return each_once(_listed(_jobs(entries(sources, on_error)), on_error, processes))


def _jobs(found: Iterable[Entry]) -> Iterator[Job]:
    """Plain files many at once; a shard or a table, which holds many samples, alone."""
    files: Job = []
    for entry in found:
        if holds_many(entry):
            yield files
            yield [entry]
            files = []
            continue
        files.append(entry)
        if len(files) == FILES:
            yield files
            files = []
    yield files


def _listed(jobs: Iterator[Job], on_error: Callable[[MediaError], None], processes: int) -> Iterator[Sample]:
    jobs = (job for job in jobs if job)
    first = list(islice(jobs, FEWEST_JOBS))
    if processes == 1 or len(first) < FEWEST_JOBS:
        yield from (sample for job in chain(first, jobs) for entry in job for sample in samples_of(entry, on_error))
        return
    running: deque[tuple[Job, Future[Listed]]] = deque()

    def settle() -> Iterator[Sample]:
        job, future = running.popleft()
        try:
            samples, errors = future.result()
        except BrokenProcessPool:  # one was killed, and with it all are gone
            samples, errors = _list(job)
        for path, reason in errors:
            on_error(MediaError(path, reason))
        yield from samples

    # a pool's processes wait for jobs at a pipe that they hold open themselves, also when this one has been killed
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        for job in chain(first, jobs):
            if len(running) == AHEAD * processes:
                yield from settle()
            running.append((job, _submitted(pool, job)))
        while running:
            yield from settle()


def _submitted(pool: ProcessPoolExecutor, job: Job) -> "Future[Listed]":
    with interrupts_blocked():
        try:
            return pool.submit(_list, job)
        except BrokenProcessPool as error:
            failed: Future[Listed] = Future()
            failed.set_exception(error)
            return failed


def _list(job: Job) -> Listed:
    errors: list[MediaError] = []
    samples = [sample for entry in job for sample in samples_of(entry, errors.append)]
    return samples, [(error.path, error.reason) for error in errors]
