"""Training on clips mixed with pictures, and validation on clips."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from clip_shards import clip_items, crossing, mp4, picture_items, write_shard

from cots.config import DataConfig, PretrainConfig, SourceConfig
from cots.errors import TrainingError
from cots.evaluation.evaluate import evaluate
from cots.model.caption_tokenizer import WordPieceTokenizer
from cots.model.pretrained import load_model
from pretrain.loader import Batch, StepSampler, training_loader
from pretrain.pair_sources import open_source
from pretrain.pixel_cache import PixelCache, cached_batches
from pretrain.trainer import pretrain

MakeConfig = Callable[..., PretrainConfig]
ROOT = Path(__file__).parents[2]
TEMPORAL = {"kind": "transformer", "depth": 1, "heads": 2, "positions": 4}


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.tar: 12 clips and 12 pictures; val.tar: 12 clips."""
    directory = tmp_path_factory.mktemp("mixed")
    write_shard(directory / "train.tar", [*clip_items(0), *picture_items()])
    write_shard(directory / "val.tar", clip_items(1))
    return directory


@pytest.fixture
def batches(mixed: Path, vocabulary_file: Path) -> Callable[..., list[Batch]]:
    def load(rank: int = 0, ranks: int = 1, path: Path | None = None, cache_side: int | None = None) -> list[Batch]:
        config = DataConfig(
            train=[SourceConfig(path=str(path or mixed / "train.tar"))],
            frames_per_item=3,
            workers=0,
            cache_side=cache_side,
        )
        sources = [open_source(source) for source in config.train]
        tokenizer = WordPieceTokenizer.from_file(vocabulary_file, 16)
        sampler = StepSampler([len(source) for source in sources], [1.0], 8, 3, rank, ranks).between(0, 3)
        if cache_side:
            cache = PixelCache(sources, tokenizer, config, torch.device("cpu"))
            return list(cached_batches(cache, config, sampler, 32, 3))
        return list(training_loader(sources, config, tokenizer, 32, sampler, pin_memory=False))

    return load


@pytest.mark.parametrize("cache_side", [None, 32])
def test_a_picture_counts_one_frame_and_clips_of_a_group_are_no_negatives(
    batches: Callable[..., list[Batch]], cache_side: int | None
) -> None:
    epoch = batches(cache_side=cache_side)
    numbers = [number for batch in epoch for number in batch.numbers]
    counts = [count for batch in epoch for count in batch.counts]
    assert sorted(numbers) == list(range(24))
    assert all(count == (3 if number < 12 else 1) for number, count in zip(numbers, counts))
    ids = dict(zip(numbers, torch.cat([batch.item_ids for batch in epoch]).tolist()))
    assert all((ids[one] == ids[other]) is (one % 4 == other % 4) for one in range(12) for other in range(12))
    assert all(ids[number] == number for number in range(12, 24))
    for batch in epoch:
        assert batch.pixels.shape == (8, 3, 3, 32, 32)
        for clip, count in zip(batch.pixels, batch.counts):
            assert torch.equal(clip[0], clip[1]) is (count == 1)  # a picture's frame stands in for those it lacks


@pytest.mark.parametrize("cache_side", [None, 32])
def test_ranks_see_together_the_clips_of_one(batches: Callable[..., list[Batch]], cache_side: int | None) -> None:
    both = zip(*(batches(rank=rank, ranks=2, cache_side=cache_side) for rank in range(2)))
    for one, (first, second) in zip(batches(cache_side=cache_side), both, strict=True):
        assert torch.equal(one.pixels, torch.cat([first.pixels, second.pixels]))
        assert one.counts == first.counts + second.counts


def test_the_frame_of_a_segment_is_another_one_each_time(batches: Callable[..., list[Batch]], tmp_path: Path) -> None:
    clips = [(f"{n}.webp", crossing("red", 5, 0), {"captions": ["a square"]}) for n in range(24)]
    batch = batches(path=write_shard(tmp_path / "same.tar", clips))[0]
    places = (batch.pixels[:, :, 0] > 128).float().argmax(dim=3).amax(dim=2)  # (B, F), where the square begins
    assert len({tuple(row) for row in places.tolist()}) > 1


def _config(make_config: MakeConfig, mixed: Path, name: str, **changes: dict) -> PretrainConfig:
    sections: dict = {
        "data": {
            "train": [{"path": str(mixed / "train.tar")}],
            "validation": [{"path": str(mixed / "val.tar")}],
            "frames_per_item": 3,
        },
        "objective": {"contrastive": {"queue_size": 16, "in_batch": "online"}},
        "training": {"epochs": 1},
    }
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values}
    if "model" in changes:
        sections["model"] = {**make_config().model.model_dump(), **changes["model"]}
    return make_config(name, **sections)


@pytest.mark.parametrize("temporal", [{}, TEMPORAL])
def test_validation_gives_the_numbers_of_cots_evaluate(make_config: MakeConfig, mixed: Path, temporal: dict) -> None:
    run = pretrain(_config(make_config, mixed, "run", model={"temporal": temporal}))
    row = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    found = row["validation"][str(mixed / "val.tar")]
    expected = evaluate(mixed / "val.tar", load_model(str(run), device="cpu")).directions
    assert found == {
        way: pytest.approx({name: figures[name] for name in found[way]}, abs=1e-9) for way, figures in expected.items()
    }
    assert set(found) == {"text_to_video", "video_to_text"}


def test_two_processes_with_clips_take_the_steps_of_one(make_config: MakeConfig, mixed: Path, tmp_path: Path) -> None:
    losses = []
    for processes in (1, 2):
        config = _config(make_config, mixed, f"of-{processes}", model={"temporal": {**TEMPORAL, "dropout": 0.0}})
        path = tmp_path / f"{processes}.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "pretrain"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launcher, str(path)], cwd=ROOT, env=environment, check=True)
        rows = [json.loads(line) for line in (Path(config.training.output) / "log.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-4)


def test_a_batch_in_parts_has_the_loss_of_the_whole(make_config: MakeConfig, mixed: Path) -> None:
    losses = []
    for parts in (1, 4):
        model = {"temporal": {**TEMPORAL, "dropout": 0.0}}
        run = pretrain(_config(make_config, mixed, f"in-{parts}", model=model, training={"accumulation": parts}))
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-4)


def test_a_clip_that_does_not_decode_is_named_and_many_end_the_training(
    batches: Callable[..., list[Batch]], make_config: MakeConfig, tmp_path: Path
) -> None:
    whole = mp4()
    broken = ("broken.mp4", whole[: len(whole) // 3], {"captions": ["a truck"]})
    path = write_shard(tmp_path / "a.tar", [*clip_items(0), ("whole.mp4", whole, {"captions": ["a boat"]}), broken])
    loaded = batches(path=path)
    assert {name.rpartition("::")[2] for batch in loaded for name, _ in batch.bad} == {"broken"}
    assert all(len(batch.item_ids) == 8 for batch in loaded)
    config = make_config(
        "bad",
        data={"train": [{"path": str(path)}], "validation": [], "frames_per_item": 3, "max_bad_share": 0.0},
    )
    with pytest.raises(TrainingError, match=r"1 of \d+ samples could not be read.*broken"):
        pretrain(config)
