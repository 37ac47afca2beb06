"""Bulk embedding: a stream of samples becomes a stream of unit vectors, in order, with bounded memory.

    for item in embed(iter_samples(["photos/"], on_error=print), load_model(), on_error=print):
        item.sample.path, item.vectors        # (V, D) float32

Threads decode and resize ahead of the model (Pillow, decord and PyAV release the GIL) while the model encodes the batch
before. Frames of neighbouring videos and images share batches. What cannot be read is reported to `on_error`, and is
never a vector.
"""

import hashlib
import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from cots.data.frame_sampling import EVERY_SECOND, FrameSampling
from cots.data.image_io import open_image, os_reason
from cots.data.samples import Sample
from cots.errors import MediaError, SourceError
from cots.model.retrieval_model import RetrievalModel
from cots.moments import Moment, pool_video
from cots.single_core import single_core_threads
from cots.stopwatch import Stopwatch

CPU_BATCH = 4
GPU_BATCH = 64
DECODED_AHEAD = 16
ENOUGH_TO_JUDGE = 20


@dataclass(frozen=True)
class Embedded:
    """A sample and its vectors.

    Attributes:
        sample: what was embedded.
        vectors: (V, D) float32, unit norm. An image: V = 1. A video: the model's pooling of all frames, then one row a
            moment.
        moments: the windows of vectors[1:]; empty for an image.
        content_hash: BLAKE2b of the file's bytes.
        width, height: pixels, upright.
        duration: seconds; None for an image.
    """

    sample: Sample
    vectors: np.ndarray
    moments: tuple[Moment, ...]
    content_hash: str
    width: int
    height: int
    duration: float | None


