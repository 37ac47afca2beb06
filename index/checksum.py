"""Derived files carry a checksum in their names and come into being whole: written elsewhere, then renamed."""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PIECE = 64 << 20
SCRATCH = ".scratch-"


def checksum(content: Any) -> str:
    """16 hexadecimal digits of anything that has bytes, such as a file mapped into memory.

    BLAKE2b; of more than 64 MiB, of the digests of pieces of 64 MiB, which all cores compute.
    """
    view = memoryview(content).cast("B")
    if len(view) <= PIECE:
        return _digest(view).hex()
    pieces = [view[start : start + PIECE] for start in range(0, len(view), PIECE)]
    with ThreadPoolExecutor() as pool:
        return _digest(b"".join(pool.map(_digest, pieces))).hex()


def _digest(content: Any) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def scratch_name(name: str) -> str:
    """The name of a file that is being written, which no other thread or process uses."""
    return f"{SCRATCH}{name}.{os.getpid()}.{threading.get_ident()}"


def remove_scratch(folder: Path) -> None:
    """Remove what killed processes left half written. The caller holds the lock.

    A reader may write too (its snapshot); what belongs to a living process is left alone.
    """
    for path in folder.glob(f"{SCRATCH}*"):
        if not _alive(int(path.name.split(".")[-2])):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
