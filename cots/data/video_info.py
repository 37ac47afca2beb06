"""What is known of a video before its frames are decoded."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video.

    Attributes:
        duration: seconds, from the first frame's start to the last frame's end.
        fps: mean frames per second.
        width, height: of the picture as shown: rotated, and with square pixels.
        frames: how many there are.
    """

    duration: float
    fps: float
    width: int
    height: int
    frames: int


def shown_size(info: VideoInfo, short_side: int | None) -> tuple[int, int]:
    """(width, height) to decode to: the short side at most `short_side`, proportions kept, never enlarged."""
    shortest = min(info.width, info.height)
    if short_side is None or shortest <= short_side:
        return info.width, info.height
    scale = short_side / shortest
    return max(1, round(info.width * scale)), max(1, round(info.height * scale))


def end_of_last(starts: np.ndarray, last_duration: float | None) -> float:
    """The end of the last frame: its own duration if the file states one, else the usual gap between frames.

    Args:
        starts: (N,) float64, ascending seconds, N >= 1.
        last_duration: seconds, or None.
    """
    if last_duration:
        return float(starts[-1] + last_duration)
    gap = float(np.median(np.diff(starts))) if len(starts) > 1 else 0.0
    return float(starts[-1] + gap)
