"""Retrieval metrics as pure functions: many-to-many, pessimistic on ties, chunked.

retrieval_metrics   scores and relevance in, {"R@1": ..., "mAP@10": ...} out
rank                the same, query by query
rank_embeddings     the same from unit vectors and labels; never holds more than a chunk of the score matrix
summary             the figures of a ranking
recall_sum          RSum

The rank of a query is 1 + the number of non-relevant candidates that score at least as high as its best relevant one:
a model that gives every candidate the same score finds nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cots.errors import EvaluationError

DEPTH = 10  # of mAP
RECALLS = (1, 5, 10)
SCORE_DECIMALS = 6

_CHUNK_ELEMENTS = 1 << 20  # a chunk of rows holds at most this many scores

# What is done to a chunk of scores (rows, C) before they are ranked; the slice tells which queries they belong to.
Adjust = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Ranking:
    """How well each of Q queries did.

    Attributes:
        ranks: (Q,) int64, of the best relevant candidate; 1 is best.
        precision: (Q,) float64 in [0, 1]: average precision of the first ten candidates, over min(10, number of
            relevant ones).
    """

    ranks: Tensor
    precision: Tensor


def retrieval_metrics(scores: Tensor | np.ndarray, relevance: Tensor | np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10 and mAP@10 in percent, MedR and MeanR in ranks, over the queries (rows).

    Shapes and errors as `rank`. R@k is the share of queries with a relevant candidate of rank <= k.
    """
    return summary(rank(scores, relevance))


def rank(scores: Tensor | np.ndarray, relevance: Tensor | np.ndarray) -> Ranking:
    """Rank the candidates of each query.

    Args:
        scores: (Q, C) numbers of any precision, higher is better; compared as they are. Minus infinity is a score.
        relevance: (Q, C) bool, or zeros and ones; at least one True a row.

    Raises:
        EvaluationError: the shapes differ, there is nothing to rank, a score is NaN, a relevance is neither 0 nor 1, or
            a query has nothing relevant.
    """
    scores, relevance = torch.as_tensor(scores), torch.as_tensor(relevance)
    if scores.ndim != 2 or scores.shape != relevance.shape:
        raise EvaluationError(
            f"Scores and relevance must both be (queries, candidates), not {tuple(scores.shape)} and "
            f"{tuple(relevance.shape)}."
        )
    if not scores.is_floating_point():
        scores = scores.double()  # whole numbers know no minus infinity, which hides candidates
    queries, candidates = scores.shape
    return _by_chunks(queries, candidates, lambda rows: _rank_rows(scores[rows], _as_bool(relevance[rows]), rows))


def rank_embeddings(
    queries: Tensor,
    candidates: Tensor,
    query_labels: Tensor,
    candidate_labels: Tensor,
    adjust: Adjust | None = None,
) -> Ranking:
    """Rank candidates by their dot product with each query, a chunk of queries at a time.

    Products of the same two vectors differ in the seventh decimal with their place in the matrix, so scores are
    compared to six: equal vectors tie, wherever they stand.

    Args:
        queries: (Q, D) float32, unit norm.
        candidates: (C, D) float32, unit norm.
        query_labels, candidate_labels: (Q,) and (C,) int64; a candidate is relevant to the queries of its label.
        adjust: changes a chunk of scores (rows, C) before they are ranked.

    Raises:
        EvaluationError: as for `rank`.
    """

    def ranked(rows: slice) -> Ranking:
        scores = (queries[rows] @ candidates.T).round(decimals=SCORE_DECIMALS)
        relevance = query_labels[rows, None] == candidate_labels
        return _rank_rows(adjust(scores, rows) if adjust else scores, relevance, rows)

    return _by_chunks(len(queries), len(candidates), ranked)


def summary(ranking: Ranking) -> dict[str, float]:
    """The figures of a ranking, named as `retrieval_metrics` names them."""
    ranks = ranking.ranks.double()
    metrics = {f"R@{k}": 100 * (ranks <= k).double().mean().item() for k in RECALLS}
    metrics["MedR"] = median(ranking.ranks)
    metrics["MeanR"] = ranks.mean().item()
    metrics[f"mAP@{DEPTH}"] = 100 * ranking.precision.mean().item()
    return metrics


