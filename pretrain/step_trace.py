"""A trace of a few steps: which kernel ran when, and what waited for what."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

STEPS = 3
FILE = "trace.json.gz"


class StepTrace:
    """Traces `STEPS` steps of a run into `FILE` in its directory, for ui.perfetto.dev or chrome://tracing; fewer, if
    the run ends before.

    Args:
        first: the step that is traced first, counted from 1; 0: none.
        say: told where the trace is.
    """

    def __init__(self, directory: Path, first: int, device: torch.device, say: Callable[[str], None]) -> None:
        self._path, self._first, self._say = directory / FILE, first, say
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None
        self._traced = 0

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finish()

    def before(self, step: int) -> None:
        """To be called before a step is taken."""
        if self._first and step == self._first:
            self._profile = profile(activities=self._activities)
            self._profile.start()

    def after(self) -> None:
        """To be called after a step was taken."""
        if self._profile is not None:
            self._traced += 1
            if self._traced == STEPS:
                self._finish()

    def _finish(self) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
        self._say(f"A trace of {self._traced} {'step' if self._traced == 1 else 'steps'} is in {self._path}.")
