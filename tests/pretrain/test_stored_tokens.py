"""Visual tokens from the shards against those computed from what the tower is shown."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cots.config import AugmentationConfig, DataConfig, PretrainConfig, SourceConfig
from cots.errors import ConfigError, SourceError
from cots.model.caption_tokenizer import WordPieceTokenizer
from cots.model.visual_tokenizer import VisualTokenizer, load_visual_tokenizer, save_visual_tokenizer
from cots.tokenizer_config import VisualTokenizerConfig
from pretrain.loader import Batch, StepSampler
from pretrain.pair_sources import open_source
from pretrain.stored_tokens import TokenizedPairs, tokenized_loader
from pretrain.tokenize import tokenize_shards
from pretrain.trainer import pretrain

MakeConfig = Callable[..., PretrainConfig]
WHOLE = {"crop_scale": (1.0, 1.0), "flip": 0.0, "color": 0.0}
SIDE, GRID = 64, 4  # of the tiny model's image tower


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> str:
    torch.manual_seed(0)
    shape = VisualTokenizerConfig(codebook_size=32, code_dim=8, width=16, min_width=8, blocks=1, image_size=32)
    save_visual_tokenizer(tmp_path / "tokenizer", VisualTokenizer(shape))
    return str(tmp_path / "tokenizer")


@pytest.fixture
def tokenized(shards: Path, tokenizer_directory: str, tmp_path: Path) -> Path:
    """The training shards with tokens."""
    tokenizer = load_visual_tokenizer(tokenizer_directory)
    both = [shards / "train-0.tar", shards / "train-1.tar"]
    tokenize_shards(both, tokenizer, tmp_path / "tokenized", grid=GRID, image_size=SIDE)
    return tmp_path / "tokenized"


def _data(path: Path, **augmentation: object) -> dict:
    return {"train": [{"path": str(path / "train-*.tar")}], "augmentation": {**WHOLE, **augmentation}}


def _masked(tokenizer_directory: str, stored: bool) -> dict:
    masked = {"image_weight": 1.0, "visual_tokenizer": tokenizer_directory, "stored_tokens": stored}
    return {"contrastive": {"queue_size": 50}, "masked_modeling": masked}


def test_each_picture_comes_with_the_tokens_of_what_is_shown(
    tokenized: Path, tokenizer_directory: str, vocabulary_file: Path
) -> None:
    tokenizer = load_visual_tokenizer(tokenizer_directory)
    source = SourceConfig(path=str(tokenized / "train-*.tar"))
    data = DataConfig(train=[source], augmentation=AugmentationConfig(crop_scale=(1.0, 1.0)))
    sources, words = [open_source(source)], WordPieceTokenizer.from_file(vocabulary_file, 16)
    pairs = TokenizedPairs(sources, words, data, SIDE, GRID, tokenizer.fingerprint(), 3)
    sampler = StepSampler([len(sources[0])], [1.0], 8, 3, 0, 1).between(0, 12)  # two epochs

    def load(workers: int) -> list[Batch]:
        return list(tokenized_loader(pairs, workers, sampler, pin_memory=False))

    alone, shared = load(0), load(2)
    shown: dict[int, list[torch.Tensor]] = {}
    for one, other in zip(alone, shared, strict=True):
        assert one.visual_tokens is not None
        assert other.visual_tokens is not None
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.visual_tokens, other.visual_tokens)
        assert torch.equal(one.visual_tokens, tokenizer.tokens(one.pixels, GRID))
        for number, pixels in zip(one.numbers, one.pixels):
            shown.setdefault(number, []).append(pixels)
    assert any(torch.equal(first, second.flip(-1)) for first, second in shown.values())  # mirrored in one epoch


def test_a_training_on_stored_tokens_takes_the_steps_of_one_that_computes_them(
    make_config: MakeConfig, tokenized: Path, tokenizer_directory: str
) -> None:
    runs = [
        pretrain(make_config(name, data=_data(tokenized), objective=_masked(tokenizer_directory, name == "stored")))
        for name in ("stored", "computed")
    ]
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in runs]
    for name in ("loss", "loss_masked_image"):
        stored, computed = ([row[name] for row in log if name in row] for log in logs)
        assert len(stored) == 12
        assert stored == pytest.approx(computed, rel=1e-4)


def test_what_stored_tokens_cannot_name_is_refused(
    make_config: MakeConfig, tokenized: Path, shards: Path, tokenizer_directory: str
) -> None:
    objective = _masked(tokenizer_directory, True)
    for name, value in (("crop_scale", (0.6, 1.0)), ("rand_augment", 2), ("erase", 0.1)):
        with pytest.raises(ConfigError, match=rf"takes the tokens of whole pictures; set data\.augmentation\.{name}="):
            pretrain(make_config(name, data=_data(tokenized, **{name: value}), objective=objective))
    with pytest.raises(ConfigError, match=r"reads them from shards, picture by picture; set data\.cache_side=null"):
        pretrain(make_config("cached", data={**_data(tokenized), "cache_side": 64}, objective=objective))
    with pytest.raises(SourceError, match=r"train-\d\.tar::\S+: the shard has no tokens 4x4.*pretrain\.tokenize"):
        pretrain(make_config("none", data=_data(shards), objective=objective))
