"""Frames of real videos: the right ones, upright, at the right times, by every decoder; broken files name a fault."""

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synthetic_media import number_of, numbered_frame, write_video

from cots.data import decord_video
from cots.data.video_io import probe, read_frames, sample_times, uniform_times
from cots.errors import MediaError

av = pytest.importorskip("av")

CENTRES = [2, 7, 12, 17, 22, 27, 32, 37]  # the frames at the centres of eight equal parts of forty


@pytest.fixture(params=["decord", "pyav"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with decord and again as if decord were not installed."""
    if request.param == "decord":
        pytest.importorskip("decord")
    else:
        monkeypatch.setattr(decord_video, "find_spec", lambda name: None)
    return str(request.param)


def numbers(images: list[Image.Image]) -> list[int]:
    return [number_of(image) for image in images]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("h264.mp4", "libx264"),
        ("h264.mov", "libx264"),
        ("h264.mkv", "libx264"),
        ("h264.ts", "libx264"),
        ("h264.avi", "libx264"),
        ("vp9.webm", "libvpx-vp9"),
        ("av1.mp4", "libsvtav1"),
        ("mpeg4.avi", "mpeg4"),
    ],
)
def test_uniform_frames(name: str, codec: str, decoder: str, tmp_path: Path) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    video = write_video(tmp_path / name, codec)
    frames = read_frames(video, count=8)
    assert numbers(frames.images) == CENTRES
    assert frames.times == pytest.approx([0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75], abs=0.01)
    assert frames.duration == pytest.approx(4.0, abs=0.01)
    assert (frames.info.frames, frames.info.width, frames.info.height) == (40, 128, 96)
    assert numbers(read_frames(video.read_bytes(), count=8).images) == CENTRES


def test_decord_reads_what_it_can(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("decord")
    monkeypatch.setattr("cots.data.pyav_video.PyAVVideo.decode", lambda *_: iter(()))
    assert numbers(read_frames(clip, count=8).images) == CENTRES


def test_decoders_agree_on_pixels(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("decord")
    generator = np.random.default_rng()
    times = sorted(generator.uniform(0, 4, 9).tolist())
    by_decord = read_frames(clip, times=times, short_side=60)
    monkeypatch.setattr(decord_video, "find_spec", lambda name: None)
    by_pyav = read_frames(clip, times=times, short_side=60)
    assert by_decord.times == by_pyav.times == times
    for a, b in zip(by_decord.images, by_pyav.images, strict=True):
        assert a.size == b.size == (80, 60)
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).mean() < 3


def test_colours_survive(clip: Path, decoder: str) -> None:
    pixels = np.asarray(read_frames(clip, count=1).images[0], int)
    assert np.abs(pixels - numbered_frame(20).astype(int)).mean() < 12


def test_times_in_any_order_and_outside(clip: Path, decoder: str) -> None:
    frames = read_frames(clip, times=[3.05, 0.55, 99.0, -1.0, 0.55])
    assert numbers(frames.images) == [30, 5, 39, 0, 5]
    assert frames.times == [3.05, 0.55, 4.0, 0.0, 0.55]


def test_interval(clip: Path, decoder: str) -> None:
    assert numbers(read_frames(clip, interval=1.0).images) == [5, 15, 25, 35]
    assert len(read_frames(clip, interval=0.1, max_frames=10).images) == 10
    assert len(read_frames(clip, interval=2.0, min_frames=4).images) == 4
    assert numbers(read_frames(clip, interval=60.0).images) == [20]


def test_sparse_times_in_a_long_video(decoder: str, tmp_path: Path) -> None:
    video = write_video(tmp_path / "long.mp4", frames=250)
    assert numbers(read_frames(video, times=[0.35, 0.45, 11.95, 12.05, 24.85]).images) == [3, 4, 119, 120, 248]


def test_variable_frame_rate(decoder: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    times = np.concatenate([[0.0], np.cumsum(generator.integers(20, 400, 39) / 1000)])
    video = write_video(tmp_path / "variable.mp4", times=times.tolist())
    asked = np.sort(generator.uniform(0, times[-1], 12))
    expected = np.searchsorted(times, asked, side="right") - 1
    assert numbers(read_frames(video, times=asked.tolist()).images) == expected.tolist()


def test_start_that_is_not_zero(decoder: str, tmp_path: Path) -> None:
    video = write_video(tmp_path / "late.mp4", times=[3 + i / 10 for i in range(40)])
    assert numbers(read_frames(video, count=8).images) == CENTRES


def turned(clip: Path, target: Path, matrix: tuple[int, int, int, int]) -> Path:
    """The clip with (a, b, c, d) as the display matrix of its track header."""
    content = bytearray(clip.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 0x10000 for value in matrix)
    content[start : start + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 0x40000000], ">i4").tobytes()
    target.write_bytes(content)
    return target


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((0, 1, -1, 0), Image.Transpose.ROTATE_270),  # a telephone held upright: turn clockwise by 90 degrees
        ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
        ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
        ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
        ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
    ],
)
@pytest.mark.parametrize("short_side", [None, 48])
def test_rotation(
    matrix: tuple[int, int, int, int],
    upright: Image.Transpose,
    short_side: int | None,
    decoder: str,
    clip: Path,
    tmp_path: Path,
) -> None:
    frames = read_frames(turned(clip, tmp_path / "turned.mp4", matrix), count=8, short_side=short_side)
    expected = Image.fromarray(numbered_frame(12)).transpose(upright)
    assert (frames.info.width, frames.info.height) == expected.size
    picture = frames.images[2]
    if short_side:
        assert min(picture.size) == short_side
        expected = expected.resize(picture.size)
    assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).mean() < 20


def test_pixels_that_are_not_square(decoder: str, tmp_path: Path) -> None:
    video = write_video(tmp_path / "wide.mp4", aspect=Fraction(2, 1))
    frames = read_frames(video, count=8)
    assert frames.images[0].size == (256, 96)
    assert numbers(frames.images) == CENTRES
    assert probe(video).width == 256


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(8), 1024), (Fraction(1, 8), 16), (Fraction(50), 128)])
def test_a_shape_of_pixels_that_none_has_is_ignored(aspect: Fraction, width: int, decoder: str, tmp_path: Path) -> None:
    video = write_video(tmp_path / "wide.mp4", frames=3, aspect=aspect)
    frames = read_frames(video, count=1)
    assert frames.images[0].size == (frames.info.width, frames.info.height) == (width, 96)


@pytest.mark.parametrize("size", [(90, 60), (130, 98), (214, 160), (64, 64)])
def test_odd_widths_with_one_frame(size: tuple[int, int], decoder: str, tmp_path: Path) -> None:
    video = write_video(tmp_path / "odd.mp4", frames=10, size=size)
    frame = read_frames(video, count=1, short_side=45).images[0]
    assert min(frame.size) == 45
    assert number_of(frame) == 5


def animation(encode: Callable[..., bytes], image_format: str, **options: object) -> bytes:
    frames = [Image.fromarray(numbered_frame(i)) for i in range(10)]
    return encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_animations(image_format: str, encode: Callable[..., bytes], tmp_path: Path) -> None:
    lengths = [100, 300, 100, 100, 400, 100, 100, 100, 100, 600]
    content = animation(encode, image_format, duration=lengths)
    (tmp_path / "moves").write_bytes(content)
    for source in (content, tmp_path / "moves"):
        frames = read_frames(source, times=[0.05, 0.2, 0.39, 0.45, 1.9], short_side=48)
        assert numbers(frames.images) == [0, 1, 1, 2, 9]
        assert frames.images[0].size == (64, 48)
        assert frames.duration == pytest.approx(2.0)
    assert probe(content).frames == 10


def test_animation_without_durations_runs_as_in_a_browser(encode: Callable[..., bytes]) -> None:
    assert probe(animation(encode, "GIF")).duration == pytest.approx(1.0)


def test_truncated_animation_gives_its_whole_frames(encode: Callable[..., bytes]) -> None:
    content = animation(encode, "GIF", duration=100)
    frames = read_frames(content[: len(content) // 2], count=2)
    assert len(frames.images) == 2
    assert frames.info.frames < 10


def test_animation_whose_frame_lies_outside_the_picture(encode: Callable[..., bytes]) -> None:
    content = bytearray(animation(encode, "GIF", duration=100))
    frame = content.index(b"\x2c", len(content) // 2)  # an image descriptor: left, top, width, height follow
    while content[frame - 1] or content[frame + 2] or content[frame + 4]:
        frame = content.index(b"\x2c", frame + 1)
    content[frame + 1 : frame + 9] = b"\xff" * 8
    frames = read_frames(bytes(content), count=3)
    assert frames.images[0].size == (128, 96)
    assert frames.info.frames < 10


def reason(source: str | Path | bytes, **options: int) -> str:
    with pytest.raises(MediaError) as caught:
        read_frames(source, **(options or {"count": 4}))
    return caught.value.reason


def test_broken_files(clip: Path, tmp_path: Path) -> None:
    assert reason(b"") == "the file is empty (0 bytes)"
    assert reason(tmp_path / "none.mp4") == "no such file or directory"
    assert "not a video" in reason(b"no video at all, just words " * 100)
    assert "not a video" in reason(bytes(np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8)))
    header_only = clip.read_bytes()
    assert "none of its frames" in reason(header_only[: header_only.index(b"mdat") + 8])


def test_playlists_are_not_followed(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:4,\n{clip}\n#EXT-X-ENDLIST\n")
    assert "not a video" in reason(tmp_path / "list.mp4")


def test_still_image(photo: Image.Image, encode: Callable[..., bytes]) -> None:
    assert "a still image" in reason(encode(photo, "JPEG"))


def test_index_lost(tmp_path: Path) -> None:
    content = write_video(tmp_path / "a.mp4").read_bytes()  # the index is at the end
    assert "not a readable video" in reason(content[: len(content) // 2])


def test_sound_only(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "sound only" in reason(tmp_path / "sound.mp4")


def test_pixel_limit(clip: Path, encode: Callable[..., bytes], tmp_path: Path) -> None:
    for source in (clip, animation(encode, "GIF")):
        assert "128 x 96 pixels a frame is more than the limit of 5,000 pixels" in reason(
            source, count=2, max_pixels=5000
        )
    wide = write_video(tmp_path / "wide.mp4", frames=3, aspect=Fraction(2))
    assert "256 x 96 pixels a frame is more than the limit of 20,000" in reason(wide, count=1, max_pixels=20_000)


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.webm", "cut.ts"])
def test_truncated_video_gives_the_frames_it_has(name: str, decoder: str, tmp_path: Path) -> None:
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    video = write_video(tmp_path / name, codec, faststart=name.endswith("mp4"))
    content = video.read_bytes()
    video.write_bytes(content[: len(content) * 3 // 4])
    frames = read_frames(video, count=6)
    assert 0 < frames.info.frames < 40
    found = numbers(frames.images)
    assert found == sorted(found)
    assert found[-1] < 36


def test_damage_in_the_middle_leaves_frames_out(decoder: str, clip: Path) -> None:
    content = bytearray(clip.read_bytes())
    start = content.index(b"mdat") + 500
    content[start : start + 600] = bytes(600)
    frames = read_frames(bytes(content), count=20)
    assert 0 < len(frames.images) < 20
    for time, image in zip(frames.times, frames.images, strict=True):
        assert np.asarray(image).std() > 10, f"a blank stands for the frame at {time} s"


def test_decord_standing_a_neighbour_in_is_noticed(clip: Path) -> None:
    pytest.importorskip("decord")
    content = bytearray(clip.read_bytes())
    generator = np.random.default_rng(1)
    start = content.index(b"mdat") + 8
    for position in generator.integers(start, len(content), 12):
        content[position] ^= 0xFF
    frames = read_frames(bytes(content), times=[i / 10 + 0.05 for i in range(40)])
    for a, b in zip(frames.images, frames.images[1:]):
        assert a.tobytes() != b.tobytes()


def test_truncated_avi_does_not_end_the_process(tmp_path: Path) -> None:
    """decord 3.4 crashes on such a file, so this runs in a process of its own."""
    video = write_video(tmp_path / "cut.avi", "mpeg4")
    content = video.read_bytes()
    video.write_bytes(content[: len(content) * 6 // 10])
    script = f"from cots.data.video_io import read_frames; print(len(read_frames({str(video)!r}, count=4).images))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_silence_on_stderr(clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = clip.read_bytes()
    for share in (0.5, 0.8, 1.0):
        try:
            read_frames(content[: int(len(content) * share)], count=4)
        except MediaError:
            continue
    assert capfd.readouterr().err == ""


def test_exactly_one_choice(clip: Path) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        read_frames(clip)
    with pytest.raises(ValueError, match="exactly one"):
        read_frames(clip, count=3, interval=1.0)
    with pytest.raises(ValueError, match="count must be"):
        read_frames(clip, count=0)
    with pytest.raises(ValueError, match="interval must be"):
        read_frames(clip, interval=0)


@given(duration=st.floats(0.04, 20_000), count=st.integers(1, 700))
def test_uniform_times_are_the_centres_of_equal_segments(duration: float, count: int) -> None:
    times = uniform_times(duration, count)
    assert len(times) == count
    edges = np.linspace(0, duration, count + 1)
    assert np.allclose(times, (edges[:-1] + edges[1:]) / 2)


@given(
    duration=st.floats(0.04, 20_000),
    interval=st.floats(0.05, 60),
    least=st.integers(1, 8),
    most=st.integers(8, 600),
)
def test_interval_times_stay_in_the_video_and_the_bounds(
    duration: float, interval: float, least: int, most: int
) -> None:
    times = sample_times(duration, interval, least, most)
    assert least <= len(times) <= most
    assert times[0] > 0
    assert times[-1] <= duration
    steps = np.diff(times)
    assert np.allclose(steps, steps[0] if len(steps) else 0)
    if least < len(times) < most and len(times) > 1:
        assert np.allclose(steps, interval)


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_random_damage_to_animations_raises_nothing_else(image_format: str, encode: Callable[..., bytes]) -> None:
    content = animation(encode, image_format, duration=100)
    generator = np.random.default_rng(11)
    for _ in range(60):
        damaged = bytearray(content)
        start = int(generator.integers(0, len(content)))
        damaged[start : start + 40] = generator.bytes(len(damaged[start : start + 40]))
        try:
            assert read_frames(bytes(damaged), count=4, max_pixels=1_000_000).images
        except MediaError:
            continue


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_random_damage_to_videos_raises_nothing_else(name: str, tmp_path: Path) -> None:
    content = write_video(tmp_path / name).read_bytes()
    generator = np.random.default_rng(12)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(3):
            start = int(generator.integers(0, len(content)))
            damaged[start : start + 20] = generator.bytes(len(damaged[start : start + 20]))
        try:
            assert read_frames(bytes(damaged), count=4, max_pixels=1_000_000).images
        except MediaError:
            continue
