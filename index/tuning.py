"""How well a structure finds what exact search finds, and how hard it has to look to reach a target.

Recall is measured with text, because that is what people ask with: images and captions lie in different parts of the
space, and a structure that finds an image's neighbours with ease may miss a sentence's. Half of the queries choose the
effort, the other half are asked only once, for the figures that are reported.

A gallery without captions is asked with those of the embedded gallery's photographs. On 100,000 photographs with a
target of 0.9, they choose an effort at which the photographs' own captions find 0.99 of the ten best, and everyday
nouns 0.92 (cells) or 0.89 (a graph); vectors with noise one at which these find 0.90 or 0.95, and 0.74 or 0.77, while
they promise 0.95 or 0.999 (benchmarks/tuning_queries.py).
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cots.embedded import EMBEDDED_GALLERY
from index.ann import GRAPH_BREADTH, AnnIndex, Effort
from index.exact import exact_search

if TYPE_CHECKING:
    from cots.model.retrieval_model import RetrievalModel
    from index.snapshot import Snapshot

QUERIES = 512
FEW_CAPTIONS = 32
NOISE = 1.0  # norm of what is added to a unit vector: the cosine to it becomes about 0.7
DEPTHS = (1, 10, 100)
TUNED_DEPTH = 10
TIMED_QUERIES = 100
PROPOSALS = (4, 16, 64)
SCORE_ERROR = 1e-6
STEPS_OF_FOUR = 4  # of a ladder, each of which is wider by the root of two
LEAST_GAIN = 0.001
Setting = TypeVar("Setting")
Recall = TypeVar("Recall", float, np.ndarray)


@dataclass(frozen=True)
class Queries:
    """Queries (Q, D) float32 of unit norm, and what they are: "captions", "everyday sentences" or "noisy vectors"."""

    vectors: np.ndarray
    origin: str


@dataclass(frozen=True)
class Measured:
    """What the held-out queries showed.

    Attributes:
        recall: share of the truly best 1, 10 and 100 rows that are found, by "1", "10" and "100".
        latency_ms: of one query for 10 rows: "p50" and "p99".
        queries: how many, and of what origin.
    """

    recall: dict[str, float]
    latency_ms: dict[str, float]
    queries: str


def draw_queries(snapshot: "Snapshot", model: "RetrievalModel | None") -> Queries:
    """Queries such as a gallery will get, embedded by its model: its own captions, or if these are few, sentences of
    other photographs. Without a model, its vectors with noise.

    Args:
        snapshot: of at least one row.
        model: the gallery's; None if there is none at hand.
    """
    rng = np.random.default_rng(1)
    if model is not None:
        captions = [text for text in snapshot.rows.filter(~snapshot.moments)["caption"].unique().to_pylist() if text]
        if len(captions) >= FEW_CAPTIONS:
            chosen = rng.permutation(len(captions))[:QUERIES]
            sentences = [_one_of(captions[row].splitlines(), rng) for row in chosen]
            return Queries(model.encode_texts(sentences).numpy().astype(np.float32), "captions")
        sentences = everyday_sentences()
        if len(sentences) >= FEW_CAPTIONS:
            return Queries(model.encode_texts(sentences).numpy().astype(np.float32), "everyday sentences")
    rows = rng.integers(0, len(snapshot), min(QUERIES, 4 * len(snapshot)))
    vectors = snapshot.vectors[rows].astype(np.float32)
    noise = rng.standard_normal(vectors.shape).astype(np.float32)
    vectors += NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    return Queries(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), "noisy vectors")


def everyday_sentences() -> list[str]:
    """Up to `QUERIES` captions of the embedded gallery's photographs; none where it was left out of an installation."""
    try:
        lines = (EMBEDDED_GALLERY / "items.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    items = [json.loads(line) for line in lines]
    return [text for item in items if item["source"] == "photographs" for text in item["captions"]][:QUERIES]


def _one_of(sentences: list[str], rng: np.random.Generator) -> str:
    return sentences[rng.integers(len(sentences))]


def tune(index: AnnIndex, vectors: np.ndarray, queries: Queries, target: float) -> Measured:
    """Set the least effort at which an index reaches a recall at 10, or the greatest, and measure it.

    Args:
        index: over all of the vectors.
        vectors: (N, D) of the snapshot.
        queries: at least two.
        target: recall at 10, of 1.
    """
    chosen, held_out = queries.vectors[::2], queries.vectors[1::2]
    truth, _ = exact_search(vectors, chosen, TUNED_DEPTH)
    _set_effort(index, chosen, truth, target)
    truth, _ = exact_search(vectors, held_out, max(DEPTHS))
    recall = {
        str(depth): round(float(_recall(index, held_out, truth[:, :depth]).mean()), 4)
        for depth in DEPTHS
        if truth.shape[1] >= depth
    }
    return Measured(recall, _latency(index, held_out), f"{len(held_out)} {queries.origin}")


def _set_effort(index: AnnIndex, queries: np.ndarray, truth: np.ndarray, target: float) -> None:
    """Of the efforts whose recall is at least the target plus two standard errors, set the quickest.

    With more proposals a narrower look may do; so each number of them is widened until it reaches the target, and those
    that do are timed.
    """

    def recall_at(effort: Effort) -> np.ndarray:
        index.effort = effort
        return _recall(index, queries, truth)

    reaching: list[Effort] = []
    for ladder in ladders(index):
        narrower = [effort for effort in ladder if not reaching or effort.breadth < reaching[-1].breadth]
        for effort, recall in climb(narrower, recall_at):
            if recall.mean() - 2 * recall.std() / len(recall) ** 0.5 >= target or recall.mean() == 1:
                reaching.append(effort)
                break
    if reaching:
        index.effort = min(reaching, key=lambda effort: _latency_at(index, effort, queries))
    else:
        index.effort = ladders(index)[-1][-1]


def climb(ladder: Sequence[Setting], recall_at: Callable[[Setting], Recall]) -> Iterator[tuple[Setting, Recall]]:
    """Settings, each wider than the one before, with their recalls, as long as looking four times as wide finds more.

    Args:
        recall_at: a setting's recall, or (Q,) those of queries.
    """
    means: list[float] = []
    for setting in ladder:
        recall = recall_at(setting)
        yield setting, recall
        means.append(float(np.mean(recall)))
        if len(means) > STEPS_OF_FOUR and means[-1] - means[-1 - STEPS_OF_FOUR] < LEAST_GAIN:
            return


def _latency_at(index: AnnIndex, effort: Effort, queries: np.ndarray) -> float:
    index.effort = effort
    return _latency(index, queries)["p50"]


def ladders(index: AnnIndex) -> list[list[Effort]]:
    """The efforts to try: for each number of proposals, from the narrowest look to the widest.

    Breadths are 1, 2, 3, 4, 6, 8, 11, 16, ... up to all cells; of a graph from the narrowest walk to 4,096 nodes.
    """
    least, most = (1, index.cells) if index.cells else (GRAPH_BREADTH, 4096)
    steps = [round(2 ** (step / 2)) for step in range(0, 32)]
    breadths = sorted({least, most} | {step for step in steps if least < step < most})
    proposals = PROPOSALS if index.kind == "ivfpq" else (1,)
    return [[Effort(breadth, count) for breadth in breadths] for count in proposals]


def _recall(index: AnnIndex, queries: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(Q,) share of the best rows that are found. A row that scores as well as one of the best is as good as it."""
    found, _ = index.search(queries, truth.shape[1])
    return (found >= truth[:, -1:] - SCORE_ERROR).mean(axis=1)


def _latency(index: AnnIndex, queries: np.ndarray) -> dict[str, float]:
    took = []
    for query in queries[:TIMED_QUERIES]:
        started = time.perf_counter()
        index.search(query[None], TUNED_DEPTH)
        took.append(1000 * (time.perf_counter() - started))
    return {"p50": round(float(np.percentile(took, 50)), 3), "p99": round(float(np.percentile(took, 99)), 3)}
