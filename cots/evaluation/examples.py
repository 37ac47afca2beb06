"""The queries that a model answered best and worst: what was wanted, what came back."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from cots.data.image_io import open_image
from cots.data.samples import Sample
from cots.data.video_io import read_frames
from cots.errors import MediaError
from cots.evaluation.evaluate import EvaluationResult

EXAMPLES = 6
RETURNED = 5
LOOKED_AT = 400
THUMBNAIL_SIDE = 168


@dataclass(frozen=True)
class Answer:
    """A candidate: its caption, or its item's name; the item; its score; whether it is relevant."""

    text: str
    item: int
    score: float
    is_relevant: bool


@dataclass(frozen=True)
class Example:
    """Attributes:
    text: the query in words; an item's name if the query is an item.
    item: of the query: the item itself, or the caption's.
    rank: of the best relevant candidate.
    wanted: the best relevant candidate.
    returned: the first candidates, best first.
    """

    text: str
    item: int
    rank: int
    wanted: Answer
    returned: tuple[Answer, ...]


def pick_examples(result: EvaluationResult, direction: str) -> tuple[list[Example], list[Example]]:
    """The worst and the best queries of a direction, at most one of an item, readable ones only.

    Worst: with the highest rank. Best: of LOOKED_AT evenly spaced queries of rank 1, those with the widest margin
    between the best relevant candidate and any other.
    """
    test_set, vectors = result.test_set, result.vectors
    owner, labels = test_set.owner, test_set.labels
    captions, names = test_set.captions, [item.name for item in test_set.items]
    everything = torch.arange(len(names))
    if direction.startswith("text_to_"):
        queries, candidates, query_items, candidate_items = vectors.texts, vectors.items, owner, everything
        query_texts, candidate_texts = captions, names
    else:
        queries, candidates, query_items, candidate_items = vectors.items, vectors.texts, everything, owner
        query_texts, candidate_texts = names, captions
    fold_of = everything * test_set.folds // len(names)
    readable = ~vectors.unreadable

    def scores_of(query: int) -> Tensor:
        inside = readable[candidate_items] & (fold_of[candidate_items] == fold_of[query_items[query]])
        return (candidates @ queries[query]).masked_fill(~inside, float("-inf"))

    def relevant_to(query: int) -> Tensor:
        return labels[candidate_items] == labels[query_items[query]]

    def example(query: int) -> Example:
        scores, relevant = scores_of(query), relevant_to(query)
        answers = [
            Answer(candidate_texts[place], int(candidate_items[place]), float(scores[place]), bool(relevant[place]))
            for place in _best(scores, relevant)
        ]
        item = int(query_items[query])
        return Example(query_texts[query], item, int(ranks[query]), answers[0], tuple(answers[1:]))

    def margin(query: int) -> float:
        scores, relevant = scores_of(query), relevant_to(query)
        others = scores[~relevant]
        return float(scores[relevant].max() - others.max()) if len(others) else 0.0

    ranks = result.rankings[direction].ranks
    allowed = [query for query in range(len(ranks)) if readable[query_items[query]]]
    worst = sorted(allowed, key=lambda query: -int(ranks[query]))
    first = [query for query in allowed if ranks[query] == 1]
    best = sorted(_evenly_spaced(first, LOOKED_AT), key=margin, reverse=True)
    return (
        [example(query) for query in _one_an_item(worst, lambda query: int(labels[query_items[query]]))],
        [example(query) for query in _one_an_item(best, lambda query: int(labels[query_items[query]]))],
    )


def thumbnail(sample: Sample) -> str | None:
    """A picture, or the middle frame of a video, as a square WebP in a data: address; None if it cannot be read."""
    try:
        if sample.kind == "video":
            picture = read_frames(sample.media(), count=1, short_side=THUMBNAIL_SIDE, name=sample.path).images[0]
        else:
            picture = open_image(sample.media(), name=sample.path, target_size=THUMBNAIL_SIDE)
    except MediaError:
        return None
    picture = ImageOps.fit(picture, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=72, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _best(scores: Tensor, relevant: Tensor) -> list[int]:
    """The best relevant candidate, then the first RETURNED of all; on equal scores the others come first."""
    wanted = int(scores.masked_fill(~relevant, float("-inf")).argmax())
    order = sorted(
        scores.topk(min(4 * RETURNED, len(scores))).indices.tolist(), key=lambda c: (-scores[c], relevant[c])
    )
    return [wanted, *(place for place in order if scores[place] > float("-inf"))][: RETURNED + 1]


def _evenly_spaced(queries: list[int], most: int) -> list[int]:
    """So many of some queries, or all if they are fewer."""
    count = min(len(queries), most)
    return [queries[place * len(queries) // count] for place in range(count)]


def _one_an_item(queries: list[int], label: Callable[[int], int]) -> list[int]:
    kept: dict[int, int] = {}
    for query in queries:
        kept.setdefault(label(query), query)
        if len(kept) == EXAMPLES:
            break
    return list(kept.values())
