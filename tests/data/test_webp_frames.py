"""Frames of an animated WebP that stand alone, against Pillow's own walk through the animation."""

import io

import numpy as np
import pytest
from PIL import Image
from synthetic_media import number_of, numbered_frame

from cots.data.video_io import read_frames
from cots.data.webp_frames import standing_frames
from cots.errors import MediaError


def _animation(**options: object) -> bytes:
    frames = [Image.fromarray(numbered_frame(number)) for number in range(6)]
    content = io.BytesIO()
    frames[0].save(
        content, "WEBP", save_all=True, append_images=frames[1:], duration=[100, 200, 50, 50, 300, 5], **options
    )
    return content.getvalue()


def test_standing_frames_are_those_that_pillow_decodes_one_after_another() -> None:
    content = _animation(quality=80, kmax=1)
    standing = standing_frames(content)
    assert standing is not None
    with Image.open(io.BytesIO(content)) as whole:
        for place, (milliseconds, still) in enumerate(standing):
            whole.seek(place)
            expected = np.asarray(whole.convert("RGB")).astype(int)
            assert whole.info["duration"] == milliseconds
            found = np.asarray(Image.open(io.BytesIO(still)).convert("RGB")).astype(int)
            assert np.abs(found - expected).max() <= 1  # two ways from YUV to RGB


def test_a_video_of_standing_frames_has_the_timeline_of_one_without() -> None:
    for options in ({"kmax": 1}, {"kmax": 5}, {"lossless": True}):
        frames = read_frames(_animation(**options), times=[0.05, 0.25, 0.32, 0.37, 0.6, 0.72])
        assert [number_of(picture) for picture in frames.images] == [0, 1, 2, 3, 4, 5]
        assert frames.duration == pytest.approx(0.8)  # five milliseconds are shown for a hundred


@pytest.mark.parametrize("options", [{"lossless": True}, {"kmax": 1000, "kmin": 999, "quality": 50}])
def test_frames_that_build_on_others_or_may_be_transparent_are_left_to_pillow(options: dict) -> None:
    still_scene = numbered_frame(7, 256, 192)
    frames = []
    for place in range(5):
        picture = still_scene.copy()
        picture[4 * place : 4 * place + 8, :8] = 255
        frames.append(Image.fromarray(picture))
    content = io.BytesIO()
    frames[0].save(content, "WEBP", save_all=True, append_images=frames[1:], duration=100, **options)
    assert standing_frames(content.getvalue()) is None
    assert len(read_frames(content.getvalue(), count=5).images) == 5


def test_what_is_cut_off_or_damaged_is_no_frame() -> None:
    content = _animation(kmax=1)
    assert standing_frames(content[:-100]) is None
    with pytest.raises(MediaError, match="damaged or truncated"):
        read_frames(content[:-100], count=6)
    still = standing_frames(content)[2][1]
    damaged = content.replace(still[60:], b"\xff" * len(still[60:]))
    assert 0 < len(read_frames(damaged, count=60).images) < 60
