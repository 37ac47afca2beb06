"""Real media, written on the spot: pictures by Pillow, videos by FFmpeg whose every frame shows its own number."""

import io
import tarfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

BITS = 8


def numbered_frame(number: int, width: int = 128, height: int = 96) -> np.ndarray:
    """(height, width, 3) uint8: the number as a bar code above, red at the lower left, blue at the lower right."""
    pixels = np.empty((height, width, 3), np.uint8)
    for bit in range(BITS):
        pixels[: height // 2, bit * width // BITS : (bit + 1) * width // BITS] = 230 if number >> bit & 1 else 25
    pixels[height // 2 :, : width // 2] = (200, 30, 30)
    pixels[height // 2 :, width // 2 :] = (30, 30, 200)
    return pixels


def number_of(picture: Image.Image) -> int:
    """What `numbered_frame` was given, read back from an upright picture."""
    pixels = np.asarray(picture.convert("L"))
    height, width = pixels.shape
    return sum(int(pixels[height // 4, int((bit + 0.5) * width / BITS)] > 128) << bit for bit in range(BITS))


def write_video(
    path: Path,
    codec: str = "libx264",
    frames: int = 40,
    rate: int = 10,
    size: tuple[int, int] = (128, 96),
    times: Sequence[float] | None = None,
    aspect: Fraction | None = None,
    faststart: bool = False,
    b_frames: bool = True,
) -> Path:
    """A video of `numbered_frame`s with a keyframe every 12; `times` in seconds make its frame rate variable."""
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=rate, options={"preset": "12"} if codec == "libsvtav1" else {})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 12
        if not b_frames:
            stream.codec_context.max_b_frames = 0
        stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.sample_aspect_ratio = stream.codec_context.sample_aspect_ratio = aspect
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, *size), format="rgb24")
            frame.pts = round(1000 * (times[number] if times is not None else number / rate))
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_tar(path: Path, members: dict[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
