"""What is wrong with a source of pairs, found before training: items that are broken, tiny, there twice, or in training
and validation at once, and captions that the text tower will cut.

Pictures count as the same if their files are, and as near-identical if the signs of the brightness steps in a 9 x 8
miniature (dHash) differ in at most four places and 8 x 8 miniatures in colour agree. On Flickr8k that finds 99 % of
photographs saved again smaller or as a JPEG, and takes no two different ones for the same.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from cots.config import DataConfig, SourceConfig
from cots.data.transforms import TrainingTransform
from cots.errors import MediaError
from cots.model.caption_tokenizer import CaptionTokenizer
from pretrain.loader import target_of_crops
from pretrain.loader_workers import WorkerLoader
from pretrain.pair_sources import CLIP_FRAMES, PairSource
from pretrain.unusable import too_many

TINY = 32
"""Pixels: a picture whose shorter side has fewer shows little."""

_DECODED = 2000  # items of a source that are decoded, spread evenly over it
_HASHING_SECONDS = 15.0  # what reading the other items' files may take, a source
_FEW = 200  # items for which starting worker processes would take longer than decoding
_HASH_DISTANCE = 4
_COLOR_DISTANCE = 3.0  # mean difference of the miniatures' 8-bit values


@dataclass
class ItemFacts:
    """What one item is.

    Attributes:
        digest: of the file's content.
        broken: why it cannot be used; None: it can.
        short_side: pixels, of a large JPEG those that were decoded.
        longest: word pieces of its longest caption, uncut.
        sign: dHash, 64 bits; `miniature`: (8, 8, 3) uint8.
        seconds: that reading, decoding and augmenting took.
    """

    index: int
    digest: bytes = b""
    broken: str | None = None
    short_side: int = 0
    longest: int = 0
    sign: int = 0
    miniature: np.ndarray | None = None
    seconds: float = 0.0


@dataclass
class SourceFacts:
    """What a look at a source found.

    Attributes:
        role: "train" or "validation".
        path, weight: as configured.
        facts: of the items that were decoded.
        digests: content -> the items that have it, of all items that were read.
    """

    role: str
    path: str
    weight: float
    source: PairSource
    facts: list[ItemFacts] = field(default_factory=list)
    digests: dict[bytes, list[int]] = field(default_factory=dict)

    @property
    def hashed(self) -> int:
        return sum(len(indices) for indices in self.digests.values())

    @property
    def broken(self) -> list[ItemFacts]:
        return [fact for fact in self.facts if fact.broken is not None]

    @property
    def tiny(self) -> list[ItemFacts]:
        return [fact for fact in self.facts if fact.broken is None and fact.short_side < TINY]

    def over_long(self, max_length: int) -> list[ItemFacts]:
        """Items with a caption of more word pieces than the text tower takes."""
        return [fact for fact in self.facts if fact.longest > max_length]

    @property
    def repeated(self) -> list[list[int]]:
        """Items that hold the same picture."""
        return [indices for indices in self.digests.values() if len(indices) > 1]

    def stops(self, epochs: float, max_bad_share: float) -> bool:
        """Whether a training of so many epochs draws unreadable items more often than it may, judged by those that
        were decoded."""
        drawn = round(epochs * self.weight * len(self.source))
        return too_many(round(len(self.broken) / len(self.facts) * drawn), drawn, max_bad_share)

    def name(self, index: int) -> str:
        return self.source.name(index)


def look_at(
    role: str,
    configured: SourceConfig,
    source: PairSource,
    tokenizer: CaptionTokenizer | None,
    data: DataConfig,
    image_size: int,
) -> SourceFacts:
    """Decode up to 2,000 items of a source, and read the files of the others for as long as that is quick.

    Args:
        tokenizer: one that cuts nothing; None: captions are not counted.
        image_size: side of the training crops, whose time is part of an item's.
    """
    found = SourceFacts(role, configured.path, configured.weight, source)
    count = len(source)
    chosen = np.unique(np.linspace(0, count - 1, min(count, _DECODED)).round().astype(int)).tolist()
    items = _Items(source, chosen, tokenizer, data, image_size)
    workers = min(data.workers, os.cpu_count() or 1) if len(chosen) > _FEW else 0
    found.facts = list(WorkerLoader(items, workers, batch_size=None))
    for fact in found.facts:
        if fact.digest:
            found.digests.setdefault(fact.digest, []).append(fact.index)
    _hash_rest(found, set(chosen))
    return found


def _hash_rest(found: SourceFacts, done: set[int]) -> None:
    started = time.perf_counter()
    for index in range(len(found.source)):
        if index in done:
            continue
        if time.perf_counter() - started > _HASHING_SECONDS:
            return
        try:
            found.digests.setdefault(_digest(found.source.read(index).media), []).append(index)
        except MediaError:  # the share of broken items is told from those that are decoded
            continue


class _Items(Dataset[ItemFacts]):
    def __init__(
        self,
        source: PairSource,
        indices: Sequence[int],
        tokenizer: CaptionTokenizer | None,
        data: DataConfig,
        image_size: int,
    ) -> None:
        self.source, self.indices, self.tokenizer = source, indices, tokenizer
        self.transform, self.captions = TrainingTransform(image_size, data.augmentation), data.captions_per_item
        self.target_size = target_of_crops(image_size, data.augmentation)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> ItemFacts:
        fact = ItemFacts(self.indices[place])
        started = time.perf_counter()
        try:
            pair = self.source.read(fact.index)
            fact.digest = _digest(pair.media)
            frames = pair.frames(CLIP_FRAMES, self.target_size)
        except MediaError as error:
            fact.broken = error.reason
            return fact
        self.transform(frames[0], list(pair.captions[: self.captions]))
        fact.seconds = time.perf_counter() - started
        picture = frames[len(frames) // 2]
        fact.short_side = min(picture.size)
        fact.sign = difference_hash(picture)
        fact.miniature = np.asarray(picture.resize((8, 8), Image.Resampling.BOX))
        if self.tokenizer is not None:
            fact.longest = self.tokenizer(pair.captions).shape[1]  # padded to the longest
        return fact


def difference_hash(picture: Image.Image) -> int:
    """64 bits: whether each pixel of a 9 x 8 grey miniature is brighter than its right neighbour."""
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (grey[:, :-1] > grey[:, 1:]).flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@dataclass(frozen=True)
class Leak:
    """An item of a validation source that is in a training source too.

    Attributes:
        validation, train: names of the items.
        identical: the files are the same; else the pictures are nearly.
    """

    validation: str
    train: str
    identical: bool


def find_leaks(train: Sequence[SourceFacts], validation: Sequence[SourceFacts]) -> list[Leak]:
    """Validation items whose picture a training source holds, each once, identical files first."""
    leaks: list[Leak] = []
    for held_out in validation:
        leaked: set[int] = set()
        for source in train:
            for digest in held_out.digests.keys() & source.digests.keys():
                twin = source.name(source.digests[digest][0])
                for index in held_out.digests[digest]:
                    if index not in leaked:
                        leaked.add(index)
                        leaks.append(Leak(held_out.name(index), twin, identical=True))
        for source in train:
            for one, other in _near(held_out.facts, source.facts):
                if one.index not in leaked:
                    leaked.add(one.index)
                    leaks.append(Leak(held_out.name(one.index), source.name(other.index), identical=False))
    return sorted(leaks, key=lambda leak: (not leak.identical, leak.validation))


def _near(some: Iterable[ItemFacts], others: Iterable[ItemFacts]) -> list[tuple[ItemFacts, ItemFacts]]:
    """Pairs of items with near-identical pictures."""
    some = [fact for fact in some if fact.miniature is not None]
    others = [fact for fact in others if fact.miniature is not None]
    if not some or not others:
        return []
    signs = np.array([fact.sign for fact in others], dtype=np.uint64)
    miniatures = np.stack([fact.miniature for fact in others if fact.miniature is not None]).astype(np.int16)
    pairs = []
    for fact in some:
        assert fact.miniature is not None
        differing = np.unpackbits((signs ^ np.uint64(fact.sign)).view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
        candidates = np.flatnonzero(differing <= _HASH_DISTANCE)
        apart = np.abs(miniatures[candidates] - fact.miniature.astype(np.int16)).mean(axis=(1, 2, 3))
        if len(candidates) and apart.min() <= _COLOR_DISTANCE:
            pairs.append((fact, others[int(candidates[apart.argmin()])]))
    return pairs


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
