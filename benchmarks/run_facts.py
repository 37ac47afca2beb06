"""What a result needs so that it can be had again: the command, the date, the machine and the versions.

Every script that writes a file puts `run_facts()` into it: into the document, or as "run" into each row of a .jsonl.
"""

import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shlex import join
from typing import Any

PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "pillow", "faiss-cpu", "faiss-gpu", "lancedb", "pyarrow", "triton",
    "open_clip_torch", "torchcodec", "decord2", "av",
)  # fmt: skip
ROOT = Path(__file__).parents[1]
# An absolute path, or one from the home folder or the folder above, at the beginning of an argument or within one
# (`key=/a/b`, `[{path: '/a/*.tar'}]`, `open_clip:NAME//a/b`), but not the rest of s3://bucket.
_PATH = re.compile(r"""(?:^|(?<=[\s='",(\[{:])|(?<=[^:/]/))(?:~|\.\.)?/(?!/)[^\s'",)\]}:]*""")


def shortened(argument: str, folder: Path) -> str:
    """An argument without a machine's own paths: those under `folder` are told from there, others by their end."""

    def tell(path: str) -> str:
        path = os.path.normpath(path)
        if path == str(folder):
            return "."
        return path.removeprefix(f"{folder}/") if path.startswith(f"{folder}/") else os.path.basename(path)

    if argument.startswith("/"):  # also with spaces in it
        return tell(argument)
    return _PATH.sub(lambda match: tell(match[0]), argument)


def command(arguments: Sequence[str] | None = None) -> str:
    """The command line as it was typed, in a shell's quotes; the script is told from the repository's folder.

    Args:
        arguments: instead of those of this process (`sys.argv`).
    """
    script, *typed = sys.argv if arguments is None else arguments
    launcher, threads = "python", os.environ.get("OMP_NUM_THREADS")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # which sets OMP_NUM_THREADS itself
        launcher, threads = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}", None
    told = [shortened(os.path.abspath(script), ROOT), *(shortened(each, Path.cwd()) for each in typed)]
    return f"{f'OMP_NUM_THREADS={threads} ' if threads else ''}{launcher} {join(told)}"


def run_facts(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """command, date, cpu ("2 cores, AMD EPYC"), gpu (empty if there is none), python, versions, and the load at the
    beginning, if asked for then. `arguments` as `command`."""
    return {
        "command": command(arguments),
        "date": date.today().isoformat(),
        "cpu": f"{_cores()} cores, {_cpu()}",
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name))),
        "load": round(os.getloadavg()[0], 1),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def _gpu() -> str:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"{f'{count} x ' if count > 1 else ''}{torch.cuda.get_device_name()}" if count else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
