from collections import Counter

import numpy as np
import pytest

from cots.errors import SourceError
from pretrain.epochs import Epochs
from pretrain.loader import StepSampler

LENGTHS, WEIGHTS = (10, 7, 4), (1.0, 2.5, 0.5)


def _epochs(seed: int = 0) -> Epochs:
    return Epochs(LENGTHS, WEIGHTS, 6, seed)


def _steps(
    seed: int = 0, rank: int = 0, ranks: int = 1, first: int = 0, batch_size: int = 6
) -> list[list[tuple[int, int]]]:
    sampler = StepSampler(LENGTHS, WEIGHTS, batch_size=batch_size, seed=seed, rank=rank, ranks=ranks).between(first, 20)
    assert len(sampler) == 20 - first
    return list(sampler)


@pytest.mark.parametrize("epoch", range(4))
def test_an_epoch_has_each_sample_as_often_as_its_weight_says(epoch: int) -> None:
    counts = Counter(_epochs().order(epoch).tolist())
    assert [counts[index] for index in range(10)] == [1] * 10
    assert sorted(counts[index] for index in range(10, 17)) == [2, 2, 2, 3, 3, 3, 3]  # round(17.5) = 18
    assert sorted(counts[index] for index in range(17, 21)) == [0, 0, 1, 1]


def test_epochs_and_seeds_have_other_orders_and_fractions() -> None:
    orders = {tuple(_epochs(seed).order(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert np.array_equal(_epochs(1).order(2), _epochs(1).order(2))
    halves = {frozenset(i for i in _epochs().order(epoch).tolist() if i >= 17) for epoch in range(9)}
    assert len(halves) > 1


def test_steps_are_slices_of_one_epoch_after_another() -> None:
    for batch_size in (6, 7):  # 30 samples an epoch: five steps of 6, or steps of 7 that go over its end
        steps = _steps(batch_size=batch_size)
        taken = [index for step in steps for _, index in step]
        orders = [index for epoch in range(5) for index in _epochs().order(epoch).tolist()]
        assert taken == orders[: 20 * batch_size]
        places = [place for step in steps for place, _ in step]
        assert places == list(range(20 * batch_size))  # what augmentation is drawn from never repeats


@pytest.mark.parametrize("batch_size", [5, 7, 30])
@pytest.mark.parametrize("every", [1, 3])
def test_epochs_are_counted_in_samples(batch_size: int, every: int) -> None:
    epochs = Epochs(LENGTHS, WEIGHTS, batch_size)
    steps = epochs.steps(12)
    assert abs(steps * batch_size - 12 * 30) <= batch_size / 2
    assert epochs.passed(steps) == pytest.approx(12, abs=0.5 * batch_size / 30)
    ends = [step for step in range(1, 100) if epochs.ends(step, every)]
    naive, complete = [], 0
    for step in range(1, 100):
        if step * batch_size >= (complete + 1) * every * 30:
            complete += 1
            naive.append(step)
    assert ends == naive
    assert Epochs([100], [1.0], 80).steps(0.001) == 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_partition_every_global_batch(ranks: int) -> None:
    parts = zip(*(_steps(rank=rank, ranks=ranks) for rank in range(ranks)))
    together = [[sample for share in shares for sample in share] for shares in parts]
    assert together == _steps()


def test_a_loader_that_starts_at_a_step_goes_on_as_one_that_came_there() -> None:
    for first in (0, 3, 5, 12, 20):
        assert _steps(first=first) == _steps()[first:]


def test_an_epoch_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(SourceError, match=r"epoch, 5, are fewer than a batch of 6; lower training\.batch_size"):
        Epochs([10], [0.5], 6)


def test_a_source_of_which_an_epoch_has_nothing_is_refused() -> None:
    with pytest.raises(SourceError, match=r"source of 40 items with weight 0\.01 contributes no sample .* raise its"):
        Epochs([100, 40], [1.0, 0.01], 6)
