"""Collections that are kept as pixels: what is drawn for a sample of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_shards import crossing, picture, write_shard

from cots.config import AugmentationConfig, DataConfig, SourceConfig
from cots.model.caption_tokenizer import WordPieceTokenizer
from pretrain.loader import Batch, StepSampler
from pretrain.pair_sources import open_source
from pretrain.pixel_cache import PixelCache, cached_batches, uniform_draws

WORDS = ("red", "green", "blue", "yellow", "square", "ball", "boat", "on", "and", "black", "white")
CAPTIONS = [f"{one} {other}" for one in WORDS[:5] for other in WORDS[5:9]]
WHOLE = AugmentationConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
SEGMENTS = 10


@pytest.fixture
def load(tmp_path: Path, vocabulary_file: Path) -> Callable[..., tuple[PixelCache, Callable[..., list[Batch]]]]:
    """A cache of some items, and its batches of six."""

    def cache_of(items: list[tuple[str, bytes, dict]], **data: int) -> tuple[PixelCache, Callable[..., list[Batch]]]:
        path = str(write_shard(tmp_path / "a.tar", items))
        config = DataConfig(train=[SourceConfig(path=path)], cache_side=32, workers=0, augmentation=WHOLE, **data)
        sources = [open_source(source) for source in config.train]
        cache = PixelCache(sources, WordPieceTokenizer.from_file(vocabulary_file, 16), config, torch.device("cpu"))

        def batches(rank: int = 0, ranks: int = 1, first: int = 0) -> list[Batch]:
            sampler = StepSampler([len(sources[0])], [1.0], 6, 3, rank, ranks).between(first, 30)
            return list(cached_batches(cache, config, sampler, 32, 3))

        return cache, batches

    return cache_of


@pytest.mark.parametrize("least", [44, 49])
def test_numbers_belong_to_a_place_in_the_training(least: int) -> None:
    """The slow way: those of all places from the first on."""
    width = least + -least % 4
    expected = np.random.Generator(np.random.Philox(key=7)).random((60, width))
    assert np.array_equal(uniform_draws(7, 0, 60, least), expected)
    assert np.array_equal(uniform_draws(7, 23, 5, least), expected[23:28])
    if least == 44:  # what collections of up to 16 captions an item have always drawn
        assert np.array_equal(uniform_draws(7, 23, 5), expected[23:28])


@pytest.mark.parametrize("captions", [CAPTIONS[:3], CAPTIONS])
def test_every_caption_of_an_item_takes_part(
    load: Callable[..., tuple[PixelCache, Callable[..., list[Batch]]]], vocabulary_file: Path, captions: list[str]
) -> None:
    """MSR-VTT has twenty for each clip."""
    items = [(f"{number}.png", picture("red", number), {"captions": captions}) for number in range(6)]
    every = WordPieceTokenizer.from_file(vocabulary_file, 16)(captions, pad_to_max=True)
    assert len({tuple(row) for row in every.tolist()}) == len(captions)

    _, batches = load(items)
    seen = torch.cat([batch.token_ids for batch in batches()])
    assert {tuple(row) for row in seen.tolist()} == {tuple(row) for row in every.tolist()}

    _, batches = load(items, captions_per_item=len(captions))  # as many as there are: each once
    for own in batches()[0].token_ids.view(6, len(captions), -1):
        assert sorted(own.tolist()) == sorted(every.tolist())

    halves = [torch.cat(parts) for parts in zip(*([b.token_ids for b in batches(r, 2, first=20)] for r in range(2)))]
    assert all(torch.equal(batch.token_ids, half) for batch, half in zip(batches()[20:], halves, strict=True))


def test_each_segment_of_a_clip_has_a_moment_of_its_own(
    load: Callable[..., tuple[PixelCache, Callable[..., list[Batch]]]],
) -> None:
    items = [(f"{number}.webp", crossing("red", 2, 0), {"captions": ["a square"]}) for number in range(6)]
    cache, batches = load(items, frames_per_item=SEGMENTS)
    of_each = len(cache.pixels) // 6
    assert of_each == 3 * SEGMENTS
    cache.pixels[:] = (torch.arange(len(cache.pixels)) % of_each).view(-1, 1, 1, 1)  # a frame shows its number
    shown = torch.cat([batch.pixels for batch in batches()])[:, :, 0, 16, 16].long()
    within = shown - 3 * torch.arange(SEGMENTS)
    assert (within.amin(), within.amax()) == (0, 2)
    assert not (within == within[:, :1]).all(dim=1).any()
