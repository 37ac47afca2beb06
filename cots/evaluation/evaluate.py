"""Text-to-image and text-to-video retrieval over a file of captioned items.

    cots evaluate pairs.jsonl --model runs/mine --json result.json

An item that cannot be read stays a candidate that is never found: its captions count as misses, and it is named in
the result. Past a share of such items (default 1 %) the evaluation ends with an error, for its figures would mean
little.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cots.data.samples import Sample, iter_samples
from cots.data.tables import TABLE_EXTENSIONS, read_table
from cots.embed import Embedded, Progress, embed
from cots.errors import EvaluationError, MediaError
from cots.evaluation.metrics import recall_sum, retrieval_metrics
from cots.model.retrieval_model import RetrievalModel

Directions = dict[str, dict[str, float]]


@dataclass
class EvaluationResult:
    """Attributes:
    protocol: what was evaluated: a protocol's name or the file.
    model, fingerprint: of what.
    kind: "image" or "video".
    items, captions: how many took part, unreadable ones included.
    directions: {"text_to_KIND": metrics, "KIND_to_text": metrics}; see `retrieval_metrics`.
    unreadable: items that could not be read; they count as never found.
    seconds: spent on reading and encoding items, on encoding captions, on scoring.
    """

    protocol: str
    model: str
    fingerprint: str
    kind: str
    items: int
    captions: int
    directions: Directions
    unreadable: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The document that `cots evaluate --json` writes."""
        return {
            "protocol": self.protocol,
            "model": self.model,
            "fingerprint": self.fingerprint,
            f"{self.kind}s": self.items,
            "captions": self.captions,
            **self.directions,
            "RSum": recall_sum(*self.directions.values()),
            "unreadable": self.unreadable,
            "seconds": self.seconds,
        }


def evaluate(
    file: str | Path,
    model: RetrievalModel,
    *,
    max_bad_share: float = 0.01,
    batch_size: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> EvaluationResult:
    """Measure retrieval both ways over the items of a file.

    Args:
        file: a table of `{"image" | "video": path, "captions": [..]}` rows (rows of the same path are joined), or any
            other source whose items have captions, such as a webdataset shard.
        model: what embeds them.
        max_bad_share: share of unreadable items above which the evaluation fails.
        batch_size: pictures encoded at once; by default what suits the device.
        progress: called after each item.

    Raises:
        SourceError: the file cannot be used as a source.
        EvaluationError: a row is damaged, an item has no caption, images and videos are mixed, or too many items are
            unreadable.
    """
    problems: list[MediaError] = []
    captions_of, samples = _read_items(Path(file), problems)
    uncaptioned = [path for path, captions in captions_of.items() if not captions]
    if uncaptioned:
        raise EvaluationError(f"{len(uncaptioned)} items of {file} have no caption, the first is {uncaptioned[0]}.")
    kinds = {sample.kind for sample in samples}
    if len(kinds) != 1:
        found = "neither images nor videos that can be read" if not kinds else "images and videos; evaluate them apart"
        raise EvaluationError(f"{file} holds {found}.")

    started = time.perf_counter()
    embedded = embed(
        samples, model, on_error=problems.append, batch_size=batch_size, total=len(samples), progress=progress
    )
    vectors = {item.sample.path: _pooled(item) for item in embedded}
    unreadable = [path for path in captions_of if path not in vectors]
    if len(unreadable) > max_bad_share * len(captions_of):
        reason = problems[-1] if problems else unreadable[0]
        raise EvaluationError(
            f"{len(unreadable)} of {len(captions_of)} items of {file} cannot be read, more than {max_bad_share:.0%}; "
            f"the last: {reason}."
        )
    encoded = time.perf_counter()
    texts, owner = encode_captions(list(captions_of.values()), model)
    captioned = time.perf_counter()
    missing = torch.zeros(model.dimension)
    scores = texts @ torch.stack([vectors.get(path, missing) for path in captions_of]).T
    scores[:, torch.tensor([path not in vectors for path in captions_of])] = float("-inf")
    (kind,) = kinds
    directions = both_directions(scores, owner, kind)
    return EvaluationResult(
        protocol=str(file),
        model=model.name,
        fingerprint=model.fingerprint,
        kind=kind,
        items=len(captions_of),
        captions=len(owner),
        directions=directions,
        unreadable=unreadable,
        seconds={
            "items": round(encoded - started, 3),
            "captions": round(captioned - encoded, 3),
            "scoring": round(time.perf_counter() - captioned, 3),
        },
    )


def encode_captions(
    captions: Sequence[Sequence[str]], model: RetrievalModel, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Embed the captions of each item: (T, D) unit norm, and (T,) int64 the item that each belongs to."""
    flat = [caption for own in captions for caption in own]
    owner = torch.tensor([index for index, own in enumerate(captions) for _ in own])
    parts = [model.encode_texts(flat[start : start + batch_size]) for start in range(0, len(flat), batch_size)]
    return torch.cat(parts), owner


def both_directions(scores: Tensor, owner: Tensor, kind: str) -> Directions:
    """Metrics of (T, C) caption-to-item scores, and of their transpose, caption t belonging to item owner[t]."""
    relevance = owner[:, None] == torch.arange(scores.shape[1])
    return {
        f"text_to_{kind}": retrieval_metrics(scores, relevance),
        f"{kind}_to_text": retrieval_metrics(scores.T, relevance.T),
    }


def _read_items(file: Path, problems: list[MediaError]) -> tuple[dict[str, tuple[str, ...]], list[Sample]]:
    """The captions of every item by path, in the file's order, and those items that exist."""
    samples = list(iter_samples([file], problems.append))
    if file.suffix[1:].lower() not in TABLE_EXTENSIONS:
        return {sample.path: sample.captions for sample in samples}, samples
    captions_of: dict[str, tuple[str, ...]] = {}
    bad_rows: list[MediaError] = []
    for row in read_table(file, bad_rows.append):
        captions_of[row.path] = tuple(dict.fromkeys((*captions_of.get(row.path, ()), *row.captions)))
    if bad_rows:
        raise EvaluationError(f"{len(bad_rows)} rows cannot be used, the first: {bad_rows[0]}; mend the file.")
    return captions_of, samples


def _pooled(item: Embedded) -> Tensor:
    return torch.from_numpy(item.vectors[0])
