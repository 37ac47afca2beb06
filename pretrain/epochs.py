"""Which sample of which source is taken when: epochs counted in samples, shuffled, and cut into steps."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from cots.errors import SourceError


class Epochs:
    """The samples of a training, one epoch after another. A step may take the last ones of an epoch and the first ones
    of the next, so that none is left over.

    Args:
        lengths: items of each source.
        weights: how often each of a source's items is a sample of an epoch; the fraction is drawn anew each epoch.
        batch_size: samples of a step.
        seed: of the shuffling.

    Attributes:
        samples: of an epoch.

    Raises:
        SourceError: an epoch has fewer samples than a batch, or none of a source.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], batch_size: int, seed: int = 0) -> None:
        for length, weight in zip(lengths, weights):
            if round(length * weight) == 0:
                raise SourceError(
                    f"A source of {length} items with weight {weight:g} contributes no sample to an epoch; raise its "
                    "weight."
                )
        self.lengths, self.weights = list(lengths), list(weights)
        self.batch_size, self.seed = batch_size, seed
        self.samples = sum(round(length * weight) for length, weight in zip(lengths, weights))
        if self.samples < batch_size:
            raise SourceError(
                f"The samples of an epoch, {self.samples}, are fewer than a batch of {batch_size}; lower "
                "training.batch_size."
            )
        self._order = lru_cache(maxsize=2)(self.order)  # a step sees two epochs at most

    def steps(self, epochs: float) -> int:
        """How many steps take so many epochs, at least 1; their samples are those of the epochs to within a batch."""
        return max(1, round(epochs * self.samples / self.batch_size))

    def passed(self, steps: int) -> float:
        """How many epochs so many steps have taken."""
        return steps * self.batch_size / self.samples

    def ends(self, step: int, every: int = 1) -> bool:
        """Whether `every` more epochs are complete after so many steps, and were not one step before."""
        size = every * self.samples
        return step * self.batch_size // size > (step - 1) * self.batch_size // size

    def indices(self, first: int, count: int) -> list[int]:
        """Which items, of those of all sources one after another, samples `first` to `first + count - 1` of the
        training are."""
        places = np.arange(first, first + count)
        epochs, slots = places // self.samples, places % self.samples
        return [int(self._order(epoch)[slot]) for epoch, slot in zip(epochs.tolist(), slots.tolist())]

    def order(self, epoch: int) -> np.ndarray:
        """The items of an epoch, shuffled: each source repeated by its weight, the fraction of it drawn at random."""
        random = np.random.default_rng([self.seed, epoch])
        parts = []
        for start, length, weight in zip(np.cumsum([0, *self.lengths]), self.lengths, self.weights):
            whole, rest = divmod(round(length * weight), length)
            parts += [start + part for part in ([np.arange(length)] * whole + [random.permutation(length)[:rest]])]
        return random.permutation(np.concatenate(parts))
