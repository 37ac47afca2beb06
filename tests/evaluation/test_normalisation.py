import pytest
import torch
from torch.nn import functional as F

from cots.evaluation.metrics import rank, rank_embeddings
from cots.evaluation.normalisation import (
    NORMALISATIONS,
    dual_softmax,
    hubness,
    query_bank_normalisation,
)


def test_dual_softmax_ranks_as_the_product_of_the_two_softmaxes() -> None:
    scores = torch.rand(12, 9, dtype=torch.float64) * 2 - 1
    product = (scores / 0.1).softmax(dim=0) * (scores / 0.1).softmax(dim=1)
    assert torch.equal(dual_softmax(scores, 0.1).argsort(dim=1), product.argsort(dim=1))


def test_dual_softmax_takes_a_hub_down() -> None:
    # candidate 0 comes first for every query by a little; each query's own candidate is the next
    scores = torch.eye(4, 5).roll(1, dims=1) * 0.5
    scores[:, 0] = 0.55
    relevance = torch.eye(4, 5).roll(1, dims=1).bool()
    assert rank(scores, relevance).ranks.tolist() == [2, 2, 2, 2]
    assert rank(dual_softmax(scores, 0.1), relevance).ranks.tolist() == [1, 1, 1, 1]


def test_query_bank_normalisation_touches_only_queries_whose_best_candidate_is_a_hub() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.2, 0.9]])
    bank = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1]])  # candidate 0 comes first in the bank, 2 never
    normalised = query_bank_normalisation(scores, bank, 0.1)
    inverted = (scores / 0.1).exp() / (bank / 0.1).exp().sum(dim=0)
    assert torch.equal(normalised[1], scores[1])
    assert torch.equal(normalised[0].argsort(), inverted[0].argsort())
    assert normalised[0].argmax() == 1


def test_the_streamed_forms_rank_as_those_on_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cots.evaluation.normalisation._CHUNK_ROWS", 7)
    queries, candidates = F.normalize(torch.randn(40, 8), dim=1), F.normalize(torch.randn(15, 8), dim=1)
    labels, own = torch.arange(40) % 15, torch.arange(15)
    scores = queries @ candidates.T
    whole = {"dual_softmax": dual_softmax(scores), "query_bank_normalisation": query_bank_normalisation(scores, scores)}
    for name, expected in whole.items():
        streamed = rank_embeddings(queries, candidates, labels, own, NORMALISATIONS[name](queries, candidates))
        assert torch.equal(streamed.ranks, rank(expected, labels[:, None] == own).ranks)
    total, first = hubness(queries, candidates, 0.05)
    assert torch.allclose(total, (scores / 0.05).logsumexp(dim=0), atol=1e-4)
    assert set(first.nonzero().flatten().tolist()) == set(scores.argmax(dim=1).tolist())
