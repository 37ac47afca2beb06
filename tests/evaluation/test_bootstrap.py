import numpy as np
import pytest

from cots.evaluation.bootstrap import Queries, differences, intervals


def test_the_interval_is_that_of_a_plain_loop_over_whole_items() -> None:
    random = np.random.default_rng(1)
    units = np.repeat(np.arange(30), 3)
    queries = Queries(random.integers(1, 30, 90), units, random.random(90))
    drawn = np.random.default_rng(0).integers(0, 30, (400, 30))
    samples = [np.concatenate([np.flatnonzero(units == unit) for unit in row]) for row in drawn]
    figures = {
        "R@5": [100 * (queries.ranks[s] <= 5).mean() for s in samples],
        "MedR": [np.median(queries.ranks[s]) for s in samples],
        "MeanR": [queries.ranks[s].mean() for s in samples],
        "mAP@10": [100 * queries.precision[s].mean() for s in samples],  # type: ignore[index]
    }
    ours, _ = intervals({"text_to_image": queries}, resamples=400, seed=0)
    for name, values in figures.items():
        assert ours["text_to_image"][name] == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Of 200 test sets drawn from a model whose true R@1 is 40, about 190 intervals hold 40."""
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        ranks = np.where(random.random(300) < 0.4, 1, 20)
        (low, high) = intervals({"d": Queries(ranks, np.arange(300))}, resamples=300)[0]["d"]["R@1"]
        covered += low <= 40 <= high
    assert 180 <= covered <= 199


def test_captions_of_one_item_are_not_counted_as_independent() -> None:
    random = np.random.default_rng(5)
    ranks = np.repeat(random.choice([1, 50], 100), 5)  # all five captions of an item rise and fall together
    width = {}
    for name, units in (("items", np.repeat(np.arange(100), 5)), ("captions", np.arange(500))):
        low, high = intervals({"d": Queries(ranks, units)})[0]["d"]["R@1"]
        width[name] = high - low
    assert width["items"] == pytest.approx(width["captions"] * 5**0.5, rel=0.15)


def test_the_interval_of_rsum_draws_both_directions_together() -> None:
    random = np.random.default_rng(7)
    ranks = random.choice([1, 50], 100)
    both = {"a": Queries(ranks, np.arange(100)), "b": Queries(ranks, np.arange(100))}
    each, rsum = intervals(both)
    assert rsum == pytest.approx(tuple(6 * value for value in each["a"]["R@1"]))


def test_a_seed_gives_the_same_interval_and_another_seed_another() -> None:
    queries = {"d": Queries(np.random.default_rng(2).integers(1, 100, 200), np.arange(200))}
    assert intervals(queries, seed=1) == intervals(queries, seed=1)
    assert intervals(queries, seed=1) != intervals(queries, seed=2)


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    random = np.random.default_rng(11)
    ranks = random.integers(1, 30, 400)
    better = np.where(random.random(400) < 0.1, 1, ranks)  # the same model, better on a tenth of the queries
    units = np.arange(400)
    result, rsum = differences({"d": Queries(ranks, units)}, {"d": Queries(better, units)})
    recall = result["d"]["R@1"]
    assert recall.value == pytest.approx(100 * ((better <= 1).mean() - (ranks <= 1).mean()))
    assert recall.interval[0] > 0
    assert 0 < recall.p_value < 0.01  # of 2,000 resamples none lies at zero, which does not make it impossible
    low, high = intervals({"d": Queries(ranks, units)})[0]["d"]["R@5"]
    assert result["d"]["R@5"].interval[1] - result["d"]["R@5"].interval[0] < high - low
    assert rsum.value == pytest.approx(sum(result["d"][f"R@{k}"].value for k in (1, 5, 10)))


def test_no_difference_is_no_difference() -> None:
    queries = {"d": Queries(np.random.default_rng(2).integers(1, 100, 200), np.arange(200))}
    result, rsum = differences(queries, queries)
    assert result["d"]["R@1"].value == rsum.value == 0
    assert rsum.interval == (0.0, 0.0)
    assert rsum.p_value == 1.0
