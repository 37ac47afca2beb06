import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP, RetrievalMRR

from cots.errors import EvaluationError
from cots.evaluation.metrics import median, rank, rank_embeddings, recall_sum, retrieval_metrics, summary


def ranks(scores: torch.Tensor, relevance: torch.Tensor) -> list[int]:
    return rank(scores, relevance).ranks.tolist()


def by_hand(scores: np.ndarray, relevance: np.ndarray) -> tuple[list[int], list[float]]:
    """The definitions, query by query in plain Python: ranks, and average precision of the first ten places."""
    expected_ranks, precisions = [], []
    for score, relevant in zip(scores, relevance):
        best = max(s for s, r in zip(score, relevant) if r)
        expected_ranks.append(1 + sum(s >= best and not r for s, r in zip(score, relevant)))
        order = sorted(range(len(score)), key=lambda c: (-score[c], relevant[c]))[:10]  # ties: the others come first
        hits = [bool(relevant[c]) for c in order]
        found = sum(sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit)
        precisions.append(found / min(10, int(relevant.sum())))
    return expected_ranks, precisions


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A few scores with many ties and with minus infinities, and which candidates are relevant (at least one each)."""
    queries, candidates = draw(st.integers(1, 8)), draw(st.integers(1, 25))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    scores = random.integers(0, draw(st.integers(1, 30)), (queries, candidates)).astype(np.float32)
    scores[random.random(scores.shape) < 0.1] = -np.inf
    relevance = random.random(scores.shape) < draw(st.sampled_from([0.05, 0.3, 0.9]))
    relevance[np.arange(queries), random.integers(0, candidates, queries)] = True
    return scores, relevance


def test_hand_worked_ranks() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.8, 0.3], [0.1, 0.2, 0.15]])
    assert ranks(scores, torch.eye(3, dtype=torch.bool)) == [1, 1, 2]


def test_the_best_of_several_relevant_candidates_counts_and_relevant_ones_do_not_push_each_other_down() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    assert ranks(scores, torch.tensor([[False, True, False, True]])) == [2]
    assert ranks(scores, torch.tensor([[False, False, True, True]])) == [3]
    assert ranks(scores, torch.tensor([[True, True, False, False]])) == [1]


def test_ties_count_against_the_model() -> None:
    scores, relevance = torch.zeros(4, 10), torch.eye(4, 10, dtype=torch.bool)
    metrics = retrieval_metrics(scores, relevance)
    assert metrics["R@1"] == metrics["R@5"] == 0.0
    assert metrics["R@10"] == 100.0
    assert metrics["MeanR"] == 10.0
    assert rank(scores, relevance).precision.tolist() == pytest.approx([0.1] * 4)


def test_hand_worked_percentages() -> None:
    # ranks 1, 2, 6, 11 among 12 candidates
    scores = torch.arange(12, 0, -1).float().repeat(4, 1)
    relevance = torch.zeros(4, 12, dtype=torch.bool)
    for row, place in enumerate((1, 2, 6, 11)):
        relevance[row, place - 1] = True
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
    assert rank(scores, torch.tensor([[True, False, True, False]])).precision.item() == pytest.approx((1 + 2 / 3) / 2)


def test_half_precision_scores_are_compared_as_they_are_and_double_ones_keep_their_difference() -> None:
    close = torch.tensor([[0.5, 0.5 + 1e-12]], dtype=torch.float64)
    assert ranks(close, torch.tensor([[False, True]])) == [1]
    assert ranks(close.half(), torch.tensor([[False, True]])) == [2]


def test_arrays_of_numpy_and_whole_numbers_are_as_good_as_tensors_of_floats() -> None:
    scores = np.array([[0.9, 0.95, 0.9, 0.1]])
    relevance = np.array([[True, False, False, True]])
    # 0.95 and the tied 0.9 stand before the first relevant one, so they are at places 3 and 4
    metrics = retrieval_metrics(scores, relevance)
    assert (metrics["R@1"], metrics["R@5"], metrics["MedR"]) == (0.0, 100.0, 3.0)
    assert metrics["mAP@10"] == pytest.approx(100 * (1 / 3 + 2 / 4) / 2)
    assert retrieval_metrics(np.array([[18, 19, 18, 2]]), relevance) == metrics
    assert retrieval_metrics(torch.tensor([[18, 19, 18, 2]]), torch.from_numpy(relevance)) == metrics


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30))
def test_the_median_is_numpys(values: list[int]) -> None:
    assert median(torch.tensor(values)) == np.median(values)


@given(problems())
def test_ranks_and_precision_are_those_of_the_definitions(problem: tuple[np.ndarray, np.ndarray]) -> None:
    scores, relevance = problem
    expected_ranks, precisions = by_hand(scores, relevance)
    ours = rank(torch.from_numpy(scores), torch.from_numpy(relevance))
    assert ours.ranks.tolist() == expected_ranks
    assert ours.precision.tolist() == pytest.approx(precisions)


@given(problems(), st.integers(0, 2**32))
def test_what_must_not_matter_does_not(problem: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    """The order of the candidates, a rising function of the scores, and candidates that score below all others."""
    scores, relevance = (torch.from_numpy(part) for part in problem)
    plain = rank(scores, relevance)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(scores.shape[1]))
    assert torch.equal(rank(scores[:, order], relevance[:, order]).ranks, plain.ranks)
    assert torch.equal(rank(scores * 2 - 1, relevance).ranks, plain.ranks)
    assert plain.ranks.min() >= 1
    assert (plain.ranks <= (~relevance).sum(dim=1) + 1).all()
    better = scores.clone()
    better[relevance] += 1
    assert (rank(better, relevance).ranks <= plain.ranks).all()


@pytest.mark.parametrize("chunk", [7, 60, 1 << 25])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cots.evaluation.metrics._CHUNK_ELEMENTS", chunk)
    random = np.random.default_rng()
    scores = random.integers(0, 6, (40, 25)).astype(np.float32)
    relevance = random.random((40, 25)) < 0.15
    relevance[np.arange(40), random.integers(0, 25, 40)] = True
    expected_ranks, precisions = by_hand(scores, relevance)
    ours = rank(torch.from_numpy(scores), torch.from_numpy(relevance))
    assert ours.ranks.tolist() == expected_ranks
    assert ours.precision.tolist() == pytest.approx(precisions)


@pytest.mark.parametrize("chunk", [7, 1 << 25])
def test_embeddings_are_ranked_as_their_scores(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cots.evaluation.metrics._CHUNK_ELEMENTS", chunk)
    queries, candidates = F.normalize(torch.randn(30, 8), dim=1), F.normalize(torch.randn(20, 8), dim=1)
    candidates[7:11] = candidates[3]  # equal vectors must tie, wherever they stand
    query_labels, candidate_labels = torch.arange(30) % 12, torch.arange(20) % 12
    ours = rank_embeddings(queries, candidates, query_labels, candidate_labels)
    scores = (queries.double() @ candidates.double().T).numpy().round(6)
    expected_ranks, precisions = by_hand(scores, (query_labels[:, None] == candidate_labels).numpy())
    assert ours.ranks.tolist() == expected_ranks
    assert ours.precision.tolist() == pytest.approx(precisions)


def test_agreement_with_torchmetrics() -> None:
    """Recall of several relevant candidates, reciprocal rank, and average precision of a single relevant candidate,
    all without ties (which torchmetrics leaves to the order of the sort) and above zero (it takes a candidate that
    scores zero or less as not returned)."""
    queries, candidates = 60, 30
    scores = torch.stack([1 + torch.randperm(candidates) for _ in range(queries)]).float() / candidates
    several = torch.rand(queries, candidates) < 0.1
    several[torch.arange(queries), torch.randint(candidates, (queries,))] = True
    index = torch.arange(queries).repeat_interleave(candidates)
    ours = retrieval_metrics(scores, several)
    for k in (1, 5, 10):
        theirs = RetrievalHitRate(top_k=k)(scores.flatten(), several.flatten(), index)
        assert ours[f"R@{k}"] == pytest.approx(100 * theirs.item(), abs=1e-4)
    reciprocal = (1 / rank(scores, several).ranks.double()).mean()
    theirs = RetrievalMRR()(scores.flatten(), several.flatten(), index)
    assert reciprocal.item() == pytest.approx(theirs.item(), abs=1e-6)
    single = F.one_hot(torch.randint(candidates, (queries,)), candidates).bool()
    theirs = RetrievalMAP(top_k=10)(scores.flatten(), single.flatten(), index)
    assert retrieval_metrics(scores, single)["mAP@10"] == pytest.approx(100 * theirs.item(), abs=1e-4)
    few = scores[:, :10], several[:, :10] | F.one_hot(torch.randint(10, (queries,)), 10).bool()
    theirs = RetrievalMAP()(few[0].flatten(), few[1].flatten(), torch.arange(queries).repeat_interleave(10))
    assert retrieval_metrics(*few)["mAP@10"] == pytest.approx(100 * theirs.item(), abs=1e-4)


@pytest.mark.parametrize(
    ("scores", "relevance", "message"),
    [
        (torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]), torch.tensor([[True, False]] * 2), "query number 1 is NaN"),
        (torch.tensor([[0.0, 1.0]]), torch.tensor([[False, False]]), "no relevant candidate, the first is number 0"),
        (torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bool), "must both be"),
        (torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool), "nothing to rank"),
        (torch.eye(2), torch.tensor([[0.9, 0.1], [0.2, 0.8]]), r"not 0\.89.*; the scores come first"),
        (torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, float("nan")]]), "True or False .* not nan"),
    ],
)
def test_what_cannot_be_ranked_is_an_error(scores: torch.Tensor, relevance: torch.Tensor, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        retrieval_metrics(scores, relevance)


def test_a_vector_with_nan_is_an_error() -> None:
    vectors = F.normalize(torch.randn(4, 8), dim=1)
    damaged = vectors.clone()
    damaged[2, 3] = float("nan")
    with pytest.raises(EvaluationError, match="NaN"):
        rank_embeddings(vectors, damaged, torch.arange(4), torch.arange(4))


def test_zeros_and_ones_are_relevance_too() -> None:
    scores, relevance = torch.rand(6, 5), torch.eye(6, 5).roll(1, dims=0) + torch.eye(6, 5) > 0
    relevance[5, 4] = True
    for dtype in (torch.int64, torch.float32, torch.uint8):
        assert retrieval_metrics(scores, relevance.to(dtype)) == retrieval_metrics(scores, relevance)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there")
def test_a_large_matrix_is_ranked_in_the_memory_of_a_chunk() -> None:
    program = """
import resource, torch
from cots.evaluation.metrics import retrieval_metrics
torch.set_num_threads(1)
queries = torch.arange(12_500)
scores, relevance = torch.rand(12_500, 5_000), torch.zeros(12_500, 5_000, dtype=torch.bool)
relevance[queries, queries // 5] = True
retrieval_metrics(scores[:250], relevance[:250])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
retrieval_metrics(scores, relevance)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(outcome.stdout) < 100  # MB; the matrix has 250


def test_a_summary_counts_queries_not_items() -> None:
    metrics = summary(rank(torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]]), torch.tensor([[True, False]] * 3)))
    assert metrics["R@1"] == pytest.approx(200 / 3)
