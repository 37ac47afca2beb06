"""Frames through decord, the faster decoder for the common containers."""

import io
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

# decord reports no failure of its own for a frame that it cannot seek to and gives a neighbour instead; with these
# containers its frames were the same as FFmpeg's, with MPEG-TS they were not.
_CONTAINERS = ("mov", "matroska", "avi")
_CHUNK = 16  # frames decoded at once, which bounds the memory for full-size frames


def reads(container: str) -> bool:
    """Whether decord is installed and can be trusted with FFmpeg's format of this name."""
    return container.split(",")[0] in _CONTAINERS and find_spec("decord") is not None


def decode(
    source: str | Path | bytes, indices: Sequence[int], size: tuple[int, int], frames: int, threads: int
) -> Iterator[tuple[int, Image.Image]]:
    """The frames of ascending `indices`, rotated upright and scaled to (width, height).

    Args:
        frames: how many frames the file holds by its packets.

    Raises:
        RuntimeError: decord cannot read the file, counts its frames differently, or had to stand a neighbour in for a
            frame.
    """
    os.environ.setdefault("DECORD_DUPLICATE_WARNING_THRESHOLD", "1.0")  # such frames are an error here, below
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(
        io.BytesIO(source) if isinstance(source, bytes) else str(source),
        width=size[0],
        height=size[1],
        num_threads=threads,
        fault_tol=1e-9,
    )
    if len(reader) != frames:
        raise RuntimeError(f"decord counts {len(reader)} frames, FFmpeg's packets are {frames}")
    for start in range(0, len(indices), _CHUNK):
        chunk = list(indices[start : start + _CHUNK])
        for index, pixels in zip(chunk, reader.get_batch(chunk).asnumpy(), strict=True):
            yield index, Image.fromarray(pixels)
