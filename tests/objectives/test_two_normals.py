import math
import statistics
from collections.abc import Sequence

import pytest
import torch

from cots.objectives.two_normals import TwoNormals


def _mixture(low: int, high: int, means: Sequence[float] = (0.1, 0.6), deviations: Sequence[float] = (0.15, 0.1)):
    random = torch.Generator().manual_seed(0)
    parts = [
        mean + deviation * torch.randn(count, generator=random)
        for count, mean, deviation in zip((low, high), means, deviations)
    ]
    return torch.cat(parts)


def _log_density(value: float, share: float, mean: float, deviation: float) -> float:
    return math.log(share / deviation) - ((value - mean) / deviation) ** 2 / 2


def _fit_slowly(values: list[float]) -> list[tuple[float, float, float]]:
    """Expectation maximisation, number by number; (share, mean, deviation) of both."""
    mean, deviation = statistics.mean(values), statistics.pstdev(values)
    found = [(0.5, mean - deviation, deviation / 2), (0.5, mean + deviation, deviation / 2)]
    for _ in range(50):
        sums = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
        for value in values:
            densities = [math.exp(_log_density(value, *each)) for each in found]
            for own, density in zip(sums, densities):
                part = density / sum(densities)
                for power in range(3):
                    own[power] += part * value**power
        found = [
            (count / len(values), first / count, math.sqrt(second / count - (first / count) ** 2))
            for count, first, second in sums
        ]
    return found


def test_the_fit_is_that_of_numbers_one_by_one() -> None:
    values = _mixture(60, 240)
    found = TwoNormals.fit(values)
    slowly = zip(*_fit_slowly(values.double().tolist()))
    for ours, theirs in zip((found.shares, found.means, found.deviations), slowly):
        assert ours.tolist() == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_two_hills_are_found(share: float) -> None:
    low = round(20_000 * share)
    found = TwoNormals.fit(_mixture(low, 20_000 - low))
    assert found.apart > 2
    assert found.shares.tolist() == pytest.approx([share, 1 - share], abs=0.06)
    assert found.means.tolist() == pytest.approx([0.1, 0.6], abs=0.1)


@pytest.mark.parametrize("shape", ["normal", "skewed", "heavy", "all alike"])
def test_one_hill_is_not_taken_for_two(shape: str) -> None:
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, generator=random)
    values = {
        "normal": 0.5 + 0.1 * normal,
        "skewed": 0.8 - 0.1 * (0.5 * normal).exp(),
        "heavy": 0.5 + 0.1 * normal / (torch.randn(4, 20_000, generator=random).square().mean(dim=0)).sqrt(),
        "all alike": torch.full((1000,), 0.5),
    }[shape]
    found = TwoNormals.fit(values)
    assert all(torch.isfinite(part).all() for part in (found.shares, found.means, found.deviations, found.apart))
    assert found.apart < 2


@pytest.mark.parametrize("deviations", [(0.15, 0.1), (0.1, 0.1), (0.08, 0.12), (0.1, 0.1001)])
@pytest.mark.parametrize("odds", [1.0, 9.0])
def test_the_lower_one_ends_where_the_odds_are_met(deviations: tuple[float, float], odds: float) -> None:
    shares, means = (0.2, 0.8), (0.1, 0.6)
    found = TwoNormals(*(torch.tensor(each) for each in (shares, means, deviations)))
    each = list(zip(shares, means, deviations))
    places = [place / 1e5 for place in range(10_000, 60_000)]  # from mean to mean
    lower = [
        place for place in places if _log_density(place, *each[0]) - _log_density(place, *each[1]) > math.log(odds)
    ]
    assert found.end_of_lower(odds).item() == pytest.approx(lower[-1], abs=2e-4)


def test_a_lower_one_that_no_number_is_surely_of_has_no_end() -> None:
    found = TwoNormals(torch.tensor([0.01, 0.99]), torch.tensor([0.5, 0.6]), torch.tensor([0.05, 0.1]))
    assert found.end_of_lower(9.0).isnan()


def test_the_lower_one_ends_at_the_higher_mean_at_the_latest() -> None:
    found = TwoNormals(torch.tensor([0.99, 0.01]), torch.tensor([0.2, 0.4]), torch.tensor([0.1, 0.09]))
    assert found.end_of_lower(1.0).item() == pytest.approx(0.4)


def test_the_distance_is_in_root_mean_square_deviations() -> None:
    found = TwoNormals(torch.tensor([0.5, 0.5]), torch.tensor([0.1, 0.6]), torch.tensor([0.05, 0.15]))
    assert found.apart.item() == pytest.approx(0.5 / math.sqrt((0.05**2 + 0.15**2) / 2))


def test_an_outlier_is_fitted_by_numbers() -> None:
    values = torch.full((12_800,), 0.5)
    values[0] = -0.5
    found = TwoNormals.fit(values)
    assert all(torch.isfinite(part).all() for part in (found.shares, found.means, found.deviations, found.apart))
