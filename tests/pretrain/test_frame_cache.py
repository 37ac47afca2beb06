"""Clips decoded once, into shards that everything reads."""

import io
import json
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from clip_shards import mp4, picture, write_shard
from PIL import Image

from cots.data.video_io import read_frames
from cots.evaluation.evaluation_set import read_evaluation_set
from pretrain.frame_cache import CacheSettings, main, write_frame_cache
from pretrain.pair_sources import ShardPairs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    clip = {"captions": ["a boat", "a ship"], "group": "boats", "licence": "CC0"}
    return write_shard(
        tmp_path / "clips.tar", [("one.mp4", mp4(), clip), ("two.png", picture("red", 0), {"captions": ["red"]})]
    )


def test_a_cached_clip_shows_what_the_clip_shows_at_the_same_times(source: Path, tmp_path: Path) -> None:
    cache = write_frame_cache([str(source)], tmp_path / "frames" / "clips", CacheSettings(rate=4, quality=95))
    assert (cache.items, cache.failures) == (2, [])
    pairs = ShardPairs([str(path) for path in cache.shards])
    pair = pairs.read(0)
    assert (list(pair.captions), pair.group, pair.is_clip) == (["a boat", "a ship"], "boats", True)
    cached, original = (read_frames(media, shares=[0.1, 0.4, 0.9]) for media in (pair.media, mp4()))
    assert cached.duration == pytest.approx(original.duration, abs=0.01)
    sampled = read_frames(mp4(), interval=0.25)
    for picture_, share in zip(cached.images, (0.1, 0.4, 0.9)):
        expected = np.asarray(sampled.images[int(share * 8)], float)
        assert np.abs(np.asarray(picture_, float) - expected).mean() < 12  # noise, which WebP blurs a little
    assert pairs.read(1).media == picture("red", 0)


def test_evaluation_reads_a_cache_with_its_groups(source: Path, tmp_path: Path) -> None:
    only_clip = write_shard(tmp_path / "clip.tar", [("a.mp4", mp4(), {"captions": ["a boat"], "group": "boats"})])
    (shard,) = write_frame_cache([str(only_clip)], tmp_path / "clips").shards
    items = read_evaluation_set(shard)
    assert items.kind == "video"
    assert items.items[0].label == "group boats"


def test_a_large_clip_becomes_smaller_and_a_small_one_stays(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "clip.tar", [("a.mp4", mp4(), {"captions": ["a boat"]})])
    for side, expected in ((24, (32, 24)), (224, (64, 48))):
        (path,) = write_frame_cache([str(shard)], tmp_path / str(side), CacheSettings(short_side=side)).shards
        with tarfile.open(path) as tar:
            content = tar.extractfile(next(member for member in tar if member.name.endswith(".webp"))).read()
        assert Image.open(io.BytesIO(content)).size == expected


def test_broken_clips_are_named_and_too_many_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = mp4()
    shard = write_shard(
        tmp_path / "clips.tar",
        [("good.mp4", whole, {"captions": ["a"]}), ("broken.mp4", whole[:700], {"captions": ["b"]})],
    )
    assert main([str(shard), "--out", str(tmp_path / "a"), "--max-failures", "0.5"]) == 0
    said = capsys.readouterr()
    assert "1 items in 1 shards" in said.out
    assert "broken.mp4" in said.err
    assert main([str(shard), "--out", str(tmp_path / "b")]) == 1
    assert "1 of 2 items cannot be decoded" in capsys.readouterr().err
    assert main([str(tmp_path / "missing.tar"), "--out", str(tmp_path / "b")]) == 1
    with pytest.raises(SystemExit):
        main([str(shard), "--out", str(tmp_path / "c"), "--workers", "0"])
    assert "must be above 0" in capsys.readouterr().err


def test_fields_of_the_json_are_kept(source: Path, tmp_path: Path) -> None:
    (shard,) = write_frame_cache([str(source)], tmp_path / "clips").shards
    with tarfile.open(shard) as tar:
        documents = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
    assert documents[0] == {"captions": ["a boat", "a ship"], "group": "boats", "licence": "CC0"}


def test_ctrl_c_is_one_line_and_waits_for_no_clip_that_is_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = [(f"{number}.mp4", mp4(), {"captions": ["a boat"]}) for number in range(8)]
    shard = write_shard(tmp_path / "clips.tar", clips)
    begun: list[int] = []

    def slow(number: int, *_: object) -> list[tuple[str, bytes]]:
        begun.append(number)
        if number == 0:
            signal.raise_signal(signal.SIGINT)  # which the main thread gets
        time.sleep(0.5)
        return []

    monkeypatch.setattr("pretrain.frame_cache._members", slow)
    assert main([str(shard), "--out", str(tmp_path / "out"), "--workers", "1"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    assert len(begun) < 4
