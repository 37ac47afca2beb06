import math

import pytest
import torch
from torch.nn import functional as F

from cots.config import ContrastiveConfig, ObjectiveConfig
from cots.objectives.collaborative import CollaborativeObjective
from cots.objectives.contrastive import contrastive_losses, info_nce
from cots.objectives.feature_queue import FeatureQueue
from cots.objectives.retrieval import MomentumFeatures, PairFeatures, retrieval_tasks

D = 8


def _unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def _batch(item_ids: list[int]) -> PairFeatures:
    count = len(item_ids)
    ids = torch.tensor(item_ids)
    momentum = MomentumFeatures(_unit(count, D), _unit(count, D))
    return PairFeatures(_unit(count, D).requires_grad_(), _unit(count, D).requires_grad_(), ids, ids, momentum)


def _losses(batch: PairFeatures, queue: FeatureQueue, temperature: float, in_batch: str = "none") -> torch.Tensor:
    tasks = retrieval_tasks(batch, queue, torch.tensor(temperature), in_batch)
    return torch.stack([contrastive_losses(task) for task in tasks]).mean(dim=0)


def _naive_losses(batch: PairFeatures, queue: FeatureQueue, temperature: float, in_batch: str) -> list[float]:
    """The definition, pair by pair and candidate by candidate."""
    items, filled = batch.item_ids.tolist(), range(int(queue.fill))
    losses = []
    for i, item in enumerate(items):
        others = [j for j, other in enumerate(items) if other != item]
        queued = [j for j in filled if queue.item_ids[j].item() != item]
        choices = []
        for anchor, momentum, online, rows in (
            (batch.image[i], batch.by_momentum.text, batch.text, queue.text),
            (batch.text[i], batch.by_momentum.image, batch.image, queue.image),
        ):
            if in_batch == "online":
                choices.append((anchor, [online[i], *(online[j] for j in others)]))
            if in_batch == "momentum":
                choices.append((anchor, [momentum[j] for j in [i, *others]] + [rows[j] for j in queued]))
            elif queue.size:
                choices.append((anchor, [momentum[i], *(rows[j] for j in queued)]))
        loss = 0.0
        for anchor, candidates in choices:
            scores = [(anchor @ candidate).item() / temperature for candidate in candidates]
            loss += math.log(sum(math.exp(score) for score in scores)) - scores[0]
        losses.append(loss / len(choices))
    return losses


@pytest.mark.parametrize(
    ("in_batch", "size"), [("none", 7), ("momentum", 7), ("momentum", 0), ("online", 7), ("online", 0)]
)
def test_the_loss_equals_its_definition(in_batch: str, size: int) -> None:
    queue = FeatureQueue(size, D)
    if size:
        queue.enqueue(_unit(5, D), _unit(5, D), torch.tensor([1, 2, 3, 3, 8]))
    batch = _batch([3, 4, 4, 9])
    losses = _losses(batch, queue, 0.1, in_batch)
    assert losses.tolist() == pytest.approx(_naive_losses(batch, queue, 0.1, in_batch), rel=1e-4)


def test_only_online_features_get_gradient() -> None:
    queue = FeatureQueue(7, D)
    queue.enqueue(_unit(5, D), _unit(5, D), torch.arange(5))
    batch = _batch([10, 11, 12])
    _losses(batch, queue, 0.1, "momentum").sum().backward()
    assert batch.image.grad is not None
    assert batch.text.grad is not None
    assert not batch.by_momentum.image.requires_grad
    assert not queue.image.requires_grad


def test_without_negatives_the_loss_is_zero_and_finite() -> None:
    batch = _batch([1, 2])
    losses = _losses(batch, FeatureQueue(4, D), 0.05)
    assert losses.tolist() == [0.0, 0.0]
    losses.sum().backward()
    assert torch.isfinite(batch.image.grad).all()


def test_random_rows_of_an_unfilled_queue_do_not_act_as_negatives() -> None:
    batch = _batch([1, 2])
    queue = FeatureQueue(64, D)
    queue.enqueue(_unit(3, D), _unit(3, D), torch.tensor([7, 8, 9]))
    loss = _losses(batch, queue, 0.1)
    queue.image[3:], queue.text[3:] = _unit(61, D), _unit(61, D)
    assert torch.equal(_losses(batch, queue, 0.1), loss)


def test_losses_are_float32_under_autocast() -> None:
    batch = _batch([1, 2, 3])
    queue = FeatureQueue(4, D)
    queue.enqueue(_unit(4, D), _unit(4, D), torch.arange(10, 14))
    exact = _losses(batch, queue, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_losses(batch, queue, 0.05), exact)
    assert exact.dtype == torch.float32


def test_label_smoothing_spreads_over_the_allowed_negatives() -> None:
    allowed = torch.tensor([[True, False, True]])
    given = F.log_softmax(torch.tensor([[1.0, 0.5, -1e4, -0.5]]), dim=1)
    loss = info_nce(given, allowed, label_smoothing=0.2)
    log_probabilities = F.log_softmax(torch.tensor([1.0, 0.5, -0.5]), dim=0)
    expected = -0.8 * log_probabilities[0] - 0.2 * log_probabilities[1:].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_learned_temperature_stays_within_its_bounds_and_can_come_back_from_them() -> None:
    objective = CollaborativeObjective(ObjectiveConfig(learn_temperature=True), D)
    for value, bound, back in ((-20.0, 0.01, -1), (5.0, 0.5, 1)):
        objective.log_temperature.data.fill_(value)
        objective.bound_temperature()
        assert objective.temperature.item() == pytest.approx(bound)
        # on a bound, a loss that asks for the other side still moves it
        (back * objective.temperature).backward()
        assert objective.log_temperature.grad is not None
        assert back * objective.log_temperature.grad.item() > 0
        objective.log_temperature.grad = None
    fixed = CollaborativeObjective(ObjectiveConfig(temperature=0.9), D)
    fixed.bound_temperature()
    assert not fixed.log_temperature.requires_grad
    assert fixed.temperature.item() == pytest.approx(0.9)


def test_the_queue_is_filled_only_after_the_loss() -> None:
    objective = CollaborativeObjective(ObjectiveConfig(contrastive=ContrastiveConfig(queue_size=6)), D)
    batch = _batch([1, 2, 3])
    assert objective(batch).scalars["queue_fill"].item() == 0
    objective.enqueue(batch)
    assert objective(batch).scalars["queue_fill"].item() == 0.5
    # the batch's own items are in the queue, and none of them is its own negative
    assert objective.queue.negatives_of(batch.item_ids).sum(dim=1).tolist() == [2, 2, 2]
