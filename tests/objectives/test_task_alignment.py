import math

import pytest
import torch
from torch.nn import functional as F

from cots.objectives.feature_queue import FeatureQueue
from cots.objectives.retrieval import PairFeatures, RetrievalTasks, retrieval_tasks
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
    batch = PairFeatures(unit(2).requires_grad_(), unit(2).requires_grad_(), ids, unit(2), unit(2), ids)
    (tasks,) = retrieval_tasks(batch, queue, torch.tensor(0.05), "none")
    losses = alignment_losses(tasks)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(batch.image.grad).all()
    for row, rows in ((0, [0, 2, 3]), (1, [0, 1, 2, 3])):
        to_text = [batch.image[row] @ batch.text_momentum[row], *(batch.image[row] @ queue.text[j] for j in rows)]
        to_image = [batch.text[row] @ batch.image_momentum[row], *(batch.text[row] @ queue.image[j] for j in rows)]
        expected = _naive_symmetric_kl([s.item() / 0.05 for s in to_text], [s.item() / 0.05 for s in to_image])
        assert losses[row].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_equal_distributions_are_aligned() -> None:
    logits = torch.randn(3, 4)
    assert alignment_losses(_tasks(logits, logits)).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert agreement(_tasks(logits, logits)).item() == 1
    assert kl_divergence(F.log_softmax(logits, 1), F.log_softmax(logits.flip(1), 1)).min() >= 0
