"""Frames through decord, the faster decoder for the common containers."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

# Outside these, decord 3.4 gives wrong frames (MPEG-TS) or crashes the process on a truncated file (AVI).
_CONTAINERS = ("mov", "matroska")
_CHUNK = 16  # frames decoded at once, which bounds the memory for full-size frames


def reads(container: str) -> bool:
    """Whether decord is installed and can be trusted with FFmpeg's format of this name."""
    return container.split(",")[0] in _CONTAINERS and find_spec("decord") is not None


def decode(
    source: str | Path | bytes,
    indices: Sequence[int],
    size: tuple[int, int],
    frames: int,
    threads: int,
    heed: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Image.Image]]:
    """The frames of ascending `indices`, rotated upright and scaled to (width, height).

    Where a frame does not decode, decord gives the nearest that does and says nothing (`fault_tol` changed nothing).

    Args:
        frames: how many frames the file holds by its packets.
        heed: called before each few frames; see `read_frames`.

    Raises:
        RuntimeError: decord cannot read the file, or counts its frames differently.
    """
    os.environ.setdefault("DECORD_DUPLICATE_WARNING_THRESHOLD", "1.0")  # a line on stderr
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(
        io.BytesIO(source) if isinstance(source, bytes) else str(source),
        width=size[0],
        height=size[1],
        num_threads=threads,
    )
    if len(reader) != frames:
        raise RuntimeError(f"decord counts {len(reader)} frames, FFmpeg's packets are {frames}")
    for start in range(0, len(indices), _CHUNK):
        heed()
        chunk = list(indices[start : start + _CHUNK])
        for index, pixels in zip(chunk, reader.get_batch(chunk).asnumpy(), strict=True):
            yield index, Image.fromarray(pixels)