def median(ranks: Tensor) -> float:
    """The middle rank, or the mean of the two middle ones."""
    ordered = ranks.sort().values.double()
    return ((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2).item()


def recall_sum(*directions: dict[str, float]) -> float:
    """RSum: R@1 + R@5 + R@10 of all directions."""
    return sum(metrics[f"R@{k}"] for metrics in directions for k in RECALLS)


def _as_bool(relevance: Tensor) -> Tensor:
    """Relevance as bool; other numbers than 0 and 1 are scores in the wrong place, which would all count as True."""
    if relevance.dtype == torch.bool:
        return relevance
    strange = relevance[(relevance != 0) & (relevance != 1)]
    if len(strange):
        raise EvaluationError(
            f"Relevance must be True or False (or 1 or 0), not {strange[0].item()}; the scores come first."
        )
    return relevance.bool()


def _rank_rows(scores: Tensor, relevance: Tensor, rows: slice) -> Ranking:
    """Rank (rows, C) scores; relevant candidates do not push each other down."""
    if bool(scores.isnan().any()):
        row = int(scores.isnan().any(dim=1).nonzero()[0]) + rows.start
        raise EvaluationError(f"A score of query number {row} is NaN: the model or a vector is damaged.")
    lost = (~relevance.any(dim=1)).nonzero().flatten()
    if len(lost):
        raise EvaluationError(
            f"{len(lost)} queries have no relevant candidate, the first is number {int(lost[0]) + rows.start}."
        )
    lowest = float("-inf")
    hits = scores.masked_fill(~relevance, lowest)
    misses = scores.masked_fill(relevance, lowest)
    ranks = 1 + ((scores >= hits.amax(dim=1, keepdim=True)) & ~relevance).sum(dim=1)
    return Ranking(ranks, _average_precision(hits, misses, relevance.sum(dim=1)))


def _average_precision(hits: Tensor, misses: Tensor, relevant: Tensor) -> Tensor:
    """Average precision of the first DEPTH places from the (rows, C) scores of relevant and of other candidates.

    The j-th best relevant candidate stands at j + (number of others that score at least as high): the precision there
    is j over its place. Only the DEPTH best of either kind can matter within DEPTH places.
    """
    kept = min(DEPTH, hits.shape[1])
    others = hits.shape[1] - relevant
    order = torch.arange(kept, device=hits.device)
    best_hits, best_misses = hits.topk(kept, dim=1).values, misses.topk(kept, dim=1).values
    # behind a row's own candidates of a kind stand the minus infinities that mask the other kind
    above = (best_misses[:, None, :] >= best_hits[:, :, None]) & (order < others[:, None])[:, None, :]
    places = order + 1 + above.sum(dim=2)
    found = (places <= DEPTH) & (order < relevant[:, None])
    return ((order + 1) / places.double() * found).sum(dim=1) / relevant.clamp_max(DEPTH)


def _by_chunks(queries: int, candidates: int, ranked: Callable[[slice], Ranking]) -> Ranking:
    """Rank a chunk of rows at a time.

    What they give goes into one place that is there before: many small tensors kept between the large ones of the
    chunks would keep the allocator from using the same memory for each.
    """
    chunks = _chunks(queries, candidates)
    everything = Ranking(torch.empty(queries, dtype=torch.int64), torch.empty(queries, dtype=torch.float64))
    for rows in chunks:
        part = ranked(rows)
        everything.ranks[rows], everything.precision[rows] = part.ranks, part.precision
    return everything


def _chunks(queries: int, candidates: int) -> list[slice]:
    if not queries or not candidates:
        raise EvaluationError(f"There is nothing to rank: {queries} queries and {candidates} candidates.")
    rows = max(1, _CHUNK_ELEMENTS // candidates)
    return [slice(start, min(start + rows, queries)) for start in range(0, queries, rows)]
