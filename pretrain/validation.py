"""Recall on the validation pairs, during training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cots.config import SourceConfig
from cots.data.square_transform import SquareTransform
from cots.errors import ConfigError, MediaError, SourceError
from cots.evaluation.metrics import rank_embeddings, recall_sum, summary
from cots.model.caption_tokenizer import CaptionTokenizer
from cots.model.dual_encoder import DualEncoder
from pretrain.loader import item_id
from pretrain.pair_sources import Pair, PairSource, open_source
from pretrain.read_all import read_all
from pretrain.unusable import entries_left_out

Metrics = dict[str, dict[str, float]]
_WHOLE = "every item of data.validation must be readable, so that results compare; mend it or take it out"


class ValidationFrames(Dataset[Tensor]):
    """Pictures (one frame) and clips of a source through the exact transform: (F, 3, S, S) uint8.

    A bad one is an error: recall over fewer items could not be compared.
    """

    def __init__(self, source: PairSource, transform: SquareTransform) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        try:
            frames = self.source.read(index).evaluation_frames(self.transform.size)
        except MediaError as error:
            raise MediaError(self.source.name(index), f"{error.reason}; {_WHOLE}") from error
        return torch.stack([self.transform(frame) for frame in frames])


@dataclass
class SourceCaptions:
    """All captions of a source.

    Attributes:
        texts: T captions, item by item.
        owners: (T,) int64, the item of each.
        labels: (N,) int64, equal for items of one group.
        clips: (N,) bool.
    """

    texts: list[str]
    owners: Tensor
    labels: Tensor
    clips: Tensor


def captions_of(source: PairSource) -> SourceCaptions:
    """Read the captions of every item of a source, and which items they belong to."""
    pairs = [_read(source, index) for index in range(len(source))]
    texts = [text for pair in pairs for text in pair.captions]
    owners = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(pair.captions) for pair in pairs]))
    labels = torch.tensor([item_id(pair, number) for number, pair in enumerate(pairs)])
    return SourceCaptions(texts, owners, labels, torch.tensor([pair.is_clip for pair in pairs]))


def _read(source: PairSource, index: int) -> Pair:
    try:
        return source.read(index)
    except MediaError as error:
        raise MediaError(source.name(index), f"{error.reason}; {_WHOLE}") from error


@dataclass
class _ValidationSet:
    """Attributes:
    kind: of all items; "image" if they are mixed.
    frames: (F, 3, S, S) uint8 of all items, item by item.
    counts: (N,) int64, how many of them belong to each item.
    labels: (N,) int64, equal for items that are relevant to each other's captions.
    token_ids: (T, L) int64 of all captions, `item_of_caption` (T,) int64.
    """

    path: str
    kind: str
    frames: Tensor
    counts: Tensor
    labels: Tensor
    token_ids: Tensor
    item_of_caption: Tensor


class Validation:
    """The validation sources, decoded once and kept as uint8 pixels in memory.

    Raises:
        ConfigError: a source is named like a test split, on which no checkpoint may be chosen.
        SourceError, MediaError: a source is not whole.
    """

    def __init__(
        self, sources: Sequence[SourceConfig], tokenizer: CaptionTokenizer, transform: SquareTransform, workers: int
    ) -> None:
        self._sets: list[_ValidationSet] = []
        for config in sources:
            source = open_validation_source(config)
            captions = captions_of(source)
            frames = ValidationFrames(source, transform)
            items = list(read_all(frames, workers))
            self._sets.append(
                _ValidationSet(
                    config.path,
                    "video" if bool(captions.clips.all()) else "image",
                    torch.cat(items),
                    torch.tensor([len(frames) for frames in items]),
                    captions.labels,
                    tokenizer(captions.texts, pad_to_max=True),
                    captions.owners,
                )
            )

    @torch.inference_mode()
    def measure(self, encoder: DualEncoder, device: torch.device) -> dict[str, Metrics]:
        """Recall of an encoder (in evaluation mode) on every source, as `cots evaluate` measures it: the same frames,
        pooled alike, items of one group relevant to each other's captions, in float32 (bf16 moves R@1 by a point).

        Returns {path: {"text_to_image": {..}, "image_to_text": {..}}}; "video" in place of "image" for clips alone.
        """
        results: dict[str, Metrics] = {}
        for pairs in self._sets:
            pictures, pieces = pairs.frames.split(256), pairs.token_ids.split(1024)
            frames = torch.cat([encoder.encode_image(part.to(device)).embedding for part in pictures])
            texts = torch.cat([encoder.encode_text(part.to(device)).embedding for part in pieces]).cpu()
            items = _pool(encoder, frames, pairs.counts).cpu()
            caption_labels = pairs.labels[pairs.item_of_caption]
            results[pairs.path] = {
                f"text_to_{pairs.kind}": summary(rank_embeddings(texts, items, caption_labels, pairs.labels)),
                f"{pairs.kind}_to_text": summary(rank_embeddings(items, texts, pairs.labels, caption_labels)),
            }
        return results


def _pool(encoder: DualEncoder, frames: Tensor, counts: Tensor) -> Tensor:
    """(F, D) embeddings of all items' frames -> (N, D), items of equally many frames at once."""
    first = counts.cumsum(0) - counts
    pooled = frames.new_empty(len(counts), frames.shape[1])
    for count in counts.unique().tolist():
        own = (counts == count).nonzero().flatten()
        rows = (first[own, None] + torch.arange(count)).to(frames.device)
        pooled[own.to(frames.device)] = encoder.pool_frames(frames[rows])
    return pooled


def open_validation_source(config: SourceConfig) -> PairSource:
    """Open a source, of which no entry may be left out: recall over fewer items could not be compared.

    Raises:
        ConfigError: it is named like a test split.
        SourceError: it does not exist, holds no pair, or has an entry that cannot be used.
    """
    refuse_test_split(config.path)
    source = open_source(config)
    if left_out := entries_left_out(source):
        raise SourceError(
            f"{len(left_out)} of {len(source) + len(left_out)} entries of {config.path} cannot be used, the first: "
            f"{left_out[0]}; a validation source must be whole, or its recalls cannot be compared."
        )
    return source


def refuse_test_split(path: str) -> None:
    """Raise ConfigError if a validation source, or the folder that it lies in, is named like a test split."""
    named = re.search(r"(?<!la)(?<!con)(?<!fas)test", Path(path).name.lower())  # "latest.jsonl" is none
    if named or Path(path).parent.name.lower() in ("test", "test_split", "testset"):
        raise ConfigError(
            f"{path} is named like a test split; checkpoints are chosen on validation pairs only. Name others in "
            "data.validation, or rename it if it is none."
        )


def criterion(results: dict[str, Metrics]) -> float:
    """What the best checkpoint has most of: RSum, averaged over the sources."""
    return sum(recall_sum(*metrics.values()) for metrics in results.values()) / len(results)
