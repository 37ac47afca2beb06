"""Moments: a video's frame vectors become one vector for the whole and one for each window of a few seconds."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MOMENT_SECONDS = 4.0


@dataclass(frozen=True)
class Moment:
    """A window of a video, in seconds; `frame_time` is the frame nearest to the window's vector."""

    start: float
    end: float
    frame_time: float


def unit_mean(vectors: np.ndarray) -> np.ndarray:
    """(F, D) unit vectors -> (D,): their mean, made unit again."""
    mean = vectors.mean(axis=0)
    return mean / np.linalg.norm(mean)


def pool_video(
    frames: np.ndarray, times: np.ndarray, duration: float, pool: Callable[[np.ndarray], np.ndarray] = unit_mean
) -> tuple[np.ndarray, tuple[Moment, ...]]:
    """Pool a video's frames.

    Args:
        frames: (F, D) float32, unit norm.
        times: (F,) seconds.
        duration: seconds.
        pool: (F, D) frames in their order -> (D,) unit norm; `RetrievalModel.pool_frames` of the model that made them.

    Returns:
        vectors (1 + M, D) float32, unit norm, and the M moments of vectors[1:]: equal windows of about MOMENT_SECONDS,
        each with at least a frame.
    """
    count = min(max(round(duration / MOMENT_SECONDS), 1), len(frames))
    edges = np.linspace(0.0, duration, count + 1)
    window = np.clip(np.searchsorted(edges, times, side="right") - 1, 0, count - 1)
    vectors = [pool(frames)]
    moments: list[Moment] = []
    for index in np.unique(window):
        inside = np.flatnonzero(window == index)
        vector = pool(frames[inside])
        nearest = inside[np.argmax(frames[inside] @ vector)]
        vectors.append(vector)
        moments.append(Moment(float(edges[index]), float(edges[index + 1]), float(times[nearest])))
    return np.stack(vectors), tuple(moments)
