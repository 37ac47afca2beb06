"""How much memory this process may still take."""

import os
from contextlib import suppress
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that are free or easily freed, within the limit of the container, if any; all memory where none says."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with suppress(OSError, ValueError):  # no limit reads "max"
        limit = int((_GROUP / "memory.max").read_text())
        available = min(available, limit - int((_GROUP / "memory.current").read_text()))
    return max(available, 0)
