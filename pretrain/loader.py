"""Pairs for training: deterministic, resumable at any step, the same for any number of ranks and workers.

The order of an epoch is a permutation drawn from (seed, epoch); a sample's augmentation is drawn from (seed, its
place in the training). A global batch is a slice of that order and each rank takes its part of it, so two ranks see
together exactly what one would, and the state of the loader is the number of the step. Shards are read by random
access: their number need not fit the number of ranks or workers.
"""

import copy
import glob
import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cots.config import DataConfig, SourceConfig
from cots.data.image_io import open_image
from cots.data.media_kind import HEADER_BYTES, MEDIA_EXTENSIONS, sniff
from cots.data.samples import Sample, iter_samples
from cots.data.shards import MEMBER_SEPARATOR, TarIndex, read_captions
from cots.data.tables import plain_fields
from cots.data.transforms import TrainingTransform
from cots.errors import MediaError, SourceError, TrainingError
from cots.model.caption_tokenizer import CaptionTokenizer
from pretrain.loader_workers import WorkerLoader

_SUBSTITUTES = 16
CLIP_FRAMES = 4


@dataclass
class Pair:
    """Attributes:
    media: a picture's or a clip's bytes.
    captions: of it.
    group: items of one group are relevant to each other's captions; empty: those of this item only.
    stored: whatever else lies under its key in a shard, by extension.
    """

    media: bytes
    captions: Sequence[str]
    group: str = ""
    stored: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def is_clip(self) -> bool:
        return sniff(self.media[:HEADER_BYTES], "", lambda: io.BytesIO(self.media)) == "video"

    def frames(self, count: int) -> list[Image.Image]:
        """The picture, or `count` frames of the clip, spread evenly.

        Raises:
            MediaError: it cannot be decoded.
        """
        return self.frames_at([(place + 0.5) / count for place in range(count)])

    def frames_at(self, shares: Sequence[float]) -> list[Image.Image]:
        """The picture, or the clip's frames at some shares of its duration; those that do not decode are missing.

        Raises:
            MediaError: none can be decoded.
        """
        if not self.is_clip:
            return [open_image(self.media)]
        from cots.data.video_io import read_frames

        return read_frames(self.media, shares=shares).images

    def evaluation_frames(self, short_side: int) -> list[Image.Image]:
        """The frames that `cots evaluate` and a gallery embed.

        Raises:
            MediaError: none can be decoded.
        """
        if not self.is_clip:
            return [open_image(self.media, target_size=short_side)]
        from cots.data.frame_sampling import EVERY_SECOND

        return EVERY_SECOND.read_media(self.media, short_side, "").images


class PairSource(Protocol):
    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> Pair:
        """Raises MediaError if there is no picture or no caption."""


@dataclass
class Batch:
    """Attributes:
    pixels: (B, 3, S, S) uint8, or (B, F, 3, S, S) with several frames an item.
    token_ids: (B * captions_per_item, L) int64, the captions of an item side by side.
    item_ids: (B,) int64, equal for items that are relevant to each other's captions: those are no negatives.
    bad: name and reason of samples that could not be read and were replaced by others.
    counts: how many frames each of the B items has: a picture one, a clip F. Behind them its frames are repeated,
        so that whatever is computed of all F (the mean colour of a clip, say) is that of the item. Only the frames
        that count go through the tower (see `DualEncoder.encode_video`); a batch has one shape, and its items fall as
        the order of the epoch has them, the same for any number of ranks. None: all F.
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


class ShardPairs:
    """Pairs of webdataset shards: a picture or clip and a .json with "captions" (or a .txt) under one key."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.index = TarIndex(paths)

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        return f"{self.index.shard(index)}{MEMBER_SEPARATOR}{self.index.keys[index]}"

    def read(self, index: int) -> Pair:
        parts = self.index.read(index)
        try:
            captions, fields = read_captions(parts)
        except ValueError as error:
            raise MediaError("", f"its captions cannot be read ({error})") from error
        media = _media_of(parts)
        if media is None or not captions:
            raise MediaError("", "the shard holds no picture for it" if media is None else "it has no caption")
        captions = tuple(caption.encode(errors="replace").decode() for caption in captions)  # JSON has half characters
        return Pair(media, captions, plain_fields(fields).get("group", ""), parts)


def _media_of(parts: Mapping[str, bytes]) -> bytes | None:
    """The picture or clip of a key, by its extension; else the first member that is no text."""
    named = [extension for extension in parts if extension.rpartition(".")[2] in MEDIA_EXTENSIONS]
    others = [extension for extension in parts if extension not in ("json", "txt", "cls")]
    return parts[(named or others)[0]] if others else None


class TablePairs:
    """Pairs of anything else that `iter_samples` reads, such as a table.

    The samples lie pickled one behind the other: millions of objects would take seconds to send to each worker, and a
    forked one would copy them all, as their references are counted.

    Attributes:
        left_out: what is no readable picture or clip, or has no caption.
    """

    def __init__(self, path: str) -> None:
        self.left_out: list[MediaError] = []
        records: list[bytes] = []
        for sample in iter_samples([path], self.left_out.append):
            if sample.captions:
                records.append(pickle.dumps(tuple(vars(sample).values())))
            else:
                self.left_out.append(MediaError(sample.path, "it has no caption"))
        self._records = b"".join(records)
        self._ends = np.cumsum([0, *map(len, records)])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "left_out": []}  # which is for the user, not for workers

    def __len__(self) -> int:
        return len(self._ends) - 1

    def sample(self, index: int) -> Sample:
        start, end = self._ends[index : index + 2].tolist()
        return Sample(*pickle.loads(self._records[start:end]))

    def name(self, index: int) -> str:
        return self.sample(index).path

    def read(self, index: int) -> Pair:
        sample = self.sample(index)
        return Pair(sample.read_bytes(), sample.captions, sample.extra.get("group", ""))


