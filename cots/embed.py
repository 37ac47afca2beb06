"""Bulk embedding: a stream of samples becomes a stream of unit vectors, in order, with bounded memory.

    for item in embed(iter_samples(["photos/"], on_error=print), load_model(), on_error=print):
        item.sample.path, item.vectors        # (V, D) float32

Threads decode and resize ahead of the model (Pillow, decord and PyAV release the GIL) while the model encodes the batch
before. Frames of neighbouring videos and images share batches. What cannot be read is reported to `on_error`, and is
never a vector.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cots.bad_files import ENOUGH_TO_JUDGE, require_readable
from cots.data.decode_ahead import Decoded, MediaDecoder
from cots.data.device_turns import DeviceTurns
from cots.data.frame_sampling import EVERY_SECOND, FrameSampling
from cots.data.gpu_jpeg import gpu_jpeg_decoder
from cots.data.samples import Sample
from cots.errors import MediaError, ModelError
from cots.model.retrieval_model import RetrievalModel
from cots.moments import Moment, pool_video
from cots.single_core import single_core_threads
from cots.stopwatch import Stopwatch

CPU_BATCH = 4
GPU_BATCH = 128
GPU_ENCODERS = 2
log = logging.getLogger("cots")


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
        on_error: called with each sample that cannot be read, in order, and with each video, as soon as it comes, if
            the model handles none.
        batch_size: pictures that the model encodes at once. By default 128 on a GPU and 4 on a CPU, whose caches do
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
        ModelError: the device has no memory for a single picture.
    """
    batch_size = batch_size or (CPU_BATCH if model.device.type == "cpu" else GPU_BATCH)
    workers = workers or cores()
    stopwatch = stopwatch or Stopwatch()
    started = time.perf_counter()
    done = read = failed = 0
    last: MediaError | None = None

    def tell() -> None:
        if progress is not None:
            progress(Progress(done, failed, total, time.perf_counter() - started))

    gpu_jpegs = gpu_jpeg_decoder(model.square, model.device)
    decoder = MediaDecoder(model.square, frames, workers, batch_size, gpu_jpegs, stopwatch)

    def fail(error: MediaError) -> None:
        nonlocal failed, last
        failed, last = failed + 1, error
        on_error(error)
        tell()
        require_readable(failed, read + failed, max_bad_share, error, enough=ENOUGH_TO_JUDGE)

    def suitable() -> Iterator[Sample]:
        for sample in samples:
            if sample.kind == "video" and not model.handles_video:
                fail(MediaError(sample.path, f"the model {model.name} embeds images only"))
            else:
                yield sample

    def readable() -> Iterator[Decoded]:
        nonlocal read
        for outcome in decoder.decode(suitable()):
            if isinstance(outcome, MediaError):
                fail(outcome)
            else:
                read += 1
                yield outcome

    for decoded, vectors in _Encoder(model, batch_size, stopwatch).encode(readable()):
        embedded = _pool(decoded, vectors, model)
        if np.isfinite(embedded.vectors).all():
            done += 1
            yield embedded
            tell()
        else:
            read -= 1
            fail(MediaError(decoded.sample.path, f"the model {model.name} gives it no finite vector"))
    if last is not None:
        require_readable(failed, read + failed, max_bad_share, last, enough=1)


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


def cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Encoder:
    """Encodes pictures in full batches, whichever samples they belong to.

    Args:
        batch_size: pictures that the model encodes at once; fewer, once the device has had no room for so many.
        stopwatch: told the seconds of "encoding".
    """

    def __init__(self, model: RetrievalModel, batch_size: int, stopwatch: Stopwatch) -> None:
        self._model = model
        self._batch_size = batch_size
        self._most = batch_size
        self._halving = Lock()
        self._stopwatch = stopwatch
        # On a CPU each batch is one core's. A GPU has two threads, so that it goes from one batch to the next at once.
        self._threads = torch.get_num_threads() if model.device.type == "cpu" else GPU_ENCODERS
        self._turns = DeviceTurns(model.device, self._threads)

    def encode(self, decoded: Iterable[Decoded]) -> Iterator[tuple[Decoded, np.ndarray]]:
        """Each sample with the vectors of its pictures, (F, D) float32, in order."""
        waiting: deque[tuple[Decoded, int]] = deque()
        parts: list[Tensor] = []
        queued = 0
        batches: deque[Future[np.ndarray]] = deque()
        vectors = np.empty((0, self._model.dimension), np.float32)

        def settle() -> Iterator[tuple[Decoded, np.ndarray]]:
            nonlocal vectors
            vectors = np.concatenate([vectors, batches.popleft().result()])
            start, stop = 0, len(vectors)
            while waiting and waiting[0][1] <= stop - start:
                ready, count = waiting.popleft()
                yield ready, vectors[start : start + count]
                start += count
            vectors = vectors[start:]

        with single_core_threads(self._threads, "encode") as pool:
            for sample in decoded:
                count = sample.pixels.shape[0]
                waiting.append((sample, count))
                parts.append(sample.pixels)
                queued += count
                while queued >= self._batch_size:
                    batch, parts = _split(parts, self._batch_size)
                    queued -= self._batch_size
                    batches.append(pool.submit(self._encode_batch, batch))
                    if len(batches) > self._threads:
                        yield from settle()
            if queued:
                batches.append(pool.submit(self._encode_batch, parts))
            while batches:
                yield from settle()

    def _encode_batch(self, parts: list[Tensor]) -> np.ndarray:
        with self._stopwatch.measure("encoding"), self._turns.turn():
            pictures = _joined(parts, self._model.device)
            vectors: list[np.ndarray] = []
            done = 0
            while done < len(pictures):
                some = pictures[done : done + self._most]
                try:
                    vectors.append(self._model.encode_images(some).numpy())
                except torch.OutOfMemoryError:
                    size = len(some)
                else:
                    done += len(some)
                    continue
                self._halve(size)  # out of the handler, which keeps what the model had taken
            return np.concatenate(vectors)

    def _halve(self, size: int) -> None:
        if size == 1:
            raise ModelError(
                f"The GPU has no memory for a single picture of {self._model.name}; end the other programs on it, or "
                "embed on the CPU (CUDA_VISIBLE_DEVICES= in the environment)."
            )
        with self._halving:  # two batches may fail at once
            if self._most == self._batch_size:
                log.warning(
                    "The GPU has no memory for %d pictures at once; it goes on with fewer. A smaller batch size, set "
                    "from the start, saves the tries.",
                    size,
                )
            self._most = min(self._most, size // 2)
        torch.cuda.empty_cache()


def _split(parts: list[Tensor], size: int) -> tuple[list[Tensor], list[Tensor]]:
    """The first `size` pictures, and the rest."""
    taken = 0
    for place, part in enumerate(parts):
        taken += len(part)
        if taken >= size:
            cut = len(part) - (taken - size)
            rest = [part[cut:]] if taken > size else []
            return [*parts[:place], part[:cut]], [*rest, *parts[place + 1 :]]
    raise AssertionError(f"{taken} pictures are fewer than {size}")


def _joined(parts: list[Tensor], device: torch.device) -> Tensor:
    """One batch on the device of pictures that lie on it or on the CPU."""
    runs = []
    for kind, run in groupby(parts, key=lambda part: part.device.type):
        pictures = torch.cat(list(run))
        if kind != device.type:
            pictures = pictures.pin_memory().to(device, non_blocking=True)
        runs.append(pictures)
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def _pool(decoded: Decoded, frames: np.ndarray, model: RetrievalModel) -> Embedded:
    """Frame vectors (F, D) -> the vectors of the sample."""
    vectors: np.ndarray = frames
    moments: tuple[Moment, ...] = ()
    if decoded.duration is not None:
        vectors, moments = pool_video(frames, np.array(decoded.times), decoded.duration, model.pool_frames)
    return Embedded(
        decoded.sample, vectors, moments, decoded.content_hash, decoded.width, decoded.height, decoded.duration
    )
