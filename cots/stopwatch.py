"""Seconds of work by kind, added up over threads."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class Stopwatch:
    """What several threads spend on each kind of work: two threads that decode for a second make two seconds of it.

    Attributes:
        seconds: by kind.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = Lock()

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Add the time that the body takes, also if it fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[kind] += time.perf_counter() - started
