"""Decode clips once: shards whose clips are animated WebP of three frames a second, short side 224.

    python -m pretrain.frame_cache "data/clips/train-*.tar" --out runs/frames/clips-train
    cots pretrain configs/finetune_video_text.yaml data.train='runs/frames/clips-train-*.tar' ...

An animated WebP is a video wherever COTS reads one, with Pillow alone: training on the shards needs neither PyAV nor
decord, `cots evaluate` takes them, and nothing else has to know of the cache. Captions, groups and all other fields are
kept; pictures among the clips are copied as they are. A clip that cannot be decoded is named and left out, and past
`--max-failures` the command fails.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from cots.data.media_kind import HEADER_BYTES, sniff
from cots.data.samples import Sample, iter_samples
from cots.data.video_io import Frames, read_frames
from cots.errors import MediaError, SourceError
from pretrain.command import exit_code
from pretrain.whole_shard import Member, write_whole_shard

FRAMES_PER_SECOND = 3.0
SHORT_SIDE = 224
QUALITY = 60
MIN_FRAMES = 4
MAX_FRAMES = 600
SHARD_BYTES = 32 << 20
_ENOUGH_TO_JUDGE = 20


@dataclass
class FrameCache:
    """What a run of `write_frame_cache` left: shards, how many items lie in them, and what could not be decoded."""

    shards: list[Path]
    items: int
    failures: list[MediaError]


@dataclass(frozen=True)
class CacheSettings:
    """Attributes:
    rate: frames a second, though never fewer than MIN_FRAMES of a clip.
    short_side: pixels; smaller clips stay as they are.
    quality: of WebP, 0 to 100.
    """

    rate: float = FRAMES_PER_SECOND
    short_side: int = SHORT_SIDE
    quality: int = QUALITY


def write_frame_cache(
    sources: Sequence[str],
    out: Path,
    settings: CacheSettings = CacheSettings(),
    *,
    workers: int = 2,
    max_bad_share: float = 0.01,
) -> FrameCache:
    """Write the items of sources to OUT-000000.tar and so on, each shard whole or not at all.

    Raises:
        SourceError: a source does not exist, more than `max_bad_share` of the items cannot be decoded, or none can.
    """
    failures: list[MediaError] = []
    cache = FrameCache([], 0, failures)
    out.parent.mkdir(parents=True, exist_ok=True)
    pending: list[Member] = []
    size = 0
    samples = iter_samples(sources, failures.append)
    for members in _encode_all(samples, settings, workers, failures):
        cache.items += 1
        pending += members
        size += sum(len(content) for _, content in members)
        if size >= SHARD_BYTES:
            cache.shards.append(_write_shard(out, len(cache.shards), pending))
            pending, size = [], 0
        if cache.items + len(failures) >= _ENOUGH_TO_JUDGE:
            _judge(cache, max_bad_share)
    if pending:
        cache.shards.append(_write_shard(out, len(cache.shards), pending))
    _judge(cache, max_bad_share)
    return cache


def animated(frames: Frames, quality: int) -> bytes:
    """An animated WebP in which each frame is on screen around the moment that it was taken at."""
    times = np.array(frames.times)
    edges = np.concatenate([[0.0], (times[1:] + times[:-1]) / 2, [frames.duration]])
    lengths = np.diff(np.round(1000 * edges)).astype(int).clip(1).tolist()
    content = io.BytesIO()
    first, *others = frames.images
    # kmax=1: every frame stands alone, so that one can be decoded without those before it
    first.save(
        content, "WEBP", save_all=True, append_images=others, duration=lengths, quality=quality, method=4, kmax=1
    )
    return content.getvalue()


def _encode_all(
    samples: Iterable[Sample], settings: CacheSettings, workers: int, failures: list[MediaError]
) -> Iterator[list[Member]]:
    """The members of each item that can be decoded, in order; threads work a few items ahead."""
    numbered = enumerate(samples)
    with ThreadPoolExecutor(workers) as pool:
        ahead: list[Future[list[Member]]] = []
        try:
            while True:
                ahead += [pool.submit(_members, *item, settings) for item in islice(numbered, 4 * workers - len(ahead))]
                if not ahead:
                    return
                try:
                    yield ahead.pop(0).result()
                except MediaError as error:
                    failures.append(error)
        finally:
            for waiting in ahead:
                waiting.cancel()


def _members(number: int, sample: Sample, settings: CacheSettings) -> list[Member]:
    """(name, content) of an item's media and captions.

    Raises:
        MediaError: it cannot be decoded.
    """
    key = f"{number:07}_{Path(sample.path).name.partition('.')[0]}"
    if sample.kind == "video":
        frames = read_frames(
            sample.media(),
            interval=1 / settings.rate,
            min_frames=MIN_FRAMES,
            max_frames=MAX_FRAMES,
            short_side=settings.short_side,
            name=sample.path,
        )
        content, extension = animated(frames, settings.quality), "webp"
        if sniff(content[:HEADER_BYTES], "", lambda: io.BytesIO(content)) != "video":
            raise MediaError(sample.path, "all its frames are the same: it is a picture, not a clip")
    else:
        content, extension = sample.read_bytes(), Path(sample.path).suffix[1:].lower()
    fields = {"captions": list(sample.captions), **sample.extra}
    return [(f"{key}.{extension}", content), (f"{key}.json", json.dumps(fields).encode())]


def _write_shard(out: Path, number: int, members: list[Member]) -> Path:
    path = out.with_name(f"{out.name}-{number:06}.tar")
    write_whole_shard(path, members)
    return path


def _judge(cache: FrameCache, max_bad_share: float) -> None:
    seen = cache.items + len(cache.failures)
    if not cache.items or len(cache.failures) > max_bad_share * seen:
        last = f"; the last: {cache.failures[-1]}" if cache.failures else ""
        raise SourceError(
            f"{len(cache.failures)} of {seen} items cannot be decoded, more than the allowed share of "
            f"{max_bad_share:g}{last}."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="shards, folders, tables; globs in quotes")
    parser.add_argument("--out", type=Path, required=True, help="shards are OUT-000000.tar, ...")
    parser.add_argument("--rate", type=float, default=FRAMES_PER_SECOND, help="frames a second")
    parser.add_argument("--short-side", type=int, default=SHORT_SIDE, help="pixels")
    parser.add_argument("--quality", type=int, default=QUALITY, help="of WebP")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode and encode")
    parser.add_argument("--max-failures", type=float, default=0.01, help="share of items that may be left out")
    given = parser.parse_args(arguments)
    if min(given.rate, given.short_side, given.workers) <= 0:
        parser.error("--rate, --short-side and --workers must be above 0")
    settings = CacheSettings(given.rate, given.short_side, given.quality)

    def fill() -> None:
        cache = write_frame_cache(
            given.sources, given.out, settings, workers=given.workers, max_bad_share=given.max_failures
        )
        for failure in cache.failures:
            print(f"left out: {failure}", file=sys.stderr)
        size = sum(shard.stat().st_size for shard in cache.shards) / 1e6
        print(f"{cache.items} items in {len(cache.shards)} shards, {size:.1f} MB; {len(cache.failures)} left out")

    return exit_code(fill)


if __name__ == "__main__":
    sys.exit(main())
