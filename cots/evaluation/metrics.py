"""Retrieval metrics as pure functions: many-to-many, pessimistic on ties, chunked.

The rank of a query is 1 + the number of non-relevant candidates that score at least as high as its best relevant one:
a model that gives every candidate the same score finds nothing.
"""

import torch
from torch import Tensor

from cots.errors import EvaluationError

_CHUNK_ELEMENTS = 1 << 25  # a chunk of rows holds at most this many scores


def ranks(scores: Tensor, relevance: Tensor) -> Tensor:
    """Rank of the best relevant candidate of each query.

    Args:
        scores: (Q, C) float, higher is better.
        relevance: (Q, C) bool, at least one True a row.

    Returns:
        (Q,) int64, 1 is best.

    Raises:
        EvaluationError: the shapes differ, a score is NaN, or a query has nothing relevant.
    """
    _check(scores, relevance)
    parts = []
    for rows in _chunks(scores):
        score, relevant = scores[rows].float(), relevance[rows]
        best = score.masked_fill(~relevant, float("-inf")).amax(dim=1, keepdim=True)
        parts.append(1 + ((score >= best) & ~relevant).sum(dim=1))
    return torch.cat(parts)


def average_precision(scores: Tensor, relevance: Tensor, depth: int = 10) -> Tensor:
    """Average precision of the first `depth` candidates of each query, over min(depth, number of relevant ones).

    On equal scores the non-relevant candidate comes first. Shapes and errors as `ranks`; returns (Q,) float64
    in [0, 1].
    """
    _check(scores, relevance)
    depth_kept = min(depth, scores.shape[1])
    positions = torch.arange(1, depth_kept + 1, device=scores.device, dtype=torch.float64)
    parts = []
    for rows in _chunks(scores):
        relevant = relevance[rows]
        score = scores[rows].float().double()
        # between a float32 and the next lower one lie many float64: the step down loses against equals alone
        below = torch.nextafter(score, torch.full_like(score, float("-inf")))
        top = torch.where(relevant, below, score).topk(depth_kept, dim=1).indices
        hit = relevant.gather(1, top).double()
        precision = hit.cumsum(dim=1) / positions
        parts.append((precision * hit).sum(dim=1) / relevant.sum(dim=1).clamp_max(depth))
    return torch.cat(parts)


def retrieval_metrics(scores: Tensor, relevance: Tensor) -> dict[str, float]:
    """R@1, R@5, R@10 and mAP@10 in percent, MedR and MeanR in ranks, over the queries (rows).

    Shapes and errors as `ranks`. R@k is the share of queries with a relevant candidate of rank <= k.
    """
    rank = ranks(scores, relevance)
    metrics = {f"R@{k}": 100 * (rank <= k).double().mean().item() for k in (1, 5, 10)}
    metrics["MedR"] = rank.double().quantile(0.5).item()
    metrics["MeanR"] = rank.double().mean().item()
    metrics["mAP@10"] = 100 * average_precision(scores, relevance, 10).mean().item()
    return metrics


def recall_sum(*directions: dict[str, float]) -> float:
    """RSum: R@1 + R@5 + R@10 of all directions."""
    return sum(metrics[f"R@{k}"] for metrics in directions for k in (1, 5, 10))


def _check(scores: Tensor, relevance: Tensor) -> None:
    if scores.ndim != 2 or scores.shape != relevance.shape:
        raise EvaluationError(
            f"Scores and relevance must both be (queries, candidates), not {tuple(scores.shape)} and "
            f"{tuple(relevance.shape)}."
        )
    if 0 in scores.shape:
        raise EvaluationError(f"There is nothing to rank: the scores are {tuple(scores.shape)}.")
    if bool(torch.isnan(scores).any()):
        raise EvaluationError("A score is NaN: the model or a vector is damaged.")
    lost = (~relevance.any(dim=1)).nonzero().flatten()
    if len(lost):
        raise EvaluationError(f"{len(lost)} queries have no relevant candidate, the first is number {int(lost[0])}.")


def _chunks(scores: Tensor) -> list[slice]:
    rows = max(1, _CHUNK_ELEMENTS // scores.shape[1])
    return [slice(start, start + rows) for start in range(0, scores.shape[0], rows)]
