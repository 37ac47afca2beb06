"""Two normal distributions that numbers are a mixture of, and where the lower one ends."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ITERATIONS = 50
_LEAST = 1e-4  # share of all numbers, and deviation, that a distribution has at least


@dataclass(frozen=True)
class TwoNormals:
    """Attributes:
    shares, means, deviations: (2,) float32, of the lower distribution and of the higher.
    """

    shares: Tensor
    means: Tensor
    deviations: Tensor

    @classmethod
    def fit(cls, values: Tensor) -> "TwoNormals":
        """Expectation maximisation (Dempster et al. 1977), begun at one deviation to either side of the mean.

        Args:
            values: (Q,) float32.
        """
        numbers = values[:, None]
        deviation = values.std(correction=0).clamp_min(_LEAST)
        sides = torch.arange(-1, 2, 2, device=values.device)
        found = cls(torch.full_like(sides, 0.5, dtype=values.dtype), values.mean() + sides * deviation, deviation / 2)
        for _ in range(_ITERATIONS):
            belongs = found.log_densities(values).softmax(dim=1)
            weights = belongs.mean(dim=0).clamp_min(_LEAST)
            means = (belongs * numbers).mean(dim=0) / weights
            variances = (belongs * (numbers - means).square()).mean(dim=0) / weights
            found = cls(weights, means, variances.sqrt().clamp_min(_LEAST))
        return found

    def log_densities(self, values: Tensor) -> Tensor:
        """(Q, 2), each distribution's share in the density at `values` (Q,), but for a constant."""
        distances = (values[:, None] - self.means) / self.deviations
        return self.shares.log() - self.deviations.log() - distances.square() / 2

    @property
    def apart(self) -> Tensor:
        """() float32, the distance of the means in root mean squares of the deviations (Ashman et al. 1994).

        Two that are far apart and not too unequal make a density of two hills. What is drawn from one normal
        distribution, skewed or with heavy tails, stays below 2 if there are a thousand numbers; what is flat does not.
        """
        return (self.means[1] - self.means[0]) / self.deviations.square().mean().sqrt()

    def end_of_lower(self, odds: float) -> Tensor:
        """() float32, no higher than the higher mean: from the lower mean to there, a number is more than `odds` times
        as likely to be of the lower distribution. NaN if there is no such place.
        """
        low, high = self.means
        (share_low, share_high), (narrow_low, narrow_high) = self.shares.log(), 0.5 / self.deviations.square()
        # the logarithm of the odds is a parabola over the distance from the lower mean, and rises from there to `high`
        curve = narrow_low - narrow_high
        slope = 2 * (high - low) * narrow_high
        narrowing = self.deviations[0].log() - self.deviations[1].log()
        offset = share_high - share_low + narrowing - (high - low).square() * narrow_high + math.log(odds)
        root = (slope.square() - 4 * curve * offset).sqrt()
        return torch.minimum(low - 2 * offset / (slope + root), high)