def name_of(sources: Sequence[PairSource], item: int) -> str:
    """The name of an item, counted through all sources."""
    for source in sources:
        if item < len(source):
            return source.name(item)
        item -= len(source)
    raise IndexError(item)


def open_source(config: SourceConfig) -> PairSource:
    """Open a source of pairs.

    Raises:
        SourceError: it does not exist or holds no pair.
    """
    path, tars = os.path.expanduser(config.path), []
    if path.endswith(".tar"):
        tars = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))  # a name may hold brackets
    source: PairSource = ShardPairs(tars) if tars else TablePairs(config.path)
    if len(source) == 0:
        raise SourceError(f"The source {config.path} holds no pair of a picture and a caption.")
    return source


class TrainingPairs(Dataset[tuple[Any, ...]]):
    """All sources one after another; item (place, index) -> frames (F, 3, S, S), token ids, item id, number of the
    item, bad samples; F is 1 for a picture, at most frames_per_item for a clip."""

    def __init__(
        self,
        sources: Sequence[PairSource],
        tokenizer: CaptionTokenizer,
        transform: Callable[..., Any],
        captions_per_item: int,
        frames_per_item: int,
        seed: int,
    ) -> None:
        self.sources = sources
        self.frames_per_item = frames_per_item
        self.starts = np.cumsum([0, *(len(source) for source in sources)])
        self.tokenizer = tokenizer
        self.transform = transform
        self.captions_per_item = captions_per_item
        self.seed = seed

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        place, index = key
        bad: list[tuple[str, str]] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed_of(self.seed, place))
            for attempt in range(_SUBSTITUTES):
                actual = (index + attempt * 7919) % len(self)
                try:
                    return (*self._load(actual), actual, bad)
                except MediaError as error:
                    bad.append((name_of(self.sources, actual), error.reason))
        raise TrainingError(f"{_SUBSTITUTES} samples in a row could not be read, the last {bad[-1][0]}: {bad[-1][1]}.")

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
        frames = pair.frames_at(((torch.arange(wanted) + torch.rand(wanted)) / wanted).tolist())
        seed, pixels = int(torch.randint(2**62, ())), []
        for frame in frames:  # every frame of a clip is cropped and mirrored alike
            torch.manual_seed(seed)
            one, thinned = self.transform(frame, captions)
            pixels.append(one)
        return torch.stack(pixels), self.tokenizer(thinned, pad_to_max=True), item_id(pair, index)


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
        self.lengths, self.weights = list(lengths), weights
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.ranks = rank, ranks
        self.first_step = self.steps = 0
        self.steps_per_epoch = steps_per_epoch(lengths, weights, batch_size)

    def between(self, first_step: int, steps: int) -> "StepSampler":
        """The samples of steps `first_step` to `steps - 1`."""
        part = copy.copy(self)
        part.first_step, part.steps = first_step, steps
        return part

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.ranks
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first_step, self.steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.lengths, self.weights, self.seed, epoch)
            start = (step % self.steps_per_epoch) * self.batch_size + self.rank * share
            place = step * self.batch_size + self.rank * share
            yield [(place + slot, int(index)) for slot, index in enumerate(order[start : start + share])]


def steps_per_epoch(lengths: Sequence[int], weights: Sequence[float], batch_size: int) -> int:
    """Whole global batches in an epoch.

    Raises:
        SourceError: an epoch has fewer samples than a batch, or none of a source.
    """
    for length, weight in zip(lengths, weights):
        if round(length * weight) == 0:
            raise SourceError(f"{length} items of weight {weight:g} in data.train are none an epoch; raise it.")
    samples = sum(round(length * weight) for length, weight in zip(lengths, weights))
    if samples < batch_size:
        raise SourceError(
            f"An epoch has {samples} samples, fewer than a batch of {batch_size}; lower training.batch_size."
        )
    return samples // batch_size


def epoch_order(lengths: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """Sample indices of an epoch, shuffled: each source repeated by its weight, the fraction of it drawn at random."""
    random = np.random.default_rng([seed, epoch])
    parts = []
    for start, length, weight in zip(np.cumsum([0, *lengths]), lengths, weights):
        whole, rest = divmod(round(length * weight), length)
        parts += [start + part for part in ([np.arange(length)] * whole + [random.permutation(length)[:rest]])]
    return random.permutation(np.concatenate(parts))


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
    pairs = TrainingPairs(sources, tokenizer, transform, config.captions_per_item, config.frames_per_item, sampler.seed)
    return WorkerLoader(
        pairs,
        config.workers,
        partial(collate, frames=config.frames_per_item),
        batch_sampler=sampler,
        pin_memory=pin_memory,
        prefetch_factor=4 if config.workers else None,
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
