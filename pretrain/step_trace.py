"""A trace of a few steps: which kernel ran when, and what waited for what."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

STEPS = 3
FILE = "trace.json.gz"


class StepTrace:
    """Traces `STEPS` steps of a run into `FILE` in its directory, for ui.perfetto.dev or chrome://tracing.

    Args:
        first: the step that is traced first, counted from 1; 0: none.
    """

    def __init__(self, directory: Path, first: int, device: torch.device) -> None:
        self._path, self._first = directory / FILE, first
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """To be called before a step is taken."""
        if self._first and step == self._first:
            self._profile = profile(activities=self._activities)
            self._profile.start()

    def after(self, step: int) -> Path | None:
        """To be called after a step was taken; returns the file once it is written."""
        if self._profile is None or step < self._first + STEPS - 1:
            return None
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
        return self._path
