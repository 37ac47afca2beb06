"""From the vectors of an evaluation set to the rank of every query, in both directions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cots.evaluation.evaluation_set import EvaluationSet
from cots.evaluation.metrics import Adjust, Ranking, rank_embeddings

LOWEST = float("-inf")


@dataclass(frozen=True)
class Vectors:
    """Attributes:
    texts: (T, D) float32, unit norm, of all captions.
    items: (C, D) float32, unit norm; zeros of an unreadable item.
    unreadable: (C,) bool.
    """

    texts: Tensor
    items: Tensor
    unreadable: Tensor


def rank_directions(
    vectors: Vectors, test_set: EvaluationSet, normalisation: Callable[[Tensor, Tensor], Adjust] | None = None
) -> dict[str, Ranking]:
    """Rank items for every caption, and captions for every item.

    An unreadable item scores minus infinity everywhere: it is found last, and finds nothing. Each fold of the items is
    a gallery of its own.

    Args:
        vectors: of the whole set.
        test_set: says what belongs to what.
        normalisation: makes an adjustment of scores from queries and candidates; see `cots.evaluation.normalisation`.
    """
    owner, labels = test_set.owner, test_set.labels
    fold_of_item = torch.arange(len(labels)) * test_set.folds // len(labels)
    folds = [_rank_fold(vectors, owner, labels, fold_of_item == fold, normalisation) for fold in range(test_set.folds)]
    names = (f"text_to_{test_set.kind}", f"{test_set.kind}_to_text")
    return {
        name: Ranking(
            torch.cat([fold[way].ranks for fold in folds]), torch.cat([fold[way].precision for fold in folds])
        )
        for way, name in enumerate(names)
    }


def _rank_fold(
    vectors: Vectors,
    owner: Tensor,
    labels: Tensor,
    inside: Tensor,
    normalisation: Callable[[Tensor, Tensor], Adjust] | None,
) -> tuple[Ranking, Ranking]:
    """Text to item, item to text within the items that are `inside` (C,) bool and their captions."""
    texts, text_labels = vectors.texts[inside[owner]], labels[owner][inside[owner]]
    items, item_labels, unreadable = vectors.items[inside], labels[inside], vectors.unreadable[inside]
    readable = items[~unreadable]
    correct_items = normalisation(texts, items) if normalisation else _unchanged
    correct_texts = normalisation(readable, texts) if normalisation and len(readable) else _unchanged

    def hide_candidates(scores: Tensor, rows: slice) -> Tensor:
        return correct_items(scores, rows).masked_fill(unreadable, LOWEST)

    def hide_queries(scores: Tensor, rows: slice) -> Tensor:
        return correct_texts(scores, rows).masked_fill(unreadable[rows, None], LOWEST)

    return (
        rank_embeddings(texts, items, text_labels, item_labels, hide_candidates),
        rank_embeddings(items, texts, item_labels, text_labels, hide_queries),
    )


def _unchanged(scores: Tensor, rows: slice) -> Tensor:
    return scores
