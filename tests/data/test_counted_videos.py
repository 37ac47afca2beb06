"""Videos that store no times: their frames are counted, and so are those that do not decode."""

import re
from pathlib import Path

import pytest
from synthetic_media import number_of, write_video

from cots.data.video_io import read_frames

pytest.importorskip("av")

RATE = 25  # what FFmpeg takes the frames a second for


def pictures(content: bytes, threads: int) -> dict[int, int]:
    """The number that each frame shows, by the frame asked for."""
    frames = read_frames(content, times=[(place + 0.5) / RATE for place in range(40)], threads=threads)
    return {int(time * RATE): number_of(image) for time, image in zip(frames.times, frames.images, strict=True)}


def damaged(content: bytes, packet: int, offset: int) -> bytes:
    """With ones for all bits of a packet's picture from `offset` on."""
    starts = [found.start() for found in re.finditer(b"\0\0\1", content) if content[found.end()] & 31 in (1, 5)]
    assert len(starts) == 40
    start, end = starts[packet] + offset, starts[packet + 1] - 1
    return content[:start] + b"\xff" * (end - start) + content[end:]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("b_frames", [True, False])
def test_frames_behind_damage_keep_their_places(b_frames: bool, threads: int, tmp_path: Path) -> None:
    content = write_video(tmp_path / "a.h264", b_frames=b_frames).read_bytes()
    assert pictures(content, threads) == {place: place for place in range(40)}
    for packet in (4, 12, 13, 30):
        for offset in (4, 6):  # the picture's header too, or the rest only
            found = pictures(damaged(content, packet, offset), threads)
            keyframe = packet // 12 * 12 + 12
            assert [found[place] for place in range(keyframe, 40)] == list(range(keyframe, 40))
            assert len(found) < 40


@pytest.mark.parametrize(("b_frames", "packet"), [(True, 12), (False, 5), (False, 12), (False, 30)])
def test_the_frame_that_does_not_decode_is_the_one_left_out(b_frames: bool, packet: int, tmp_path: Path) -> None:
    content = write_video(tmp_path / "a.h264", b_frames=b_frames).read_bytes()
    assert set(range(40)) - set(pictures(damaged(content, packet, 6), 1)) == {packet}
