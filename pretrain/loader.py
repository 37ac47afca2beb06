"""Pairs for training: deterministic, resumable at any step, the same for any number of ranks and workers.

The order of an epoch is a permutation drawn from (seed, epoch); a sample's augmentation is drawn from (seed, its
place in the training). A global batch is a slice of that order and each rank takes its part of it, so two ranks see
together exactly what one would, and the state of the loader is the number of the step. Shards are read by random
access: their number need not fit the number of ranks or workers.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cots.config import AugmentationConfig, DataConfig
from cots.data.transforms import TrainingTransform
from cots.errors import MediaError, TrainingError
from cots.model.caption_tokenizer import CaptionTokenizer
from pretrain.epochs import Epochs
from pretrain.loader_workers import WorkerLoader
from pretrain.pair_sources import Pair, PairSource, name_of

ATTEMPTS = 16  # items that are tried for a sample: its own, and others in place of what cannot be read


@dataclass
class Batch:
    """Attributes:
    pixels: (B, 3, S, S) uint8, or (B, F, 3, S, S) with several frames an item.
    token_ids: (B * captions_per_item, L) int64, the captions of an item side by side.
    item_ids: (B,) int64, equal for items that are relevant to each other's captions: those are no negatives.
    bad: name and reason of samples that could not be read and were replaced by others.
    counts: how many of its F frames each of the B items has of its own: a picture one, a clip F, or fewer if some do
        not decode. The others repeat them, so that a batch has one shape, and whatever is computed of all F (the mean
        colour of a clip, say) is that of the item. Only the frames that count go through the tower (see
        `DualEncoder.encode_video`). None: all F.
    numbers: of the B items among all of all sources.
    visual_tokens: (B, N) int64, of the whole grid, if they are stored with the pictures.
    """

    pixels: Tensor
    token_ids: Tensor
    item_ids: Tensor
    bad: list[tuple[str, str]] = field(default_factory=list)
    counts: tuple[int, ...] | None = None
    numbers: list[int] = field(default_factory=list)
    visual_tokens: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {k: change(value) for k, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)


class TrainingPairs(Dataset[tuple[Any, ...]]):
    """All sources one after another; item (place, index) -> frames (F, 3, S, S), token ids, item id, number of the
    item, bad samples; F is 1 for a picture, at most frames_per_item for a clip. `target_size` is that of `open_image`.
    """

    def __init__(
        self,
        sources: Sequence[PairSource],
        tokenizer: CaptionTokenizer,
        transform: Callable[..., Any],
        captions_per_item: int,
        frames_per_item: int,
        seed: int,
        target_size: int | None = None,
    ) -> None:
        self.sources = sources
        self.frames_per_item = frames_per_item
        self.starts = np.cumsum([0, *(len(source) for source in sources)])
        self.tokenizer = tokenizer
        self.transform = transform
        self.captions_per_item = captions_per_item
        self.seed = seed
        self.target_size = target_size

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        place, index = key
        bad: list[tuple[str, str]] = []
        with torch.random.fork_rng(devices=[]):
            # the CPU's alone: torch.manual_seed seeds every GPU too, whose generators are the model's
            torch.default_generator.manual_seed(_seed_of(self.seed, place))
            for actual in attempts(index, len(self)):
                try:
                    return (*self._load(actual), actual, bad)
                except MediaError as error:
                    bad.append((name_of(self.sources, actual), error.reason))
        raise none_readable(bad)

    def _locate(self, index: int) -> tuple[PairSource, int]:
        source = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sources[source], index - int(self.starts[source])

    def _draw_captions(self, pair: Pair) -> list[str]:
        order = torch.randperm(len(pair.captions)).tolist()
        return [pair.captions[order[draw % len(order)]] for draw in range(self.captions_per_item)]

    def _load(self, index: int) -> tuple[Any, ...]:
        source, own = self._locate(index)
        pair = source.read(own)
        captions = self._draw_captions(pair)
        wanted = self.frames_per_item
        # one moment in each of as many equal segments (TSN, Wang et al. 2016)
        moments = (torch.arange(wanted) + torch.rand(wanted)) / wanted
        frames = pair.frames_at(moments.tolist(), self.target_size)
        seed, pixels = int(torch.randint(2**62, ())), []
        for frame in frames:  # every frame of a clip is cropped and mirrored alike
            torch.default_generator.manual_seed(seed)
            one, thinned = self.transform(frame, captions)
            pixels.append(one)
        return torch.stack(pixels), self.tokenizer(thinned, pad_to_max=True), item_id(pair, index)


def target_of_crops(image_size: int, config: AugmentationConfig) -> int:
    """The `target_size` at which the smallest random crop of any picture still has `image_size` pixels a side, so that
    a large JPEG loses nothing by being decoded smaller."""
    longest = max(1 / config.crop_ratio[0], config.crop_ratio[1])  # aspect of a crop
    share = math.sqrt(config.crop_scale[0] / longest)  # of the short side, where the picture is a square
    return math.ceil(image_size / share / 2)  # `open_image` keeps twice its target


def attempts(index: int, count: int) -> list[int]:
    """An item among `count`, and those that take its place, in turn, if it cannot be read."""
    stride = 7919 if count % 7919 else 1  # a prime, so that the items differ for as long as there are others
    return [(index + attempt * stride) % count for attempt in range(ATTEMPTS)]


def none_readable(bad: Sequence[tuple[str, str]]) -> TrainingError:
    """What ends a training when none of the `attempts` at a sample, of which these are name and reason, succeeds."""
    name, reason = bad[-1]
    return TrainingError(f"{len(bad)} samples in a row could not be read, the last {name}: {reason}.")


def item_id(pair: Pair, number: int) -> int:
    """What an item and others that are relevant to its captions have in common: the hash of their group, above 2**62,
    or the item's own number."""
    return 2**62 + (_seed_of(pair.group) >> 1) if pair.group else number


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The (place, index) of each sample of this rank, step by step; `between` says which steps."""

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        rank: int,
        ranks: int,
    ) -> None:
        self.epochs = Epochs(lengths, weights, batch_size, seed)
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.first_step = self.steps = 0

    def between(self, first_step: int, steps: int) -> "StepSampler":
        """The samples of steps `first_step` to `steps - 1`."""
        part = copy.copy(self)
        part.first_step, part.steps = first_step, steps
        return part

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch_size = self.epochs.batch_size
        share = batch_size // self.ranks
        for step in range(self.first_step, self.steps):
            place = step * batch_size + self.rank * share
            yield [(place + slot, index) for slot, index in enumerate(self.epochs.indices(place, share))]


def training_loader(
    sources: Sequence[PairSource],
    config: DataConfig,
    tokenizer: CaptionTokenizer,
    image_size: int,
    sampler: StepSampler,
    *,
    pin_memory: bool,
) -> WorkerLoader:
    """A loader of this rank's `Batch` for each of the sampler's steps."""
    transform = TrainingTransform(image_size, config.augmentation)
    pairs = TrainingPairs(
        sources,
        tokenizer,
        transform,
        config.captions_per_item,
        config.frames_per_item,
        sampler.seed,
        target_of_crops(image_size, config.augmentation),
    )
    return WorkerLoader(
        pairs,
        config.workers,
        partial(collate, frames=config.frames_per_item),
        batch_sampler=sampler,
        pin_memory=pin_memory,
    )


def collate(items: list[tuple[Any, ...]], frames: int) -> Batch:
    """Items of `TrainingPairs`, of up to so many frames each, as a batch."""
    pixels, token_ids, item_ids, numbers, bad = zip(*items)
    counts = tuple(len(clip) for clip in pixels)
    filled = [clip[torch.arange(frames) % len(clip)] for clip in pixels]
    return Batch(
        torch.cat(filled) if frames == 1 else torch.stack(filled),
        torch.cat(token_ids),
        torch.tensor(item_ids),
        [one for many in bad for one in many],
        None if frames == 1 else counts,
        list(numbers),
    )


def _seed_of(*values: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little") >> 1
