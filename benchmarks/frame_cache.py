"""The frames of a training sample: from clips, and from a frame cache of them.

    OMP_NUM_THREADS=1 python benchmarks/frame_cache.py "data/clips/val-*.tar" [--frames 4] [--rounds 3] [--json OUT]

A sample's frames are one at a random moment of each of as many equal segments, as a training draws them
(pretrain/loader.py): `ShardPairs.read` and `Pair.frames_at`, bytes to pictures, before cropping and scaling. In each
round the same moments of the same clips are asked of both sides, clip by clip in turns, in one process and with one
thread of the decoder, over files of a warm page cache. The cache is written before, by one thread of
`pretrain.frame_cache` as its command does, which is timed too. A clip's time is the median of its rounds; the figures
are means and percentiles over clips.
"""

import argparse
import glob
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from run_facts import run_facts

from pretrain.frame_cache import CacheSettings, write_frame_cache
from pretrain.pair_sources import ShardPairs


def same_clips(pairs: ShardPairs, cached: ShardPairs) -> list[tuple[int, int]]:
    """(Index of a clip, index of its frames in the cache), of all clips that the cache holds."""
    found = []
    for place in range(len(cached)):
        own = int(cached.index.key(place).rpartition("/")[2].partition("_")[0])  # pretrain.frame_cache numbers them
        clip = pairs.read(own)
        assert list(clip.captions) == list(cached.read(place).captions), cached.name(place)
        if clip.is_clip:
            found.append((own, place))
    return found


def milliseconds(pairs: ShardPairs, index: int, shares: list[float]) -> tuple[float, int]:
    """Of reading a clip and decoding its frames at some shares of its duration; and how many there are."""
    started = time.perf_counter()
    frames = pairs.read(index).frames_at(shares)
    return 1000 * (time.perf_counter() - started), len(frames)


def summary(took: list[float]) -> dict[str, float]:
    """Mean, median and 90th percentile over clips."""
    figures = {"mean_ms": np.mean(took), "p50_ms": np.median(took), "p90_ms": np.percentile(took, 90)}
    return {name: round(float(value), 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="of clips; a glob in quotes")
    parser.add_argument("--frames", type=int, default=4, help="of a sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    document: dict[str, Any] = run_facts()
    shards = sorted(glob.glob(arguments.shards))
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        cache = write_frame_cache(shards, Path(scratch) / "frames", CacheSettings(), workers=1)
        writing = time.perf_counter() - started
        pairs, cached = ShardPairs(shards), ShardPairs([str(path) for path in cache.shards])
        clips = same_clips(pairs, cached)
        sizes = [sum(Path(path).stat().st_size for path in paths) for paths in (shards, cache.shards)]
        took: dict[str, list[list[float]]] = {"clips": [[] for _ in clips], "frame cache": [[] for _ in clips]}
        missing = dict.fromkeys(took, 0)
        for _ in range(arguments.rounds):
            for place, (own, other) in enumerate(clips):
                moments = (np.arange(arguments.frames) + random.random(arguments.frames)) / arguments.frames
                for side, source, index in (("clips", pairs, own), ("frame cache", cached, other)):
                    spent, count = milliseconds(source, index, moments.tolist())
                    took[side][place].append(spent)
                    missing[side] += arguments.frames - count
    sides = {
        side: summary([statistics.median(each) for each in rounds]) | {"missing_frames": missing[side]}
        for side, rounds in took.items()
    }
    document |= {
        "clips": len(clips),
        "frames": arguments.frames,
        "rounds": arguments.rounds,
        "megabytes": {side: round(size / 1e6, 2) for side, size in zip(took, sizes)},
        "writing_ms_a_clip": round(1000 * writing / cache.items, 2),
        "sides": sides,
        "ratio_of_means": round(sides["clips"]["mean_ms"] / sides["frame cache"]["mean_ms"], 2),
    }
    print(f"{len(clips)} clips, {arguments.frames} frames of each, ms a sample; {document['megabytes']} MB")
    for side, each in sides.items():
        print(f"{side:12} mean {each['mean_ms']:.2f}, p50 {each['p50_ms']:.2f}, p90 {each['p90_ms']:.2f}")
    print(f"writing the cache: {document['writing_ms_a_clip']:.1f} ms a clip, once")
    print(f"the cache is {document['ratio_of_means']:.1f} times as fast")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
