"""Video files through PyAV (FFmpeg): an index of frame times from the packets, and exact frames by index."""

import bisect
import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cots.data.video_info import VideoInfo, end_of_last
from cots.errors import MediaError, MissingDependency

_ATTACHED_PICTURE = 0x0400  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC
_SEEK_GAIN = 12  # frames; jumping to a nearer keyframe costs more than decoding on
_WIDEST_PIXEL = 8  # times its height; a file that says more, or less than an eighth, is damaged there
# The display matrix sends (x, y) to (a x + c y, b x + d y), y downwards; keys are the signs of (a, b, c, d).
_BY_MATRIX = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
_SIDEWAYS = (
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
)
_MIRRORED = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
)


class PyAVVideo:
    """An open video.

    Attributes:
        info: its VideoInfo.
        starts: (N,) float64, the seconds at which each frame appears, ascending, the first at 0.
        container: FFmpeg's name of the format, such as "mov,mp4,m4a,3gp,3g2,mj2".
        intact: whether every packet was there and whole.
        mirrored: whether the picture is to be mirrored (a front camera's display matrix).

    Raises:
        MediaError: not a video, no video stream (audio only), no frame that decodes, or frames of more than
            `max_pixels`, stored or as shown.
        MissingDependency: PyAV is not installed.
    """

    def __init__(
        self,
        source: str | Path | bytes,
        name: str,
        max_pixels: int,
        threads: int,
        heed: Callable[[], None] = lambda: None,
    ) -> None:
        try:
            import av
        except ImportError as error:
            raise MissingDependency("av (PyAV)", "pip install 'cots[gallery]'") from error
        self._errors = (av.FFmpegError, OSError, ValueError, IndexError)
        self._source = source
        self._name = name
        self._max_pixels = max_pixels
        self._threads = threads
        self._heed = heed  # at every packet
        self.intact = True
        self._open()
        try:
            self._scan()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        import av

        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else str(self._source)
        try:
            self._container: Any = av.open(source, metadata_errors="replace")  # titles in old encodings
        except self._errors as error:
            raise MediaError(self._name, f"not a readable video ({_brief(error)})") from error
        try:
            self._stream = self._pick_stream()
        except BaseException:
            self.close()
            raise
        self.container: str = self._container.format.name

    def close(self) -> None:
        self._container.close()

    def _pick_stream(self) -> Any:
        # A sound file's cover is a video stream of one attached picture.
        streams = [s for s in self._container.streams.video if not s.disposition & _ATTACHED_PICTURE]
        if not streams:
            kind = "it holds sound only" if self._container.streams.audio else "it has no video stream"
            raise MediaError(self._name, f"no pictures to read: {kind}")
        stream = max(streams, key=lambda s: s.codec_context.width * s.codec_context.height if s.codec_context else 0)
        context = stream.codec_context
        if context is None:
            raise MediaError(self._name, "the video's codec is unknown to FFmpeg")
        self._check_size(context.width, context.height)
        context.options = {"max_pixels": str(self._max_pixels)}  # the stream itself may claim more than the container
        context.thread_count = self._threads
        context.thread_type = "AUTO" if self._threads > 1 else "NONE"
        return stream

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            size = f"{width} x {height}"
            raise MediaError(self._name, f"{size} pixels a frame is more than the limit of {self._max_pixels:,} pixels")

    def _scan(self) -> None:
        """Read all packets once for their times, decoding only the first picture (for its size and orientation)."""
        packets: list[tuple[int | None, int | None, bool]] = []  # time of presentation, of decoding; keyframe?
        first: Any = None
        last_duration = 0
        for packet in self._packets():
            if packet is not None and not packet.is_discard:
                packets.append((packet.pts, packet.dts, packet.is_keyframe))
                last_duration = packet.duration or last_duration
            if first is None:
                first = next((frame for frame in self._decoded(packet) or () if not frame.is_corrupt), None)
        if first is None or not packets:
            raise MediaError(self._name, "none of its frames can be decoded")
        base = self._stream.time_base
        frame_rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
        times = [pts for pts, _, _ in packets]
        keys = [pts for pts, _, key in packets if key]
        # AVI stores no times of presentation, and FFmpeg guesses wrong with B-frames; elementary streams store none at
        # all. Their frames come out in the right order and are counted.
        self._counted = None in times or (self.container == "avi" and self._stream.codec_context.has_b_frames)
        if self._counted:
            self._threads = 1  # of several, a packet's failure is told with a later one
            times, keys = [dts for _, dts, _ in packets], []
        if None in times:
            base, times, last_duration = 1 / Fraction(frame_rate), list(range(len(packets))), 1
        self._pts = sorted({pts for pts in times if pts is not None})
        self._keys = sorted(bisect.bisect_left(self._pts, pts) for pts in keys if pts is not None)
        self._tolerance = float(np.median(np.diff(self._pts))) / 2 if len(self._pts) > 1 else 0.0
        self.starts = np.array([float((pts - self._pts[0]) * base) for pts in self._pts])
        duration = end_of_last(self.starts, float(last_duration * base)) or float(1 / Fraction(frame_rate))
        self._measure(first, duration)

    def _measure(self, frame: Any, duration: float) -> None:
        self._transpose = _orientation(frame)
        aspect = self._stream.sample_aspect_ratio or Fraction(1)
        if not 1 / _WIDEST_PIXEL <= aspect <= _WIDEST_PIXEL:
            aspect = Fraction(1)
        width, height = max(1, round(frame.width * aspect)), frame.height
        self._check_size(width, height)
        if self._transpose in _SIDEWAYS:
            width, height = height, width
        self.info = VideoInfo(duration, len(self._pts) / duration, width, height, len(self._pts))
        self.mirrored = self._transpose in _MIRRORED

    def decode(self, indices: Sequence[int], size: tuple[int, int]) -> Iterator[tuple[int, Image.Image]]:
        """The frames of ascending, distinct `indices`, scaled to (width, height); what does not decode is left out.

        Between two frames it decodes on, or jumps to a keyframe if one lies well ahead.
        """
        waiting = deque(indices)
        while waiting:
            key = self._key_before(waiting[0])
            arrived = False
            for index, frame in self._read_from(key):
                if not arrived and index > waiting[0] and key > 0:
                    self._keys = []  # seeking landed too late, so this file is read from its beginning
                    break
                arrived = True
                while waiting and waiting[0] < index:
                    waiting.popleft()
                if waiting and waiting[0] == index:
                    yield waiting.popleft(), self._picture(frame, size)
                if not waiting:
                    return
                ahead = self._key_before(waiting[0])
                if ahead > key and ahead - index > _SEEK_GAIN:
                    break
            else:
                return

    def _key_before(self, index: int) -> int:
        position = bisect.bisect_right(self._keys, index)
        return self._keys[position - 1] if position else 0

    def _read_from(self, key: int) -> Iterator[tuple[int, Any]]:
        """(index, frame) in order of time, from the keyframe with index `key` or a little before."""
        self._rewind(key)
        if self._counted:
            yield from self._counting()
            return
        for packet in self._packets():
            for frame in self._decoded(packet) or ():
                index = self._index_of(frame.pts)
                if index is not None and not frame.is_corrupt:
                    yield index, frame

    def _counting(self) -> Iterator[tuple[int, Any]]:
        """(index, frame) from the beginning, by counting, where what does not decode counts too.

        A frame's index is the number of its packet, but where B-frames change the order. Then too, what comes before a
        keyframe is shown before it, so that a count which damage led astray is right again at the next one.
        """
        index = 0
        failed: deque[int] = deque()  # numbers of packets
        shown: list[int] = []  # those of frames, since the last keyframe, where there are B-frames
        for number, packet in enumerate(self._packets()):
            if packet is not None:
                packet.pts = number  # its frame brings it along
            frames = self._decoded(packet)
            if frames is None:
                failed.append(number)
            for frame in frames or ():
                own = index if frame.pts is None else frame.pts
                while failed and failed[0] < own:
                    failed.popleft()
                    index += 1
                if not self._stream.codec_context.has_b_frames:
                    index = own
                else:
                    if frame.key_frame:
                        index = own + sum(other > own for other in shown)
                        shown = []
                    shown.append(own)
                if not frame.is_corrupt:
                    yield index, frame
                index += 1

    def _rewind(self, key: int) -> None:
        """Seek to a keyframe; open the file anew for the first one, which a seek does not find in MPEG-TS."""
        if key > 0:
            try:
                self._container.seek(self._pts[key], stream=self._stream)
                return
            except self._errors:
                self._keys = []
        self.close()
        self._open()

    def _index_of(self, pts: int | None) -> int | None:
        """The frame whose packet has this time, or nearly: some containers round the one and not the other."""
        if pts is None:
            return None
        right = bisect.bisect_left(self._pts, pts)
        near = min((i for i in (right - 1, right) if 0 <= i < len(self._pts)), key=lambda i: abs(self._pts[i] - pts))
        return near if abs(self._pts[near] - pts) <= self._tolerance else None

    def _packets(self) -> Iterator[Any]:
        """The whole packets of the stream, then None, which drains the decoder."""
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    self.intact = False
                elif packet.size:
                    self._heed()
                    yield packet
        except self._errors:
            self.intact = False
        yield None

    def _decoded(self, packet: Any) -> list[Any] | None:
        """The frames that a packet completes, also those that the decoder had to patch up; None where it fails."""
        try:
            frames: list[Any] = self._stream.decode(packet)
        except self._errors:
            self.intact = False
            return None
        if any(frame.is_corrupt for frame in frames):
            self.intact = False
        return frames

    def _picture(self, frame: Any, size: tuple[int, int]) -> Image.Image:
        width, height = size[::-1] if self._transpose in _SIDEWAYS else size
        picture: Image.Image = frame.to_image(width=width, height=height, interpolation="BICUBIC")
        return picture if self._transpose is None else picture.transpose(self._transpose)


def _orientation(frame: Any) -> Image.Transpose | None:
    """How to turn the picture upright, from the frame's display matrix."""
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(float)
    turned = max(abs(b), abs(c)) > max(abs(a), abs(d))
    signs = (0.0, *np.sign([b, c]), 0.0) if turned else (np.sign(a), 0.0, 0.0, np.sign(d))
    w, x, y, z = (int(sign) for sign in signs)
    return _BY_MATRIX.get((w, x, y, z))


def _brief(error: Exception) -> str:
    """FFmpeg's own words, without the number and the file's name."""
    return str(getattr(error, "strerror", None) or error).lower()
