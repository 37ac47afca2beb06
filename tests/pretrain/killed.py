"""Trainings that are killed without warning, between two steps and while a checkpoint is being written."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # another number of threads adds in another order
_CUT_OFF = """
import io, os, signal, sys, torch

def half_of(state, file, save=torch.save):
    whole = io.BytesIO()
    save(state, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = half_of
from pretrain.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def rows(run: Path) -> list[dict]:
    """The training rows of a run's log that are whole."""
    log = run / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [row for row in map(json.loads, lines) if "loss" in row]


def first_steps(run: Path) -> list[int]:
    """How many steps lay behind each start of a run."""
    return [start["first_step"] for start in json.loads((run / "run.json").read_text())["starts"]]


def kill_at(step: int, run: Path, command: Sequence[str], delay: float = 0.0) -> None:
    """Start a training and kill it so many seconds after it has logged `step` or a later one."""
    before = len(rows(run))
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
    while not any(row["step"] >= step for row in rows(run)[before:]):
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert_unfinished(run)


def kill_in_a_checkpoint(run: Path, arguments: Sequence[str]) -> None:
    """Start a training that is killed when half of its first checkpoint is written."""
    process = subprocess.Popen([sys.executable, "-c", _CUT_OFF, *arguments], cwd=ROOT, env=ENVIRONMENT)
    assert process.wait() == -signal.SIGKILL
    assert list((run / "checkpoints").glob("step-*.tmp"))
    assert_unfinished(run)


def assert_unfinished(run: Path) -> None:
    steps = json.loads((run / "run.json").read_text())["starts"][-1]["steps"]
    assert not (run / "checkpoints" / f"step-{steps:08d}.pt").exists()
