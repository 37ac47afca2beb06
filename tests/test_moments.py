"""Pooling a video's frames into a vector of the whole and one of each window."""

from itertools import pairwise

import numpy as np
import pytest

from cots.data.frame_sampling import MAX_FRAMES
from cots.moments import pool_video


def test_a_moment_is_its_frames_mean_and_its_frame_the_nearest() -> None:
    rng = np.random.default_rng()
    frames = rng.standard_normal((20, 8)).astype(np.float32)
    frames /= np.linalg.norm(frames, axis=1, keepdims=True)
    times = np.arange(20) + 0.5
    vectors, moments = pool_video(frames, times, 20.0)
    assert [(moment.start, moment.end) for moment in moments] == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]
    for index, moment in enumerate(moments):
        inside = frames[4 * index : 4 * index + 4]
        mean = inside.mean(axis=0) / np.linalg.norm(inside.mean(axis=0))
        np.testing.assert_allclose(vectors[1 + index], mean, atol=1e-6)
        assert moment.frame_time == times[4 * index + np.argmax(inside @ mean)]


@pytest.mark.parametrize(("duration", "frames"), [(0.2, 4), (3.0, 4), (5.9, 6), (7200.0, MAX_FRAMES)])
def test_every_moment_has_a_frame(duration: float, frames: int) -> None:
    vectors = np.eye(frames, dtype=np.float32)
    times = (np.arange(frames) + 0.5) * duration / frames
    pooled, moments = pool_video(vectors, times, duration)
    assert len(pooled) == 1 + len(moments)
    assert moments[0].start == 0
    assert moments[-1].end == pytest.approx(duration)
    assert all(before.end == after.start for before, after in pairwise(moments))
    assert all(moment.start <= moment.frame_time <= moment.end for moment in moments)


def test_windows_whose_frames_did_not_decode_are_left_out() -> None:
    _, moments = pool_video(np.eye(6, dtype=np.float32), np.array([0.5, 1.5, 2.5, 9.5, 10.5, 11.5]), 12.0)
    assert [(moment.start, moment.end) for moment in moments] == [(0, 4), (8, 12)]
