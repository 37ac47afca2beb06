"""The random numbers with which the device augments and hides the samples of a training step."""

import numpy as np
import torch
from torch import Tensor


class SampleDraws:
    """Random numbers of a step's samples, the same for each sample on any number of ranks.

    Every rank draws those of the whole batch, which costs next to nothing, and takes the rows of its own samples. They
    depend on the seed and the step alone, so that a checkpoint need not hold them.

    Args:
        seed: of the training.
        device: where the numbers are wanted. On another kind of device they are others.
        rank, ranks: which part of each batch is this process's, of how many equal parts.
    """

    def __init__(self, seed: int, device: torch.device, rank: int = 0, ranks: int = 1) -> None:
        self._seed, self._device = seed, device
        self._rank, self._ranks = rank, ranks
        # the meta device, on which a step is only counted, has no generator
        self._generator = None if device.type == "meta" else torch.Generator(device)
        self.begin(0)

    def begin(self, step: int) -> None:
        """Go to the numbers of a step; each call of the methods below is given the next of them."""
        if self._generator is not None:
            self._generator.manual_seed(int(np.random.SeedSequence([self._seed, step]).generate_state(1, np.uint64)[0]))

    def uniform(self, samples: int, *shape: int) -> Tensor:
        """(samples, *shape) float32 in [0, 1): a row for each sample of this rank."""
        drawn = torch.rand(samples * self._ranks, *shape, device=self._device, generator=self._generator)
        return self._own(drawn, samples)

    def integers(self, high: int, samples: int, *shape: int) -> Tensor:
        """(samples, *shape) int64 in [0, high): a row for each sample of this rank."""
        size = (samples * self._ranks, *shape)
        return self._own(torch.randint(high, size, device=self._device, generator=self._generator), samples)

    def _own(self, drawn: Tensor, samples: int) -> Tensor:
        return drawn[self._rank * samples : (self._rank + 1) * samples]
