"""Recall on the validation pairs, during training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cots.config import SourceConfig
from cots.data.square_transform import SquareTransform
from cots.errors import ConfigError
from cots.evaluation.metrics import recall_sum, retrieval_metrics
from cots.model.caption_tokenizer import CaptionTokenizer
from cots.model.dual_encoder import DualEncoder
from pretrain.loader import ValidationFrames, captions_of, open_source

Metrics = dict[str, dict[str, float]]


@dataclass
class _ValidationSet:
    """Attributes:
    frames: (F, 3, S, S) uint8 of all items, `item_of_frame` (F,) int64 the item of each.
    token_ids: (T, L) int64 of all captions, `item_of_caption` (T,) int64.
    """

    path: str
    frames: Tensor
    item_of_frame: Tensor
    token_ids: Tensor
    item_of_caption: Tensor


class Validation:
    """The validation sources, decoded once and kept as uint8 pixels in memory.

    Raises:
        ConfigError: a source is named like a test split, on which no checkpoint may be chosen.
    """

    def __init__(
        self, sources: Sequence[SourceConfig], tokenizer: CaptionTokenizer, transform: SquareTransform, workers: int
    ) -> None:
        self._sets: list[_ValidationSet] = []
        for config in sources:
            refuse_test_split(config.path)
            source = open_source(config)
            captions, item_of_caption = captions_of(source)
            frames = ValidationFrames(source, transform)
            items = list(DataLoader(frames, batch_size=None, num_workers=workers, generator=torch.Generator()))
            counts = torch.tensor([len(frames) for frames in items])
            item_of_frame = torch.arange(len(items)).repeat_interleave(counts)
            token_ids = tokenizer(captions, pad_to_max=True)
            self._sets.append(_ValidationSet(config.path, torch.cat(items), item_of_frame, token_ids, item_of_caption))

    @torch.inference_mode()
    def measure(self, encoder: DualEncoder, device: torch.device) -> dict[str, Metrics]:
        """Recall of an encoder (in evaluation mode) on every source.

        Returns {path: {"text_to_image": {..}, "image_to_text": {..}}}.

        In float32, as `cots evaluate` on a CPU: bf16 moves R@1 by a point either way.
        """
        results: dict[str, Metrics] = {}
        for pairs in self._sets:
            pictures, pieces = pairs.frames.split(256), pairs.token_ids.split(1024)
            frames = torch.cat([encoder.encode_image(part.to(device)).embedding for part in pictures]).cpu()
            texts = torch.cat([encoder.encode_text(part.to(device)).embedding for part in pieces]).cpu()
            count = int(pairs.item_of_frame[-1]) + 1
            items = F.normalize(torch.zeros(count, frames.shape[1]).index_add_(0, pairs.item_of_frame, frames), dim=1)
            scores = texts @ items.T
            relevance = pairs.item_of_caption[:, None] == torch.arange(count)
            results[pairs.path] = {
                "text_to_image": retrieval_metrics(scores, relevance),
                "image_to_text": retrieval_metrics(scores.T, relevance.T),
            }
        return results


def refuse_test_split(path: str) -> None:
    """Raise ConfigError if a validation source is named like a test split."""
    if "test" in Path(path).name.lower():
        raise ConfigError(f"{path} is named like a test split; checkpoints are chosen on validation pairs only.")


def criterion(results: dict[str, Metrics]) -> float:
    """What the best checkpoint has most of: RSum, averaged over the sources."""
    return sum(recall_sum(*metrics.values()) for metrics in results.values()) / len(results)
