"""Animated GIF, WebP, PNG and AVIF as videos, through Pillow."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cots.data.image_io import describe_damage, to_rgb
from cots.data.video_info import VideoInfo
from cots.data.webp_frames import standing_frames
from cots.errors import MediaError

_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
_SHORTEST = 20  # milliseconds; browsers show frames that claim less for 100
_USUAL = 100


def is_animation(header: bytes) -> bool:
    """Whether the bytes start a file that Pillow, not FFmpeg, is to read."""
    return header.startswith((b"GIF8", b"\x89PNG")) or header[8:12] == b"WEBP" or header[4:12] == b"ftypavis"


class Animation:
    """An animated picture; `info`, `starts` and `decode` as in PyAVVideo.

    Raises:
        MediaError: no frame decodes, or a frame has more than `max_pixels`.
    """

    def __init__(self, source: str | Path | bytes, name: str, max_pixels: int) -> None:
        self._file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115
        self._stills: list[bytes] | None = None  # of each frame, if they stand alone
        try:
            lengths, size = self._scan(name, max_pixels)
        except MediaError:
            self.close()
            raise
        except Exception as error:  # Pillow's parsers raise almost anything on damaged input
            reason = describe_damage(error, self._file)
            self.close()
            raise MediaError(name, reason) from error
        ends = np.cumsum(lengths) / 1000.0
        duration = float(ends[-1])
        self.starts = np.concatenate([[0.0], ends[:-1]])
        self.info = VideoInfo(duration, len(lengths) / duration, *size, len(lengths))

    def _scan(self, name: str, max_pixels: int) -> tuple[list[float], tuple[int, int]]:
        """Milliseconds of each frame that decodes, and (width, height); frames after a damaged one are lost with it."""
        image = self._open()
        width, height = size = image.size
        if width * height > max_pixels:
            raise MediaError(name, f"{width} x {height} pixels a frame is more than the limit of {max_pixels:,} pixels")
        standing = standing_frames(self._content()) if image.format == "WEBP" else None
        if standing is not None:
            self._stills = [still for _, still in standing]
            return [_shown(length) for length, _ in standing], size
        lengths: list[float] = []
        while True:
            try:
                image.seek(len(lengths))
                if image.size != size:  # a damaged GIF's frame can lie far outside the picture, which Pillow enlarges
                    break
                image.load()
            except Exception:  # past the last frame, or damaged
                if not lengths:
                    raise
                break
            lengths.append(_shown(float(image.info.get("duration") or 0)))
        return lengths, size

    def _content(self) -> bytes:
        self._file.seek(0)
        return self._file.read()

    def _open(self) -> Image.Image:
        self._file.seek(0)
        return Image.open(self._file, formats=_FORMATS)

    def decode(self, indices: Sequence[int], size: tuple[int, int]) -> Iterator[tuple[int, Image.Image]]:
        """The frames of ascending `indices`, each scaled to (width, height); those that do not decode are left out."""
        if self._stills is not None:
            for i in indices:
                try:
                    with Image.open(io.BytesIO(self._stills[i]), formats=("WEBP",)) as still:
                        frame = still.convert("RGB")
                except Exception:  # Pillow's parsers raise almost anything on damaged input
                    continue
                yield i, frame if frame.size == size else frame.resize(size, Image.Resampling.BICUBIC)
            return
        image = self._open()  # anew: where the scan met damage, its reader cannot go back
        for i in indices:
            image.seek(i)
            frame = to_rgb(image)
            frame.info.clear()
            yield i, frame if frame.size == size else frame.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)

    def close(self) -> None:
        self._file.close()


def _shown(milliseconds: float) -> float:
    return milliseconds if milliseconds >= _SHORTEST else _USUAL
