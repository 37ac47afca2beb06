"""Squares of pixels for the training of a visual tokenizer.

Order and augmentation are those of every training (loader.py, pixel_cache.py): what the k-th sample becomes is drawn
from (seed, k), so the state of the data is the number of the step. With `data.cache_side` every picture is decoded
once and kept on the device: 6,000 of them at 112 px are 226 MB, and no step waits for a decoder. Without, loader
processes decode what each step needs. Both give the same squares.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cots.data.device_augmentation import DRAWS
from cots.data.square_transform import SquareTransform
from cots.errors import MediaError, MissingDependency, TrainingError
from pretrain.loader import StepSampler, attempts, none_readable
from pretrain.loader_workers import WorkerLoader
from pretrain.pair_sources import CLIP_FRAMES, PairSource, name_of
from pretrain.pixel_cache import uniform_draws

Bad = tuple[str, str]  # a sample's name, and why it could not be read
_DECODED_AT_ONCE = 32


class SquareFrames(Dataset[Tensor]):
    """The items of several sources, one after another, squashed to squares: (F, 3, R, R) uint8, F = 1 for a picture.

    Raises:
        MediaError: by `[index]`, when an item cannot be decoded.
    """

    def __init__(self, sources: Sequence[PairSource], side: int) -> None:
        self.sources = sources
        self.starts = np.cumsum([0, *(len(source) for source in sources)])
        self.transform = SquareTransform(side)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Tensor:
        source = int(np.searchsorted(self.starts, index, side="right")) - 1
        pair = self.sources[source].read(index - int(self.starts[source]))
        return torch.stack([self.transform(frame) for frame in pair.frames(CLIP_FRAMES, self.transform.size)])


@dataclass
class DecodedPictures:
    """Every item of some sources; those that could not be decoded stand empty, and so do clips without a decoder.

    Attributes:
        frames: (F, 3, R, R) uint8, of all items one after another.
        first: (N + 1,) int64, where the frames of each item begin.
        bad: what could not be decoded.
        left_out: clips that could be, if their decoder were installed.
    """

    frames: Tensor
    first: np.ndarray
    bad: list[Bad]
    left_out: list[Bad]


def decode_all(sources: Sequence[PairSource], side: int, workers: int) -> DecodedPictures:
    """Decode whole sources into memory.

    Raises:
        TrainingError: nothing could be decoded.
    """
    loader = WorkerLoader(_Decoded(SquareFrames(sources, side)), workers, _join, batch_size=_DECODED_AT_ONCE)
    pixels: list[Tensor] = []
    counts: list[int] = []
    bad: list[Bad] = []
    left_out: list[Bad] = []
    for part, part_counts, part_bad, part_left_out in loader:
        pixels.append(part.clone())  # each tensor that comes from a worker holds a file open
        counts += part_counts
        bad += part_bad
        left_out += part_left_out
    if not any(counts):
        name, reason = [*bad, *left_out][0]
        raise TrainingError(f"None of the {len(counts)} items could be decoded, the first: {name}: {reason}.")
    return DecodedPictures(torch.cat(pixels), np.cumsum([0, *counts]), bad, left_out)


_Item = tuple[Tensor, Bad | None, Bad | None]  # frames, or why they are bad, or why they are left out


class _Decoded(Dataset[_Item]):
    def __init__(self, frames: SquareFrames) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> _Item:
        nothing = torch.empty(0, 3, self.frames.transform.size, self.frames.transform.size, dtype=torch.uint8)
        try:
            return self.frames[index], None, None
        except MediaError as error:
            return nothing, (name_of(self.frames.sources, index), error.reason), None
        except MissingDependency as error:
            return nothing, None, (name_of(self.frames.sources, index), str(error))


def _join(items: list[_Item]) -> tuple[Tensor, list[int], list[Bad], list[Bad]]:
    return (
        torch.cat([frames for frames, _, _ in items]),
        [len(frames) for frames, _, _ in items],
        [bad for _, bad, _ in items if bad is not None],
        [left_out for _, _, left_out in items if left_out is not None],
    )


@dataclass
class Squares:
    """A rank's part of a step.

    Attributes:
        pixels: (B, 3, R, R) uint8 on the device, of a clip one frame.
        draws: (B, DRAWS) float32 on the device, uniform in [0, 1), for their augmentation.
        bad: what was replaced by another item.
        numbers: of the items among all of all sources.
    """

    pixels: Tensor
    draws: Tensor
    bad: list[Bad]
    numbers: list[int]


def squares_in_memory(
    pictures: DecodedPictures, sampler: StepSampler, seed: int, device: torch.device
) -> Iterator[Squares]:
    """The squares of each of the sampler's steps, from pictures decoded before."""
    frames = pictures.frames.to(device)
    counts = np.diff(pictures.first)
    good = np.flatnonzero(counts)
    for step in sampler:
        places, items = (np.array(side) for side in zip(*step))
        items = np.where(counts[items] > 0, items, good[items % len(good)])
        draws = uniform_draws(seed, int(places[0]), len(places))
        rows = torch.from_numpy(pictures.first[items] + _frame(draws, counts[items]))
        pixels = frames[rows.to(device, non_blocking=True)]
        yield Squares(pixels, _on_device(draws, device), [], items.tolist())


def squares_from_loader(
    frames: SquareFrames, sampler: StepSampler, seed: int, workers: int, device: torch.device
) -> Iterator[Squares]:
    """As `squares_in_memory`, decoded by loader processes as the steps need them."""
    loader = WorkerLoader(
        _OneFrame(frames, seed),
        workers,
        _stack,
        batch_sampler=sampler,
        pin_memory=device.type == "cuda",
    )
    for pixels, place, numbers, bad in loader:
        draws = uniform_draws(seed, place, len(pixels))
        yield Squares(pixels.to(device, non_blocking=True), _on_device(draws, device), bad, numbers)


class _OneFrame(Dataset[tuple[Tensor, int, int, list[Bad]]]):
    """(place, index) -> a square of the item, or of another one if it is bad; the place; whose it is; the bad ones."""

    def __init__(self, frames: SquareFrames, seed: int) -> None:
        self.frames, self.seed = frames, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int, list[Bad]]:
        place, index = key
        bad: list[Bad] = []
        for actual in attempts(index, len(self.frames)):
            try:
                squares = self.frames[actual]
            except (MediaError, MissingDependency) as error:
                reason = error.reason if isinstance(error, MediaError) else str(error)
                bad.append((name_of(self.frames.sources, actual), reason))
                continue
            chosen = _frame(uniform_draws(self.seed, place, 1), np.array([len(squares)]))[0]
            return squares[chosen], place, actual, bad
        raise none_readable(bad)


def _stack(items: list[tuple[Tensor, int, int, list[Bad]]]) -> tuple[Tensor, int, list[int], list[Bad]]:
    pixels, places, numbers, bad = zip(*items)
    return torch.stack(pixels), places[0], list(numbers), [one for own in bad for one in own]


def _frame(draws: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """One of each item's frames, (B,) int64."""
    return (draws[:, DRAWS] * counts).astype(np.int64)


def _on_device(draws: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(draws[:, :DRAWS].astype(np.float32)).to(device, non_blocking=True)
