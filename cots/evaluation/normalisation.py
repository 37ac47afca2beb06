"""Scores corrected for hubs: candidates that come first for many queries. Never part of a plain result.

Dual softmax looks at all test queries at once, and so does query-bank normalisation when the test queries are its
bank, as here: a system that answers one query at a time cannot do either. Every figure made this way is marked
USES_THE_WHOLE_TEST_SET and stands in a column of its own.

Both are a correction of each candidate's column by the log-sum-exp of its scores over the queries, which `hubness`
computes from embeddings a chunk at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cots.evaluation.metrics import Adjust

USES_THE_WHOLE_TEST_SET = "uses the whole test set"
DUAL_SOFTMAX_TEMPERATURE = 0.01
QUERY_BANK_TEMPERATURE = 0.05

_CHUNK_ROWS = 1024


def dual_softmax(scores: Tensor, temperature: float = DUAL_SOFTMAX_TEMPERATURE) -> Tensor:
    """Dual softmax (Cheng et al., arXiv:2109.04290): softmax over the candidates times softmax over the queries.

    Returns the logarithm, up to a constant of each row, times temperature / 2: (Q, C) float, to be ranked row by row.

    Args:
        scores: (Q, C) float of the whole test set.
        temperature: of both.
    """
    return scores - temperature / 2 * (scores / temperature).logsumexp(dim=0)


def query_bank_normalisation(scores: Tensor, bank: Tensor, temperature: float = QUERY_BANK_TEMPERATURE) -> Tensor:
    """Query-bank normalisation with the dynamic inverted softmax (QB-Norm, Bogolin et al., CVPR 2022, eq. 5 and 6).

    A query whose best candidate comes first for a query of the bank is ranked by the inverted softmax, others plainly.

    Args:
        scores: (Q, C) float.
        bank: (B, C) float, the scores of the bank's queries; the test queries' own scores if there is no other bank.
        temperature: of the inverted softmax.

    Returns:
        (Q, C) float: the logarithm of the inverted softmax times the temperature, or the scores, row by row.
    """
    hubs = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    hubs[bank.argmax(dim=1)] = True
    corrected = scores - temperature * (bank / temperature).logsumexp(dim=0)
    return torch.where(hubs[scores.argmax(dim=1)][:, None], corrected, scores)


def hubness(queries: Tensor, candidates: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What the two corrections need to know of all queries, without the whole score matrix.

    Args:
        queries, candidates: (Q, D) and (C, D) float32, unit norm.

    Returns:
        (C,) float log-sum-exp of each candidate's scores over the queries, divided by the temperature; (C,) bool which
        candidates come first for a query.
    """
    total = torch.full((len(candidates),), float("-inf"))
    first = torch.zeros(len(candidates), dtype=torch.bool)
    for chunk in queries.split(_CHUNK_ROWS):
        scores = chunk @ candidates.T
        total = torch.logaddexp(total, (scores / temperature).logsumexp(dim=0))
        first[scores.argmax(dim=1)] = True
    return total, first


def dual_softmax_of(queries: Tensor, candidates: Tensor, temperature: float = DUAL_SOFTMAX_TEMPERATURE) -> Adjust:
    """`dual_softmax` as an adjustment for `rank_embeddings`."""
    total, _ = hubness(queries, candidates, temperature)
    return lambda scores, rows: scores - temperature / 2 * total


def query_bank_normalisation_of(
    queries: Tensor, candidates: Tensor, temperature: float = QUERY_BANK_TEMPERATURE
) -> Adjust:
    """`query_bank_normalisation` with the queries as their own bank, as an adjustment for `rank_embeddings`."""
    total, first = hubness(queries, candidates, temperature)

    def adjust(scores: Tensor, rows: slice) -> Tensor:
        return torch.where(first[scores.argmax(dim=1)][:, None], scores - temperature * total, scores)

    return adjust


NORMALISATIONS: dict[str, Callable[[Tensor, Tensor], Adjust]] = {
    "dual_softmax": dual_softmax_of,
    "query_bank_normalisation": query_bank_normalisation_of,
}
