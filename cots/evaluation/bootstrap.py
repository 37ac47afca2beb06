"""How far a figure would move if other items had been drawn: bootstrap intervals, and of the difference of two models.

The items are resampled with replacement, each with all its queries (an image's five captions rise and fall together,
so resampling captions one by one would give intervals that are too narrow). The interval is the middle 95 % of the
figure over the resamples (Efron and Tibshirani, 1993, the percentile method). Both directions of an evaluation, and
both models of a comparison, are measured on the same resamples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cots.evaluation.metrics import RECALLS

RESAMPLES = 2000
LEVEL = 95.0

Interval = tuple[float, float]
_CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Queries:
    """The queries of one direction.

    Attributes:
        ranks: (Q,) int, 1 is best.
        units: (Q,) int, the unit of resampling that each belongs to, numbered from 0.
        precision: (Q,) float in [0, 1], average precision; None leaves mAP@10 out.
    """

    ranks: np.ndarray
    units: np.ndarray
    precision: np.ndarray | None = None


@dataclass(frozen=True)
class Difference:
    """A figure of B minus that of A.

    Attributes:
        value: the difference.
        interval: the middle 95 % of the differences over the resamples.
        p_value: two-sided: twice the share of resamples on the smaller side of zero, (count + 1) / (resamples + 1), so
            that it is never zero (Davison and Hinkley, 1997, section 4.2.5).
    """

    value: float
    interval: Interval
    p_value: float


def intervals(
    directions: Mapping[str, Queries], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[dict[str, dict[str, Interval]], Interval]:
    """95 % intervals of every figure of every direction, and of RSum.

    Args:
        directions: the queries of each direction, over the same units.
        resamples: how many samples are drawn.
        seed: of the draws; the same seed gives the same intervals.
    """
    drawn = {name: _resampled(queries, directions, resamples, seed) for name, queries in directions.items()}
    rsum = sum(figures[f"R@{k}"] for figures in drawn.values() for k in RECALLS)
    return {
        name: {figure: _middle(values) for figure, values in figures.items()} for name, figures in drawn.items()
    }, _middle(np.asarray(rsum))


def differences(
    first: Mapping[str, Queries], second: Mapping[str, Queries], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[dict[str, dict[str, Difference]], Difference]:
    """Paired bootstrap of `second` minus `first`, two models on the same queries: every figure, and RSum."""
    results: dict[str, dict[str, Difference]] = {}
    sums, plain_sum = np.zeros(resamples), 0.0
    for name, queries in first.items():
        before, after = (_resampled(side[name], side, resamples, seed) for side in (first, second))
        plain_before, plain_after = _plain(queries), _plain(second[name])
        results[name] = {}
        for figure, values in after.items():
            if figure not in before:  # one of the two lacks the precision of its queries
                continue
            plain = plain_after[figure] - plain_before[figure]
            results[name][figure] = _difference(plain, values - before[figure])
            if figure.startswith("R@"):
                sums += values - before[figure]
                plain_sum += plain
    return results, _difference(plain_sum, sums)


def _difference(value: float, drawn: np.ndarray) -> Difference:
    smaller = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Difference(value, _middle(drawn), min(1.0, 2 * (smaller + 1) / (len(drawn) + 1)))


def _plain(queries: Queries) -> dict[str, float]:
    """The figures without resampling, as one resample that draws every unit once."""
    return {name: float(values[0]) for name, values in _figures(queries, np.ones((1, _units(queries)))).items()}


def _resampled(queries: Queries, directions: Mapping[str, Queries], resamples: int, seed: int) -> dict[str, np.ndarray]:
    """The figures over the resamples: {"R@1": (resamples,), ...}. The draws depend on units and seed alone."""
    units = max(_units(side) for side in directions.values())
    random = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // max(len(queries.ranks), units))
    parts = []
    for start in range(0, resamples, rows):
        drawn = random.integers(0, units, (min(rows, resamples - start), units))
        parts.append(_figures(queries, _counts(drawn, units)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _counts(drawn: np.ndarray, units: int) -> np.ndarray:
    """(N, U) indices -> (N, U) how often each unit was drawn."""
    offsets = np.arange(len(drawn))[:, None] * units
    return np.bincount((drawn + offsets).ravel(), minlength=len(drawn) * units).reshape(len(drawn), units)


def _figures(queries: Queries, counts: np.ndarray) -> dict[str, np.ndarray]:
    """(N, U) counts -> the (N,) figures of a sample in which unit u stands counts[:, u] times."""
    ranks = queries.ranks.astype(np.float64)
    columns = [ranks <= k for k in RECALLS] + [ranks]
    if queries.precision is not None:
        columns.append(queries.precision)
    totals = np.zeros((counts.shape[1], len(columns) + 1))
    np.add.at(totals, queries.units, np.column_stack([np.ones(len(ranks)), *columns]).astype(np.float64))
    sums = counts @ totals
    means = sums[:, 1:] / sums[:, :1]
    figures = {f"R@{k}": 100 * means[:, place] for place, k in enumerate(RECALLS)}
    figures["MedR"] = _medians(queries, counts)
    figures["MeanR"] = means[:, len(RECALLS)]
    if queries.precision is not None:
        figures["mAP@10"] = 100 * means[:, -1]
    return figures


def _medians(queries: Queries, counts: np.ndarray) -> np.ndarray:
    """(N,) medians of the ranks, each query weighing as often as its unit was drawn."""
    order = np.argsort(queries.ranks, kind="stable")
    ranks = queries.ranks[order]
    weights = counts[:, queries.units[order]].cumsum(axis=1)
    half = weights[:, -1:] / 2
    lower, upper = (weights < half).sum(axis=1), (weights <= half).sum(axis=1)
    return (ranks[lower] + ranks[np.minimum(upper, len(ranks) - 1)]) / 2


def _units(queries: Queries) -> int:
    return int(queries.units.max()) + 1


def _middle(values: np.ndarray) -> Interval:
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
