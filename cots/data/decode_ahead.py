"""Pictures and videos decoded by threads ahead of whoever uses them, in order, with bounded memory."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Condition
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from cots.data.file_readers import PROCESSES, FileReaders, JpegFile, digest_of
from cots.data.frame_sampling import FrameSampling
from cots.data.gpu_jpeg import GpuJpegDecoder
from cots.data.image_io import MAX_PIXELS, open_sized, os_reason
from cots.data.pinned_memory import pin
from cots.data.samples import Sample
from cots.data.square_transform import SquareTransform
from cots.errors import MediaError
from cots.stopwatch import Stopwatch

P = ParamSpec("P")
T = TypeVar("T")

FILES_A_GPU_JOB = 64
BYTES_A_GPU_JOB = 32_000_000
GPU_JOBS_AHEAD = 16
JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif")  # a wrong name only costs speed


@dataclass(slots=True)
class Decoded:
    """A sample on its way to the model.

    Attributes:
        pixels: (F, 3, S, S) uint8, upright, on the CPU or, complete, on the decoder's device; an image: F = 1.
        times: seconds of a video's F frames.
        content_hash: BLAKE2b of the file's bytes.
        width, height: pixels of the whole upright picture.
        duration: seconds; None for an image.
    """

    sample: Sample
    pixels: Tensor
    times: tuple[float, ...]
    content_hash: str
    width: int
    height: int
    duration: float | None


Outcome = Decoded | MediaError


@dataclass(slots=True)
class _Job:
    """Samples that one thread decodes together; open for more until it is started."""

    samples: list[Sample] = field(default_factory=list)
    bytes: int = 0
    outcomes: "Future[list[Outcome]] | None" = None


class MediaDecoder:
    """Decodes samples with several threads, each sample as if it were alone.

    Args:
        square: scales pictures.
        frames: which frames of a video are decoded.
        workers: threads.
        batch_size: pictures that the user takes at once.
        gpu_jpegs: decodes plain JPEGs, many at once; None: Pillow does.
        stopwatch: told the seconds of "decoding", added up over threads.
    """

    def __init__(
        self,
        square: SquareTransform,
        frames: FrameSampling,
        workers: int,
        batch_size: int,
        gpu_jpegs: GpuJpegDecoder | None,
        stopwatch: Stopwatch,
    ) -> None:
        self._square = square
        self._frames = frames
        self._gpu_jpegs = gpu_jpegs
        self._readers = FileReaders(0, 0)
        if gpu_jpegs is not None and gpu_jpegs.device.type == "cuda":
            self._readers = FileReaders(PROCESSES, BYTES_A_GPU_JOB, partial(pin, device=gpu_jpegs.device))
        self._stopwatch = stopwatch
        self._workers = workers
        self._over = False  # nobody wants what is still being decoded
        # An image in flight counts 1, a video as many as there are images in flight for each worker: so there are
        # never more than a few batches of pictures, or a few videos' frames, in memory.
        self._room = 2 * max(batch_size, 16) + workers
        if gpu_jpegs is not None:
            self._room = max(self._room, GPU_JOBS_AHEAD * FILES_A_GPU_JOB)
        self._video = max(self._room // (workers + 1), 1)
        self._large = _PixelBudget(2 * MAX_PIXELS)

    def decode(self, samples: Iterable[Sample]) -> Iterator[Outcome]:
        """Each sample decoded, or why it cannot be, in order; samples are read only as far ahead as there is room."""
        in_flight: deque[tuple[int, _Job, int]] = deque()
        used = 0
        jpegs = _Job()
        self._over = False
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")

        def started(job: _Job) -> "Future[list[Outcome]]":
            if job.outcomes is None:
                job.outcomes = pool.submit(self._run, job.samples)
            return job.outcomes

        try:
            for sample in samples:
                weight = self._video if sample.kind == "video" else 1
                while in_flight and used + weight > self._room:
                    freed, job, place = in_flight.popleft()
                    used -= freed
                    yield started(job).result()[place]
                together = self._gpu_jpegs is not None and _looks_like_jpeg(sample)
                if together and (jpegs.outcomes is not None or jpegs.bytes + sample.size > BYTES_A_GPU_JOB):
                    started(jpegs)
                    jpegs = _Job()
                job = jpegs if together else _Job()
                in_flight.append((weight, job, len(job.samples)))
                job.samples.append(sample)
                job.bytes += sample.size
                used += weight
                if not together or len(job.samples) == FILES_A_GPU_JOB:
                    started(job)
            while in_flight:
                _, job, place = in_flight.popleft()
                yield started(job).result()[place]
        finally:
            self._over = True
            pool.shutdown(wait=True, cancel_futures=True)
            self._readers.close()

    def _run(self, samples: list[Sample]) -> list[Outcome]:
        with self._stopwatch.measure("decoding"):
            if self._gpu_jpegs is not None and _looks_like_jpeg(samples[0]):
                return self._decode_jpegs(self._gpu_jpegs, samples)
            return [_outcome(self._decode_one, sample) for sample in samples]

    def _decode_one(self, sample: Sample) -> Decoded:
        return self._decode_video(sample) if sample.kind == "video" else self._decode_image(sample, sample.read_bytes())

    def _decode_jpegs(self, decoder: GpuJpegDecoder, samples: list[Sample]) -> list[Outcome]:
        """What the GPU reads is decoded there at once, the rest one after another by Pillow."""
        with self._readers.read(samples) as files:
            plain = {
                place: (file.content, file.header)
                for place, file in enumerate(files)
                if isinstance(file, JpegFile) and file.header is not None and decoder.takes(file.header)
            }
            pictures = dict(zip(plain, decoder.decode(list(plain.values()))))

            def finish(sample: Sample, place: int) -> Decoded:
                file, picture = files[place], pictures.get(place)
                if isinstance(file, MediaError):
                    raise file
                if picture is None:
                    return self._decode_image(sample, bytes(file.content))
                width, height = plain[place][1].upright_size
                return Decoded(sample, picture, (), file.digest, width, height, None)

            return [_outcome(finish, sample, place) for place, sample in enumerate(samples)]

    def _decode_image(self, sample: Sample, content: bytes) -> Decoded:
        with self._large.share() as share:
            image, (width, height) = open_sized(
                content, name=sample.path, target_size=self._square.size, admit=share.take
            )
            pixels = self._square(image)[None]
        return Decoded(sample, pixels, (), digest_of(content), width, height, None)

    def _decode_video(self, sample: Sample) -> Decoded:
        frames = self._frames.read(sample, self._square.size, self._break_off_if_over)
        pixels = torch.stack([self._square(image) for image in frames.images])
        info, times = frames.info, tuple(frames.times)
        return Decoded(sample, pixels, times, content_hash(sample), info.width, info.height, frames.duration)

    def _break_off_if_over(self) -> None:
        """Else Ctrl-C, or the error that ends a run, would wait until a film has been decoded."""
        if self._over:
            raise CancelledError


class _PixelBudget:
    """So many pixels are decoded at once by all threads together, or one picture of more."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = Condition()

    @contextmanager
    def share(self) -> Iterator["_Share"]:
        """What the body takes is given back when it ends."""
        share = _Share(self._take)
        try:
            yield share
        finally:
            with self._changed:
                self._used -= share.pixels
                self._changed.notify_all()

    def _take(self, pixels: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + pixels <= self._limit)
            self._used += pixels


class _Share:
    """One picture's part of the budget."""

    def __init__(self, take: Callable[[int], None]) -> None:
        self._take = take
        self.pixels = 0

    def take(self, pixels: int) -> None:
        """Wait for room; see `open_sized`."""
        self._take(pixels)
        self.pixels = pixels


def content_hash(sample: Sample) -> str:
    """BLAKE2b of a sample's bytes, as 32 hexadecimal digits; a large file is read piece by piece.

    Raises:
        MediaError: it cannot be read.
    """
    if sample.offset is not None:
        return digest_of(sample.read_bytes())
    try:
        with open(sample.path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise MediaError(sample.path, os_reason(error)) from error


def _looks_like_jpeg(sample: Sample) -> bool:
    return sample.kind == "image" and sample.path.lower().endswith(JPEG_EXTENSIONS)


def _outcome(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T | MediaError:
    try:
        return work(*arguments, **named)
    except MediaError as error:
        # Whoever keeps it keeps no pictures: the traceback of the one that was raised leads to those of the whole job.
        return MediaError(error.path, error.reason)