@dataclass(frozen=True)
class Progress:
    """How far a run is: samples embedded and failed, of how many if that is known, after how many seconds."""

    done: int
    failed: int
    total: int | None
    seconds: float

    @property
    def rate(self) -> float:
        """Samples a second."""
        return (self.done + self.failed) / self.seconds if self.seconds else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds that are left, or None if the total is unknown or nothing is done."""
        if self.total is None or not self.rate:
            return None
        return max(self.total - self.done - self.failed, 0) / self.rate


@dataclass(frozen=True)
class _Decoded:
    """A sample on its way to the model: (F, 3, S, S) uint8 pixels and, for a video, the seconds of its F frames."""

    sample: Sample
    pixels: Tensor
    times: tuple[float, ...]
    content_hash: str
    width: int
    height: int
    duration: float | None


def embed(
    samples: Iterable[Sample],
    model: RetrievalModel,
    *,
    on_error: Callable[[MediaError], None],
    batch_size: int | None = None,
    workers: int | None = None,
    max_bad_share: float = 1.0,
    total: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    frames: FrameSampling = EVERY_SECOND,
    stopwatch: Stopwatch | None = None,
) -> Iterator[Embedded]:
    """Embed images and videos.

    Args:
        samples: what to embed; read only as far ahead as the decoders are.
        model: encodes the pictures.
        on_error: called with each sample that cannot be read, in order.
        batch_size: pictures that the model encodes at once. By default 64 on a GPU and 4 on a CPU, whose caches do
            not hold the activations of more.
        workers: decoding threads; by default one a core.
        max_bad_share: the share of unreadable samples (judged from the twentieth on) above which the run stops; 1 never
            stops.
        total: number of samples, if known, for the progress.
        progress: called after each sample.
        frames: which frames of a video are embedded.
        stopwatch: told the seconds of "decoding" and "encoding", which overlap.

    Yields:
        One `Embedded` for each readable sample, in the order of `samples`.

    Raises:
        SourceError: more samples are unreadable than `max_bad_share` allows.
    """
    batch_size = batch_size or (CPU_BATCH if model.device.type == "cpu" else GPU_BATCH)
    workers = workers or _cores()
    stopwatch = stopwatch or Stopwatch()
    started = time.perf_counter()
    done = read = failed = 0
    last: MediaError | None = None

    def tell() -> None:
        if progress is not None:
            progress(Progress(done, failed, total, time.perf_counter() - started))

    def decode(sample: Sample) -> _Decoded:
        with stopwatch.measure("decoding"):
            return _decode_video(sample, model, frames) if sample.kind == "video" else _decode_image(sample, model)

    def readable() -> Iterator[_Decoded]:
        nonlocal read, failed, last
        for outcome in _decode_ahead(samples, decode, workers, batch_size):
            try:
                decoded = outcome.result()
            except MediaError as error:
                failed, last = failed + 1, error
                on_error(error)
                tell()
                _judge(failed, read + failed, max_bad_share, error, enough=ENOUGH_TO_JUDGE)
            else:
                read += 1
                yield decoded

    for decoded, vectors in _encode(readable(), model, batch_size, stopwatch):
        embedded = _pool(decoded, vectors, model)
        if np.isfinite(embedded.vectors).all():
            done += 1
            yield embedded
        else:
            last = MediaError(decoded.sample.path, f"the model {model.name} gives it no finite vector")
            read, failed = read - 1, failed + 1
            on_error(last)
        tell()
    if last is not None:
        _judge(failed, read + failed, max_bad_share, last, enough=1)


def content_hash(sample: Sample) -> str:
    """BLAKE2b of a sample's bytes, as 32 hexadecimal digits; a large file is read piece by piece.

    Raises:
        MediaError: it cannot be read.
    """
    if sample.offset is not None:
        return _digest(io.BytesIO(sample.read_bytes()))
    try:
        with open(sample.path, "rb") as file:
            return _digest(file)
    except OSError as error:
        raise MediaError(sample.path, os_reason(error)) from error


def _digest(file: io.BufferedReader | io.BytesIO) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_parquet(path: str | Path, embedded: Iterable[Embedded], model: RetrievalModel, batch_rows: int = 4096) -> int:
    """Write vectors to a Parquet file, for use elsewhere.

    A row a vector: path, kind, captions, start, end (null but for a moment), vector (D float32). The schema's metadata
    names the model and its fingerprint. The file appears when it is complete.

    Returns:
        The number of rows.
    """
    metadata = {"cots.model": model.name, "cots.fingerprint": model.fingerprint}
    schema = pa.schema(
        [
            ("path", pa.string()),
            ("kind", pa.string()),
            ("captions", pa.list_(pa.string())),
            ("start", pa.float64()),
            ("end", pa.float64()),
            ("vector", pa.list_(pa.float32(), model.dimension)),
        ],
        metadata=metadata,
    )
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    rows: list[dict[str, Any]] = []
    written = 0
    try:
        with pq.ParquetWriter(scratch, schema) as writer:
            for item in embedded:
                rows += _parquet_rows(item)
                if len(rows) >= batch_rows:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    written += len(rows)
                    rows.clear()
            writer.write_table(pa.Table.from_pylist(rows, schema))
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
    return written + len(rows)


def _parquet_rows(item: Embedded) -> Iterator[dict[str, Any]]:
    sample = item.sample
    for vector, moment in zip(item.vectors, (None, *item.moments)):
        yield {
            "path": sample.path,
            "kind": sample.kind,
            "captions": list(sample.captions),
            "start": moment and moment.start,
            "end": moment and moment.end,
            "vector": vector,
        }


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _judge(failed: int, seen: int, max_bad_share: float, last: MediaError, enough: int) -> None:
    if seen >= enough and failed > max_bad_share * seen:
        raise SourceError(
            f"{failed} of {seen} files could not be read, more than the allowed share of {max_bad_share:g} "
            f"(the last one: {last}); mend the source or allow more."
        )


def _decode_ahead(
    samples: Iterable[Sample], decode: Callable[[Sample], _Decoded], workers: int, batch_size: int
) -> Iterator["Future[_Decoded]"]:
    """Decode in threads and give the outcomes in order.

    An image in flight counts 1, a video as many as there are images in flight for each worker: so there are never more
    than about two batches of pictures, or a few videos' frames, in memory.
    """
    room = 2 * max(batch_size, DECODED_AHEAD) + workers
    weights = {"image": 1, "video": max(room // (workers + 1), 1)}
    in_flight: deque[tuple[int, Future[_Decoded]]] = deque()
    used = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for sample in samples:
            weight = weights[sample.kind]
            while in_flight and used + weight > room:
                freed, outcome = in_flight.popleft()
                used -= freed
                yield outcome
            in_flight.append((weight, pool.submit(decode, sample)))
            used += weight
        while in_flight:
            yield in_flight.popleft()[1]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode_image(sample: Sample, model: RetrievalModel) -> _Decoded:
    content = sample.read_bytes()
    image = open_image(content, name=sample.path, target_size=model.image_size)
    width, height = _full_size(content, image)
    pixels = model.transform(image)[None]
    return _Decoded(sample, pixels, (), _digest(io.BytesIO(content)), width, height, None)


def _full_size(content: bytes, image: Image.Image) -> tuple[int, int]:
    """Size of the upright picture; a JPEG may have been decoded at a fraction of it."""
    if not content.startswith(b"\xff\xd8\xff"):
        return image.size
    with Image.open(io.BytesIO(content)) as header:
        width, height = header.size
    return (width, height) if (width > height) == (image.width > image.height) else (height, width)


def _decode_video(sample: Sample, model: RetrievalModel, sampling: FrameSampling) -> _Decoded:
    frames = sampling.read(sample, model.image_size)
    pixels = torch.stack([model.transform(image) for image in frames.images])
    info = frames.info
    return _Decoded(sample, pixels, tuple(frames.times), content_hash(sample), info.width, info.height, frames.duration)


def _encode(
    decoded: Iterable[_Decoded], model: RetrievalModel, batch_size: int, stopwatch: Stopwatch
) -> Iterator[tuple[_Decoded, np.ndarray]]:
    """Encode in full batches, whichever samples the frames belong to: (sample, (F, D) float32) in order."""
    waiting: deque[_Decoded] = deque()
    pixels: list[Tensor] = []
    queued = 0
    batches: deque[Future[Tensor]] = deque()
    vectors = np.empty((0, model.dimension), np.float32)

    def take(size: int) -> Tensor:
        nonlocal queued
        joined = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
        pixels[:] = [joined[size:]]
        queued -= size
        return joined[:size]

    def encode(pictures: Tensor) -> Tensor:
        with stopwatch.measure("encoding"):
            return model.encode_images(pictures)

    def settle() -> Iterator[tuple[_Decoded, np.ndarray]]:
        nonlocal vectors
        vectors = np.concatenate([vectors, batches.popleft().result().numpy()])
        while waiting and len(waiting[0].pixels) <= len(vectors):
            ready = waiting.popleft()
            yield ready, vectors[: len(ready.pixels)]
            vectors = vectors[len(ready.pixels) :]

    # On a CPU each batch is one core's; a GPU has one thread, which feeds it while the next batch is gathered.
    threads = torch.get_num_threads() if model.device.type == "cpu" else 1
    with single_core_threads(threads, "encode") as pool:
        for sample in decoded:
            waiting.append(sample)
            pixels.append(sample.pixels)
            queued += len(sample.pixels)
            while queued >= batch_size:
                batches.append(pool.submit(encode, take(batch_size)))
                if len(batches) > threads:
                    yield from settle()
        if queued:
            batches.append(pool.submit(encode, take(queued)))
        while batches:
            yield from settle()


def _pool(decoded: _Decoded, frames: np.ndarray, model: RetrievalModel) -> Embedded:
    """Frame vectors (F, D) -> the vectors of the sample."""
    vectors: np.ndarray = frames
    moments: tuple[Moment, ...] = ()
    if decoded.duration is not None:
        vectors, moments = pool_video(frames, np.array(decoded.times), decoded.duration, model.pool_frames)
    return Embedded(
        decoded.sample, vectors, moments, decoded.content_hash, decoded.width, decoded.height, decoded.duration
    )
