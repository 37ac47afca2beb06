"""Videos: the pictures on screen at chosen times.

    frames = read_frames("clip.mp4", count=8, short_side=256)
    frames.images[0], frames.times[0]

decord decodes what it reads reliably, PyAV everything else and whatever decord fails on, Pillow animated GIF, WebP and
PNG. All three see the same timeline, built from the packets' own times, so variable frame rates need no care. A frame
that does not decode is left out: no other frame and no blank one stands in for it.
"""

import io
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from cots.data import decord_video
from cots.data.animation import Animation, is_animation
from cots.data.image_io import os_reason
from cots.data.media_kind import HEADER_BYTES, sniff
from cots.data.pyav_video import PyAVVideo
from cots.data.video_info import VideoInfo, shown_size
from cots.errors import MediaError

__all__ = ["Frames", "VideoInfo", "probe", "read_frames", "sample_times"]

MAX_FRAME_PIXELS = 40_000_000  # 8K video has 33 million; a decoder holds up to 16 frames


@dataclass
class Frames:
    """Pictures of a video.

    Attributes:
        images: RGB, upright.
        times: seconds from the start, ascending unless asked otherwise; images[i] is what is on screen at times[i].
        duration: seconds.
        info: size and frame rate of the whole video.
    """

    images: list[Image.Image]
    times: list[float]
    duration: float
    info: VideoInfo


def read_frames(
    path: str | Path | bytes,
    times: Sequence[float] | np.ndarray | None = None,
    count: int | None = None,
    interval: float | None = None,
    max_frames: int = 600,
    *,
    shares: Sequence[float] | None = None,
    min_frames: int = 1,
    short_side: int | None = None,
    name: str = "",
    threads: int = 1,
    max_pixels: int = MAX_FRAME_PIXELS,
    heed: Callable[[], None] = lambda: None,
) -> Frames:
    """Decode the frames at some times of a video. Exactly one of `times`, `count`, `interval` and `shares` is given.

    Args:
        path: a file, or its bytes.
        times: seconds; those outside the video mean its first or last frame.
        count: so many, at the centres of equal segments.
        interval: one every so many seconds, at the centres of segments of that length; never fewer than `min_frames`
            nor more than `max_frames` (then at the centres of that many equal segments).
        shares: times as shares of the duration, in [0, 1].
        short_side: scale each frame down so that its shorter side has this many pixels; smaller videos stay as they
            are.
        name: what errors call the video; the path when empty.
        threads: decoding threads.
        max_pixels: the largest width x height of a frame that is accepted.
        heed: called again and again meanwhile, for a film takes minutes; may raise to break off.

    Returns:
        At least one frame. Frames that do not decode are missing from both lists.

    Raises:
        MediaError: missing, empty, sound only, not a video, frames too large, or none of the frames asked for decodes.
        MissingDependency: PyAV is not installed.
        ValueError: not exactly one of the four, or one that is not positive.
    """
    if sum(choice is not None for choice in (times, count, interval, shares)) != 1:
        raise ValueError("give exactly one of times, count, interval and shares")
    name = name or _name(path)
    with closing(_open(path, name, threads, max_pixels, heed)) as video:
        duration = video.info.duration
        if shares is not None:
            times = np.asarray(shares, np.float64) * duration
        asked = _asked(duration, times, count, interval, min_frames, max_frames)
        wanted = np.clip(np.searchsorted(video.starts, asked + 1e-6, side="right") - 1, 0, None)
        indices = sorted(set(wanted.tolist()))
        pictures = _decode(video, path, indices, shown_size(video.info, short_side), threads, heed)
        if not pictures:
            raise MediaError(name, f"none of the {len(indices)} frames asked for can be decoded")
        kept = [(time, pictures[index]) for time, index in zip(asked.tolist(), wanted.tolist()) if index in pictures]
        return Frames([picture for _, picture in kept], [time for time, _ in kept], duration, video.info)


def probe(path: str | Path | bytes, *, name: str = "", max_pixels: int = MAX_FRAME_PIXELS) -> VideoInfo:
    """Duration, frame rate, size and number of frames, after decoding one of them.

    Raises:
        MediaError, MissingDependency: as for `read_frames`.
    """
    with closing(_open(path, name or _name(path), 1, max_pixels)) as video:
        return video.info


def sample_times(duration: float, interval: float, min_frames: int = 1, max_frames: int = 600) -> np.ndarray:
    """(N,) seconds: the centres of segments of `interval` seconds, N within the bounds (else of N equal segments)."""
    count = max(1, int(duration / interval + 0.5))
    if min_frames <= count <= max_frames:
        return (np.arange(count) + 0.5) * interval if count > 1 else np.array([min(interval, duration) / 2])
    return uniform_times(duration, min(max(count, min_frames), max_frames))


def uniform_times(duration: float, count: int) -> np.ndarray:
    """(count,) seconds: the centres of `count` equal segments."""
    return (np.arange(count) + 0.5) * (duration / count)


def _asked(
    duration: float,
    times: Sequence[float] | np.ndarray | None,
    count: int | None,
    interval: float | None,
    min_frames: int,
    max_frames: int,
) -> np.ndarray:
    if times is not None:
        return np.clip(np.asarray(times, np.float64), 0.0, duration)
    if count is not None:
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        return uniform_times(duration, count)
    assert interval is not None  # exactly one is given
    if interval <= 0:
        raise ValueError(f"interval must be more than 0 seconds, not {interval}")
    return sample_times(duration, interval, min_frames, max_frames)


def _decode(
    video: Animation | PyAVVideo,
    source: str | Path | bytes,
    indices: list[int],
    size: tuple[int, int],
    threads: int,
    heed: Callable[[], None],
) -> dict[int, Image.Image]:
    if isinstance(video, PyAVVideo) and video.intact and not video.mirrored and decord_video.reads(video.container):
        try:
            pictures = dict(decord_video.decode(source, indices, size, video.info.frames, threads, heed))
        except Exception:  # decord raises its own error types, and PyAV reads or names what it cannot, or heeds again
            return dict(video.decode(indices, size))
        # Where a frame does not decode, decord silently repeats a neighbour; so does a still scene: PyAV decides.
        repeated = [b for a, b in pairwise(indices) if pictures[a].tobytes() == pictures[b].tobytes()]
        for index in repeated:
            del pictures[index]
        return pictures | dict(video.decode(repeated, size))
    return dict(video.decode(indices, size))


def _open(
    source: str | Path | bytes, name: str, threads: int, max_pixels: int, heed: Callable[[], None] = lambda: None
) -> Animation | PyAVVideo:
    header = source[:HEADER_BYTES] if isinstance(source, bytes) else _header(source, name)
    if not header:
        raise MediaError(name, "the file is empty (0 bytes)")
    if is_animation(header):
        return Animation(source, name, max_pixels)
    # FFmpeg would also follow playlists, which name other files and addresses.
    kind = sniff(header, "", io.BytesIO)
    if kind != "video":
        what = "a still image, not a video" if kind else "not a video in a format that is known here"
        raise MediaError(name, what)
    return PyAVVideo(source, name, max_pixels, threads, heed)


def _header(path: str | Path, name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(HEADER_BYTES)
    except OSError as error:
        raise MediaError(name, os_reason(error)) from error


def _name(source: str | Path | bytes) -> str:
    return "video" if isinstance(source, bytes) else str(source)
