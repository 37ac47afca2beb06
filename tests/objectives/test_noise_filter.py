import statistics

import pytest
import torch
from torch.nn import functional as F

from cots.config import ContrastiveConfig, NoiseFilterConfig, ObjectiveConfig
from cots.objectives.collaborative import CollaborativeObjective
from cots.objectives.noise_filter import NoiseFilter
from cots.objectives.retrieval import MomentumFeatures, PairFeatures

D = 8


def _pairs_with(similarities: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors whose inner products are the given ones."""
    image = torch.zeros(len(similarities), D)
    image[:, 0] = 1
    text = torch.zeros(len(similarities), D)
    text[:, 0] = torch.tensor(similarities)
    text[:, 1] = (1 - text[:, 0] ** 2).sqrt()
    return image, text


def test_the_threshold_is_that_of_the_last_similarities() -> None:
    noise_filter = NoiseFilter(NoiseFilterConfig(queue_size=5, deviations=1.5))
    for values in ([0.1, 0.9, 0.3], [0.5, 0.7], [0.2]):
        noise_filter.enqueue(*_pairs_with(values))
    last = [0.9, 0.3, 0.5, 0.7, 0.2]
    expected = statistics.mean(last) - 1.5 * statistics.pstdev(last)
    assert noise_filter.threshold().item() == pytest.approx(expected, abs=1e-5)


def test_pairs_below_the_threshold_do_not_teach() -> None:
    noise_filter = NoiseFilter(NoiseFilterConfig(queue_size=4, deviations=1.0, start=0.5))
    pairs = _pairs_with([0.6, -0.2, 0.5])
    noise_filter.enqueue(*_pairs_with([0.5, 0.6]))
    assert noise_filter.keep(*pairs, noise_filter.threshold(), progress=1.0).all()  # the queue is not full
    noise_filter.enqueue(*_pairs_with([0.5, 0.6]))
    assert noise_filter.keep(*pairs, noise_filter.threshold(), progress=0.4).all()  # too early
    assert noise_filter.keep(*pairs, noise_filter.threshold(), progress=0.5).tolist() == [True, False, True]


def test_a_mixture_leaves_out_the_lower_hill_and_nothing_where_there_is_one() -> None:
    random = torch.Generator().manual_seed(0)
    together, wrong = (mean + 0.1 * torch.randn(1000, generator=random) for mean in (0.55, 0.0))
    pairs = _pairs_with([-0.2, 0.0, 0.2, 0.4, 0.6])
    noise_filter = NoiseFilter(NoiseFilterConfig(queue_size=1000, rule="mixture", start=0.0))
    noise_filter.enqueue(*_pairs_with([*together[:700].tolist(), *wrong[:200].tolist()]))
    assert noise_filter.keep(*pairs, noise_filter.threshold(), progress=1.0).all()  # the queue is not full
    assert noise_filter.threshold().item() == -1
    noise_filter.enqueue(*_pairs_with(together[700:800].tolist()))
    kept = noise_filter.keep(*pairs, noise_filter.threshold(), progress=1.0)
    assert kept.tolist() == [False, False, False, True, True]
    noise_filter.enqueue(*_pairs_with(together.tolist()))
    assert noise_filter.keep(*pairs, noise_filter.threshold(), progress=1.0).all()
    assert noise_filter.threshold().item() == -1


def _batch(similarities: list[float]) -> PairFeatures:
    count = len(similarities)
    ids = torch.arange(100, 100 + count)

    def online() -> torch.Tensor:
        return F.normalize(torch.randn(count, D), dim=1).requires_grad_()

    return PairFeatures(online(), online(), ids, ids, MomentumFeatures(*_pairs_with(similarities)))


def test_a_filtered_pair_gets_no_gradient_and_does_not_dilute_the_mean() -> None:
    config = ObjectiveConfig(
        contrastive=ContrastiveConfig(queue_size=8),
        noise_filter=NoiseFilterConfig(queue_size=4, start=0),
        task_alignment={"weight": 1.0},
    )
    objective = CollaborativeObjective(config, D)
    objective.enqueue(_batch([0.5, 0.6, 0.5, 0.6]))
    batch = _batch([0.6, -0.5, 0.6])
    output = objective(batch)
    output.loss.backward()
    assert output.scalars["filter_kept"].item() == pytest.approx(2 / 3)
    assert batch.image.grad[1].abs().sum() == 0
    assert batch.text.grad[1].abs().sum() == 0
    assert batch.image.grad[[0, 2]].abs().sum(dim=1).min() > 0
    plain = CollaborativeObjective(config.model_copy(update={"noise_filter": NoiseFilterConfig()}), D)
    plain.queue = objective.queue
    rows = torch.tensor([0, 2])
    ids = batch.item_ids[rows]
    momentum = MomentumFeatures(batch.by_momentum.image[rows], batch.by_momentum.text[rows])
    kept = PairFeatures(batch.image[rows], batch.text[rows], ids, ids, momentum)
    assert output.loss.item() == pytest.approx(plain(kept).loss.item(), rel=1e-5)


def test_without_a_queue_nothing_is_filtered_or_logged() -> None:
    objective = CollaborativeObjective(ObjectiveConfig(contrastive=ContrastiveConfig(queue_size=8)), D)
    assert not objective.filter.enabled
    assert "filter_kept" not in objective(_batch([0.1, -0.9])).scalars
