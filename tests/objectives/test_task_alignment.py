import math

import pytest
import torch
from torch.nn import functional as F

from cots.config import ObjectiveConfig
from cots.objectives.collaborative import CollaborativeObjective
from cots.objectives.feature_queue import FeatureQueue
from cots.objectives.retrieval import MomentumFeatures, PairFeatures, RetrievalTasks, retrieval_tasks
from cots.objectives.task_alignment import agreement, alignment_losses, kl_divergence

D = 8


def _tasks(first: torch.Tensor, second: torch.Tensor) -> RetrievalTasks:
    allowed = torch.ones(first.shape[0], first.shape[1] - 1, dtype=torch.bool)
    nothing = torch.zeros(())
    return RetrievalTasks(F.log_softmax(first, 1), F.log_softmax(second, 1), allowed, nothing, nothing)


def _naive_symmetric_kl(first: list[float], second: list[float]) -> float:
    p = [math.exp(value) / sum(map(math.exp, first)) for value in first]
    q = [math.exp(value) / sum(map(math.exp, second)) for value in second]
    there = sum(a * math.log(a / b) for a, b in zip(p, q))
    back = sum(b * math.log(b / a) for a, b in zip(p, q))
    return (there + back) / 2


@pytest.mark.parametrize("gradient", ["both", "prediction"])
def test_the_loss_equals_its_definition(gradient: str) -> None:
    first, second = torch.randn(5, 9) * 3, torch.randn(5, 9) * 3
    losses = alignment_losses(_tasks(first, second), gradient)
    expected = [_naive_symmetric_kl(a, b) for a, b in zip(first.tolist(), second.tolist())]
    assert losses.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_target_of_each_divergence_gets_no_gradient() -> None:
    """With `prediction`, the gradient of a direction is that of KL(other, held constant || own)."""
    first, second = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    alignment_losses(_tasks(first, second), "prediction").sum().backward()
    p, q = first.detach().softmax(1), second.detach().softmax(1)
    # d KL(q || softmax(z)) / dz = softmax(z) - q
    torch.testing.assert_close(first.grad, (p - q) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second.grad, (q - p) / 2, rtol=1e-4, atol=1e-5)


def test_both_sides_move_the_loss_by_their_true_gradient() -> None:
    first = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    second = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: alignment_losses(_tasks(a, b), "both"), (first, second))


def test_what_is_no_candidate_adds_nothing_and_gives_no_nan() -> None:
    def unit(count: int) -> torch.Tensor:
        return F.normalize(torch.randn(count, D), dim=1)

    queue = FeatureQueue(9, D)
    queue.enqueue(unit(4), unit(4), torch.arange(4))
    ids = torch.tensor([1, 20])
    momentum = MomentumFeatures(unit(2), unit(2))
    batch = PairFeatures(unit(2).requires_grad_(), unit(2).requires_grad_(), ids, ids, momentum)
    (tasks,) = retrieval_tasks(batch, queue, torch.tensor(0.05), "none")
    losses = alignment_losses(tasks)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(batch.image.grad).all()
    for row, rows in ((0, [0, 2, 3]), (1, [0, 1, 2, 3])):
        to_text = [batch.image[row] @ batch.by_momentum.text[row], *(batch.image[row] @ queue.text[j] for j in rows)]
        to_image = [batch.text[row] @ batch.by_momentum.image[row], *(batch.text[row] @ queue.image[j] for j in rows)]
        expected = _naive_symmetric_kl([s.item() / 0.05 for s in to_text], [s.item() / 0.05 for s in to_image])
        assert losses[row].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_equal_distributions_are_aligned() -> None:
    logits = torch.randn(3, 4)
    assert alignment_losses(_tasks(logits, logits)).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert agreement(_tasks(logits, logits)).item() == 1
    assert kl_divergence(F.log_softmax(logits, 1), F.log_softmax(logits.flip(1), 1)).min() >= 0


@pytest.mark.parametrize(("in_batch", "queue_size"), [("online", 0), ("online", 6), ("momentum", 6), ("none", 6)])
def test_momentum_targets_are_the_mean_of_both_directions(in_batch: str, queue_size: int) -> None:
    def unit(count: int) -> torch.Tensor:
        return F.normalize(torch.randn(count, D), dim=1)

    config = ObjectiveConfig.model_validate(
        {
            "temperature": 0.1,
            "contrastive": {"weight": 0, "queue_size": queue_size, "in_batch": in_batch},
            "task_alignment": {"weight": 1, "target": "momentum"},
        }
    )
    objective = CollaborativeObjective(config, D)
    assert objective.uses_momentum
    objective.queue.enqueue(unit(6), unit(6), torch.arange(10, 16))
    ids = torch.arange(3)
    image, text, slow_image, slow_text = unit(3).requires_grad_(), unit(3).requires_grad_(), unit(3), unit(3)
    output = objective(PairFeatures(image, text, ids, ids, MomentumFeatures(slow_image, slow_text)))

    def choice(anchor: torch.Tensor, own: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        return (torch.stack([own, *others]) @ anchor / 0.1).softmax(0)

    def naive(row: int, images: torch.Tensor, texts: torch.Tensor, queued: bool) -> torch.Tensor:
        """Candidates are the pair's own and others, of the batch or of the queue; the targets' are always slow ones."""
        rest = [other for other in range(3) if other != row]
        in_batch_too = in_batch == "momentum" or not queued
        slow = [slow_image[other] for other in rest], [slow_text[other] for other in rest]
        fast = [images[other] for other in rest], [texts[other] for other in rest]
        queue = (list(objective.queue.image), list(objective.queue.text)) if queued else ([], [])
        slow_others = [(slow[way] if in_batch_too else []) + queue[way] for way in (0, 1)]
        others = [(fast[way] if in_batch_too else []) + queue[way] for way in (0, 1)]
        target = choice(slow_image[row], slow_text[row], slow_others[1])
        target = (target + choice(slow_text[row], slow_image[row], slow_others[0])) / 2
        given = (
            choice(image[row], texts[row], others[1]),
            choice(text[row], images[row], others[0]),
        )
        return sum((target * (target / p).log()).sum() for p in given) / 2

    choices = []
    if in_batch == "online":
        choices.append([naive(row, image, text, queued=False) for row in range(3)])
    if queue_size:
        choices.append([naive(row, slow_image, slow_text, queued=True) for row in range(3)])
    expected = torch.stack([torch.stack(rows).mean() for rows in choices]).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    output.loss.backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert slow_image.grad is None
