"""Shards that are written whole or not at all."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

Member = tuple[str, bytes]  # name and content


def write_whole_shard(path: Path, members: Iterable[Member]) -> None:
    """Write a .tar that gets its name when it is complete; whatever stops this leaves nothing behind."""
    scratch = path.with_suffix(".tmp")
    try:
        with tarfile.open(scratch, "w") as shard:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
