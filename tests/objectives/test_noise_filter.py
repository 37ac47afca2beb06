import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from cots.config import ContrastiveConfig, NoiseFilterConfig, ObjectiveConfig
from cots.objectives.collaborative import CollaborativeObjective
from cots.objectives.noise_filter import NoiseFilter
from cots.objectives.retrieval import MomentumFeatures, PairFeatures
from cots.objectives.two_normals import TwoNormals

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
    assert noise_filter.judge(*pairs, progress=1.0).kept.all()  # the queue is not full
    noise_filter.enqueue(*_pairs_with([0.5, 0.6]))
    assert noise_filter.judge(*pairs, progress=0.4).kept.all()  # too early
    assert noise_filter.judge(*pairs, progress=0.5).kept.tolist() == [True, False, True]


RANDOM = torch.Generator().manual_seed(0)
TOGETHER, STRANGERS = (mean + 0.1 * torch.randn(2000, generator=RANDOM) for mean in (0.55, 0.0))


def _mixture(*parts: torch.Tensor) -> NoiseFilter:
    """A filter whose queue is full of these similarities."""
    values = torch.cat(parts)
    noise_filter = NoiseFilter(NoiseFilterConfig(queue_size=len(values), rule="mixture", start=0.2))
    noise_filter.similarities.copy_(values)
    noise_filter.fill.fill_(len(values))
    return noise_filter


def _judged(noise_filter: NoiseFilter, progress: float = 1.0) -> list[bool]:
    """Of pairs of these similarities; with the captions of others theirs are near 0."""
    torch.manual_seed(0)
    similarities = torch.tensor([-0.9, -0.2, 0.0, 0.2, 0.27, 0.4, 0.6, 1.0])
    image = F.normalize(torch.randn(len(similarities), 1000), dim=1)
    across = torch.randn_like(image)
    across = F.normalize(across - (across * image).sum(dim=1, keepdim=True) * image, dim=1)
    text = similarities[:, None] * image + (1 - similarities.square())[:, None].sqrt() * across
    return noise_filter.judge(image, text, progress).kept.tolist()


def test_a_mixture_leaves_out_the_lower_hill() -> None:
    noise_filter = _mixture(TOGETHER[:800], STRANGERS[:200])
    assert _judged(noise_filter) == [False, False, False, False, True, True, True, True]
    assert all(_judged(noise_filter, progress=0.1))
    noise_filter.fill -= 1
    assert all(_judged(noise_filter))


@pytest.mark.parametrize(
    "parts",
    [
        (TOGETHER,),
        (0.7 - 0.1 * (TOGETHER[:1000] * 5).exp() / 15,),  # skewed
        (TOGETHER[:400], STRANGERS[:600]),  # the lower one is the larger
        (TOGETHER[:800] + 0.3, TOGETHER[:200] - 0.1),  # two sources
    ],
    ids=["one hill", "skewed", "mostly low", "two sources"],
)
def test_a_mixture_leaves_out_nothing_else(parts: tuple[torch.Tensor, ...]) -> None:
    assert all(_judged(_mixture(*parts)))


@pytest.mark.parametrize(("distance", "found"), [(0.19, False), (0.24, True)])
def test_hills_are_two_deviations_apart(monkeypatch: pytest.MonkeyPatch, distance: float, found: bool) -> None:
    means = torch.tensor([0.0, distance])
    fitted = TwoNormals(torch.tensor([0.2, 0.8]), means, torch.tensor([0.1, 0.1]))
    monkeypatch.setattr(TwoNormals, "fit", lambda _: fitted)
    assert bool(_mixture(TOGETHER).lower_hill(STRANGERS)[0]) == found


def test_towers_that_do_not_tell_pairs_from_strangers_find_nothing() -> None:
    """The queue holds similarities of two times, between which all rose."""
    noise_filter = _mixture(TOGETHER[:600], STRANGERS[:400])
    assert noise_filter.lower_hill(STRANGERS)[0]
    assert not noise_filter.lower_hill(TOGETHER)[0]
    assert not noise_filter.lower_hill(STRANGERS + 0.4)[0]


def test_a_pair_is_left_out_at_odds_of_nine(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = TwoNormals(torch.tensor([0.2, 0.8]), torch.tensor([0.0, 0.55]), torch.tensor([0.1, 0.1]))
    monkeypatch.setattr(TwoNormals, "fit", lambda _: fitted)
    # the logarithm of the odds falls by 0.55 / 0.1^2 = 55 a unit, from log(0.2 / 0.8) in the middle
    expected = 0.275 + (math.log(0.2 / 0.8) - math.log(9)) / 55
    assert _mixture(TOGETHER).lower_hill(STRANGERS)[1].item() == pytest.approx(expected, abs=1e-4)


def test_a_hill_without_an_end_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = TwoNormals(torch.tensor([0.001, 0.999]), torch.tensor([0.0, 0.3]), torch.tensor([0.1, 0.14]))
    assert fitted.apart > 2
    assert fitted.end_of_lower(9).isnan()
    monkeypatch.setattr(TwoNormals, "fit", lambda _: fitted)
    assert all(_judged(_mixture(TOGETHER)))


def test_a_mixture_wants_many_similarities_and_no_deviations() -> None:
    with pytest.raises(ValueError, match="finds two hills in any few similarities; set queue_size to 1000 or more"):
        NoiseFilterConfig(rule="mixture", queue_size=999)
    with pytest.raises(ValueError, match="deviations has no effect with rule=mixture"):
        NoiseFilterConfig(rule="mixture", queue_size=1000, deviations=0.5)
    assert not NoiseFilter(NoiseFilterConfig(rule="mixture")).enabled


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


@pytest.mark.parametrize("progress", [0.1, 1.0])
def test_what_a_mixture_finds_is_logged_and_gets_no_gradient(progress: float) -> None:
    config = ObjectiveConfig(contrastive=ContrastiveConfig(queue_size=8))
    objective = CollaborativeObjective(config, D)
    objective.enqueue(_batch([0.5, 0.6, 0.5, 0.6]))
    objective.filter = _mixture(TOGETHER[:800], STRANGERS[:200])
    similarities = torch.tensor([0.6, -0.2, 0.6, 0.5])
    axes = torch.eye(D)
    image, text = (
        axes[::2],
        similarities[:, None] * axes[::2] + (1 - similarities.square())[:, None].sqrt() * axes[1::2],
    )
    batch = replace(_batch([0.0] * 4), momentum=MomentumFeatures(image, text))
    output = objective(batch, progress)
    output.loss.backward()
    found = progress == 1.0
    assert output.scalars["filter_kept"].item() == pytest.approx(0.75 if found else 1.0)
    assert ("filter_two_hills" in output.scalars) == found
    assert (batch.image.grad[1].abs().sum() == 0) == found
    assert "filter_threshold" not in output.scalars


def test_without_a_queue_nothing_is_filtered_or_logged() -> None:
    objective = CollaborativeObjective(ObjectiveConfig(contrastive=ContrastiveConfig(queue_size=8)), D)
    assert not objective.filter.enabled
    assert "filter_kept" not in objective(_batch([0.1, -0.9])).scalars
