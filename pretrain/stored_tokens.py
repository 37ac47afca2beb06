"""Training on visual tokens that lie in the shards beside their pictures, where `python -m pretrain.tokenize` put them.

They are those of the whole picture or its mirror image, so that is what the tower is shown: the whole picture, squeezed
into a square (by a tower that otherwise sees the middle of a picture, `resize: crop`, too), mirrored at random. Crops,
and whatever else moves or removes parts of a picture, would need other tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cots.config import AugmentationConfig, DataConfig
from cots.data.square_transform import SquareTransform
from cots.data.transforms import mentions_side
from cots.data.visual_tokens import stored_tokens
from cots.errors import ConfigError, SourceError
from cots.model.caption_tokenizer import CaptionTokenizer
from pretrain.loader import Batch, StepSampler, TrainingPairs, collate, item_id
from pretrain.loader_workers import WorkerLoader
from pretrain.pair_sources import PairSource

_NEEDED: dict[str, Any] = {"crop_scale": (1.0, 1.0), "rand_augment": 0, "grayscale": 0, "erase": 0, "drop_words": 0}


class TokenizedPairs(TrainingPairs):
    """As TrainingPairs, of pictures seen whole; the visual tokens, (grid * grid,) int64, stand behind the item id.

    Args:
        size: side of the square in pixels.
        grid: patches a side.
        fingerprint: of the visual tokenizer that the tokens must come from.

    Raises:
        ConfigError: the configuration shows pictures otherwise than whole.
        SourceError: by `[key]`, when a pair has no such tokens beside it.
    """

    def __init__(
        self,
        sources: Sequence[PairSource],
        tokenizer: CaptionTokenizer,
        config: DataConfig,
        size: int,
        grid: int,
        fingerprint: str,
        seed: int,
    ) -> None:
        _refuse_parts_of_pictures(config)
        square = SquareTransform(size)
        super().__init__(sources, tokenizer, square, config.captions_per_item, 1, seed, size)
        self.square, self.flip = square, config.augmentation.flip
        self.grid, self.fingerprint = grid, fingerprint

    def _load(self, index: int) -> tuple[Any, ...]:
        source, own = self._locate(index)
        pair = source.read(own)
        captions = self._draw_captions(pair)
        mirrored = bool(torch.rand(()) < self.flip) and not any(mentions_side(caption) for caption in captions)
        try:
            tokens = stored_tokens(pair.stored, self.grid, self.fingerprint, mirrored)
        except SourceError as error:
            raise SourceError(f"{source.name(own)}: {error}.") from error
        pixels = self.square(pair.frames(1, self.target_size)[0])
        if mirrored:
            pixels = pixels.flip(-1)
        token_ids = self.tokenizer(captions, pad_to_max=True)
        return pixels[None], token_ids, item_id(pair, index), torch.from_numpy(tokens)


def tokenized_loader(pairs: TokenizedPairs, workers: int, sampler: StepSampler, *, pin_memory: bool) -> WorkerLoader:
    """A loader of this rank's `Batch`, visual tokens among it, for each of the sampler's steps."""
    return WorkerLoader(pairs, workers, _collate, batch_sampler=sampler, pin_memory=pin_memory)


def _collate(items: list[tuple[Any, ...]]) -> Batch:
    tokens: list[Tensor] = [item[3] for item in items]
    return replace(collate([(*item[:3], *item[4:]) for item in items], frames=1), visual_tokens=torch.stack(tokens))


def _refuse_parts_of_pictures(config: DataConfig) -> None:
    augmentation: AugmentationConfig = config.augmentation
    for name, needed in _NEEDED.items():
        if getattr(augmentation, name) != needed:
            shown = list(needed) if isinstance(needed, tuple) else needed
            raise ConfigError(
                "objective.masked_modeling.stored_tokens takes the tokens of whole pictures; set "
                f"data.augmentation.{name}={shown}, or stored_tokens=false to compute them on the fly."
            )
    if config.cache_side is not None or config.frames_per_item > 1:
        name = "cache_side=null" if config.cache_side is not None else "frames_per_item=1"
        raise ConfigError(
            f"objective.masked_modeling.stored_tokens reads them from shards, picture by picture; set data.{name}, or "
            "stored_tokens=false to compute them on the fly."
        )
