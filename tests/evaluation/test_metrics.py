import numpy as np
import pytest
import torch

from cots.errors import EvaluationError
from cots.evaluation.metrics import average_precision, ranks, recall_sum, retrieval_metrics


def test_hand_worked_ranks() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.8, 0.3], [0.1, 0.2, 0.15]])
    assert ranks(scores, torch.eye(3, dtype=torch.bool)).tolist() == [1, 1, 2]


def test_the_best_of_several_relevant_candidates_counts_and_relevant_ones_do_not_push_each_other_down() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    assert ranks(scores, torch.tensor([[False, True, False, True]])).tolist() == [2]
    assert ranks(scores, torch.tensor([[False, False, True, True]])).tolist() == [3]
    assert ranks(scores, torch.tensor([[True, True, False, False]])).tolist() == [1]


def test_ties_count_against_the_model() -> None:
    scores = torch.zeros(4, 10)
    relevance = torch.eye(4, 10, dtype=torch.bool)
    metrics = retrieval_metrics(scores, relevance)
    assert metrics["R@1"] == metrics["R@5"] == 0.0
    assert metrics["R@10"] == 100.0
    assert metrics["MeanR"] == 10.0
    assert average_precision(scores, relevance).tolist() == pytest.approx([0.1] * 4)


def test_hand_worked_percentages() -> None:
    # ranks 1, 2, 6, 11 among 12 candidates
    scores = torch.arange(12, 0, -1).float().repeat(4, 1)
    relevance = torch.zeros(4, 12, dtype=torch.bool)
    for row, rank in enumerate((1, 2, 6, 11)):
        relevance[row, rank - 1] = True
    metrics = retrieval_metrics(scores, relevance)
    assert metrics["R@1"] == 25.0
    assert metrics["R@5"] == 50.0
    assert metrics["R@10"] == 75.0
    assert metrics["MedR"] == 4.0
    assert metrics["MeanR"] == 5.0
    assert metrics["mAP@10"] == pytest.approx(100 * (1 + 1 / 2 + 1 / 6) / 4)
    assert recall_sum(metrics, metrics) == 300.0


def test_hand_worked_average_precision_of_several_relevant_candidates() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    relevance = torch.tensor([[True, False, True, False]])
    assert average_precision(scores, relevance).item() == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("chunk", [7, 1 << 25])
def test_chunked_ranks_equal_a_plain_loop(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cots.evaluation.metrics._CHUNK_ELEMENTS", chunk)
    random = np.random.default_rng()
    scores = random.integers(0, 6, (40, 25)).astype(np.float32)  # many ties
    relevance = random.random((40, 25)) < 0.15
    relevance[np.arange(40), random.integers(0, 25, 40)] = True
    expected_ranks, expected_precisions = [], []
    for score, relevant in zip(scores, relevance):
        expected_ranks.append(1 + sum(s >= score[relevant].max() and not r for s, r in zip(score, relevant)))
        order = sorted(range(25), key=lambda c: (-score[c], relevant[c]))[:10]
        hits = [relevant[c] for c in order]
        found = sum(sum(hits[: i + 1]) / (i + 1) for i in range(10) if hits[i])
        expected_precisions.append(found / min(10, relevant.sum()))
    ours = ranks(torch.from_numpy(scores), torch.from_numpy(relevance))
    assert ours.tolist() == expected_ranks
    precisions = average_precision(torch.from_numpy(scores), torch.from_numpy(relevance))
    assert precisions.tolist() == pytest.approx(expected_precisions)


@pytest.mark.parametrize(
    ("scores", "relevance", "message"),
    [
        (torch.tensor([[float("nan"), 1.0]]), torch.tensor([[True, False]]), "NaN"),
        (torch.tensor([[0.0, 1.0]]), torch.tensor([[False, False]]), "no relevant candidate"),
        (torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bool), "must both be"),
        (torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool), "nothing to rank"),
    ],
)
def test_what_cannot_be_ranked_is_an_error(scores: torch.Tensor, relevance: torch.Tensor, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        retrieval_metrics(scores, relevance)
