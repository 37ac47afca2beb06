"""Collections that fit in memory, decoded once: pixels on the device, batches without a loader.

As in loader.py, what a sample becomes is drawn from (seed, its place in the training): the k-th sample of a training
is the same for any number of ranks, and a run can go on at any step.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cots.config import DataConfig
from cots.data.device_augmentation import DRAWS, DeviceAugmentation
from cots.data.square_transform import SquareTransform
from cots.data.transforms import mentions_side
from cots.errors import MediaError, SourceError
from cots.model.caption_tokenizer import CaptionTokenizer
from pretrain.loader import Batch, StepSampler, item_id
from pretrain.pair_sources import CLIP_FRAMES, PairSource
from pretrain.read_all import read_all

_CAPTIONS, _FRAMES = 16, 8  # random numbers that each sample has for its captions and frames, where none needs more
_SEGMENT_FRAMES = 3  # of a clip are kept for each frame that a step draws from it
_PHILOX_WORDS = 4  # random numbers that one step of numpy's Philox counter gives


class PixelCache:
    """Pixels and word pieces of every pair of some sources.

    Items keep the numbers that they have in the sources; those that cannot be read stand empty and are named in `bad`.

    Attributes:
        pixels: (F, 3, R, R) uint8 on the device, the frames of all items one after another.
        first_frame: (N + 1,) int64, where each item's frames begin.
        token_ids: (T, L) int64 on the device, the captions of all items one after another.
        first_caption: (N + 1,) int64, where each item's captions begin.
        item_ids: (N,) int64, equal for items that are relevant to each other's captions.
        sided: (N,) bool, a caption says left or right.
        bad: name and reason of items that cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[PairSource],
        tokenizer: CaptionTokenizer,
        config: DataConfig,
        device: torch.device,
    ) -> None:
        assert config.cache_side is not None
        items = _Squares(sources, config.cache_side, config.frames_per_item)
        frames: list[Tensor] = []
        captions: list[list[str]] = []
        self.bad: list[tuple[str, str]] = []
        item_ids: list[int] = []
        for squares, own, common, problem in read_all(items, config.workers):
            frames.append(squares)
            item_ids.append(common)
            captions.append(own)
            if problem is not None:
                self.bad.append(problem)
        self.pixels = torch.cat(frames).to(device)
        self.first_frame = _starts([len(part) for part in frames])
        texts = [text for own in captions for text in own]
        self.token_ids = tokenizer(texts, pad_to_max=True).to(device)
        self.first_caption = _starts([len(own) for own in captions])
        self.sided = np.array([any(mentions_side(text) for text in own) for own in captions])
        self.item_ids = np.array(item_ids)
        self.device = device

    def __len__(self) -> int:
        return len(self.sided)


class _Squares(Dataset[tuple[Tensor, list[str], int, tuple[str, str] | None]]):
    """Item -> ((F, 3, R, R) uint8, captions, item id, name and reason if it cannot be read)."""

    def __init__(self, sources: Sequence[PairSource], side: int, frames_per_item: int) -> None:
        self.items = [(source, index) for source in sources for index in range(len(source))]
        self.side = side
        self.transform = SquareTransform(side)
        self.clip_frames = max(CLIP_FRAMES, _SEGMENT_FRAMES * frames_per_item)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> tuple[Tensor, list[str], int, tuple[str, str] | None]:
        source, index = self.items[place]
        try:
            pair = source.read(index)
            frames = torch.stack([self.transform(frame) for frame in pair.frames(self.clip_frames, self.side)])
            return frames, list(pair.captions), item_id(pair, place), None
        except MediaError as error:
            nothing = torch.empty(0, 3, self.side, self.side, dtype=torch.uint8)
            return nothing, [], place, (source.name(index), error.reason)


def cached_batches(
    cache: PixelCache, config: DataConfig, sampler: StepSampler, image_size: int, seed: int
) -> Iterator[Batch]:
    """This rank's `Batch` for each of the sampler's steps, made on the device.

    Raises:
        SourceError: nothing could be read.
        ConfigError: the augmentation cannot be done on the device (see `DeviceAugmentation`).
    """
    augment = DeviceAugmentation(image_size, config.augmentation)
    frame_counts, caption_counts = np.diff(cache.first_frame), np.diff(cache.first_caption)
    good = np.flatnonzero((frame_counts > 0) & (caption_counts > 0))
    if len(good) == 0:
        raise SourceError("None of the training items could be read.")
    most, behind_captions = config.frames_per_item, DRAWS + max(_CAPTIONS, int(caption_counts.max()))
    drawn = behind_captions + max(_FRAMES, most)
    for step in sampler:
        places, items = (np.array(side) for side in zip(*step))
        draws = uniform_draws(seed, int(places[0]), len(places), drawn)
        readable = (frame_counts[items] > 0) & (caption_counts[items] > 0)
        items = np.where(readable, items, good[items % len(good)])
        captions = _choose_captions(draws[:, DRAWS:behind_captions], caption_counts[items], config.captions_per_item)
        token_rows = (cache.first_caption[items][:, None] + captions).reshape(-1)
        counts = np.where(frame_counts[items] == 1, 1, most)
        frames = _choose_frames(draws[:, behind_captions : behind_captions + most], frame_counts[items])
        shown = np.arange(most) < counts[:, None]
        pixel_rows = (cache.first_frame[items][:, None] + frames)[shown]

        def on_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(cache.device, non_blocking=True)

        own = on_device(draws[:, :DRAWS].astype(np.float32).repeat(counts, axis=0))
        pixels = augment(cache.pixels[on_device(pixel_rows)], own, on_device((~cache.sided[items]).repeat(counts)))
        if most > 1:
            first = np.cumsum(counts) - counts
            pixels = pixels[on_device(first[:, None] + np.arange(most) % counts[:, None])]
        yield Batch(
            pixels,
            cache.token_ids[on_device(token_rows)],
            on_device(cache.item_ids[items]),
            counts=None if most == 1 else tuple(counts.tolist()),
            numbers=items.tolist(),
        )


def uniform_draws(seed: int, place: int, count: int, least: int = DRAWS + _CAPTIONS + _FRAMES) -> np.ndarray:
    """(count, M) uniform numbers in [0, 1), M at least `least`: row k belongs to the sample at place + k of the
    training, whoever asks. M decides which numbers they are."""
    width = least + -least % _PHILOX_WORDS
    philox = np.random.Philox(key=seed)
    philox.advance(place * width // _PHILOX_WORDS)
    return np.random.Generator(philox).random((count, width))


def _choose_captions(draws: np.ndarray, counts: np.ndarray, wanted: int) -> np.ndarray:
    """(B, wanted) places among each item's captions: different ones as long as there are enough."""
    scores = np.where(np.arange(draws.shape[1]) < counts[:, None], draws, 2)
    return np.take_along_axis(scores.argsort(axis=1), np.arange(wanted) % counts[:, None], axis=1)


def _choose_frames(draws: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(B, F) places among each item's frames, one in each of F equal segments."""
    segments = draws.shape[1]
    return ((np.arange(segments) + draws) / segments * counts[:, None]).astype(np.int64)


def _starts(counts: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *counts])
