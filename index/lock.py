"""Who may write to a gallery: one process at a time, and what becomes of the faults that it meets."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cots.errors import GalleryError
from index.manifest import NAME, Manifest
from index.place import OF_A_DISK, TablePlace

LOCK = ".lock"


@contextmanager
def writing(directory: str | Path) -> Iterator[Path]:
    """Hold the lock of a gallery, whose directory is made if there is none, and give its absolute path.

    The kernel frees the lock when the process ends, however it ends.

    Raises:
        GalleryError: another process holds it, the directory cannot be written to, or, while it is held, its disk or
            the store of the table fails, or the table is found to be damaged.
    """
    directory = Path(directory).expanduser().absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / LOCK).open("a")  # never emptied anew, which would give it another time: see `folder_mark`
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise GalleryError(f"The gallery {directory} cannot be written to ({reason}); choose another place.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise GalleryError(f"Another process is changing the gallery {directory}; wait until it ends.") from error
        try:
            yield directory
        except (RuntimeError, ValueError, OSError) as error:
            fault = _writing_fault(directory, error)
            if fault is None:
                raise
            raise fault from error


def _writing_fault(directory: Path, error: Exception) -> GalleryError | None:
    """A fault of the gallery's disk or of the table's place as a sentence; None for any other error."""
    if isinstance(error, OSError) and error.errno in OF_A_DISK:
        return GalleryError(
            f"The gallery {directory} cannot be written to ({os.strerror(error.errno).lower()}); nothing that it holds "
            "is lost, mend that and run the same command again."
        )
    if not (directory / NAME).is_file():
        return None
    return TablePlace(Manifest.read(directory).table or str(directory)).fault(error)
