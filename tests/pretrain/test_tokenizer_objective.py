import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cots.model.visual_tokenizer import RelaxedPicture
from cots.tokenizer_config import VisualTokenizerObjectiveConfig
from pretrain.tokenizer_objective import (
    TokenizerObjective,
    divergences,
    draw_far_patches,
    kl_weight,
    temperature_at,
)


def _log_probabilities(patches: int = 40, codes: int = 7) -> torch.Tensor:
    torch.manual_seed(patches)
    return F.log_softmax(2 * torch.randn(patches, codes), dim=1)


def test_divergences_are_those_from_the_uniform_distribution() -> None:
    log_q = _log_probabilities()
    kl_patch, kl_batch = divergences(log_q)
    naive = 0.0
    for row in log_q.exp().tolist():
        naive += sum(q * math.log(q / (1 / 7)) for q in row) / len(log_q)
    assert float(kl_patch) == pytest.approx(naive, rel=1e-5)
    mean = log_q.exp().mean(dim=0)
    assert float(kl_batch) == pytest.approx(sum(q * math.log(7 * q) for q in mean.tolist()), rel=1e-4, abs=1e-6)
    # what a token tells of its patch is the difference of the two (Hoffman & Johnson 2016)
    information = (log_q.exp() * (log_q - mean.log())).sum(dim=1).mean()
    assert float(kl_patch - kl_batch) == pytest.approx(float(information), rel=1e-4)


def test_divergences_at_the_ends() -> None:
    uniform = torch.full((5, 8), 1 / 8).log()
    assert [float(kl) for kl in divergences(uniform)] == pytest.approx([0, 0], abs=1e-6)
    decided = F.log_softmax(500 * torch.eye(8), dim=1)  # each patch certain, all codes used
    assert [float(kl) for kl in divergences(decided)] == pytest.approx([math.log(8), 0], abs=1e-5)
    collapsed = F.log_softmax(500 * torch.eye(8)[:1].expand(5, 8), dim=1)
    assert [float(kl) for kl in divergences(collapsed)] == pytest.approx([math.log(8)] * 2, abs=1e-5)


@pytest.mark.parametrize("reconstruction", ["l2", "l1"])
def test_the_loss_is_the_sum_of_its_weighted_terms(reconstruction: str) -> None:
    config = VisualTokenizerObjectiveConfig.model_validate(
        {"reconstruction": reconstruction, "kl_weight": 0.3, "kl_warmup": 0.5, "usage_weight": 0.2}
    )
    objective = TokenizerObjective(config, 7)
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    painted = torch.rand(2, 3, 8, 8) * 2 - 1
    log_q = _log_probabilities()
    output = objective(RelaxedPicture(painted, log_q, torch.empty(0)), pixels, 0.25)
    difference = painted - (pixels / 127.5 - 1)
    error = difference.square().mean() if reconstruction == "l2" else difference.abs().mean()
    kl_patch, kl_batch = divergences(log_q)
    expected = error + 0.5 * 0.3 * kl_patch / math.log(7) + 0.2 * kl_batch / math.log(7)
    torch.testing.assert_close(output.loss, expected)
    in_unit_range = ((painted + 1) / 2 - pixels / 255).square().mean()
    torch.testing.assert_close(output.scalars["reconstruction_error"], in_unit_range)
    assert objective.counts.tolist() == log_q.argmax(dim=1).bincount(minlength=7).tolist()


def test_schedules_begin_and_end_where_they_should() -> None:
    for schedule in ("cosine", "exponential", "linear"):
        config = VisualTokenizerObjectiveConfig.model_validate(
            {
                "temperature_start": 2.0,
                "temperature_end": 0.1,
                "temperature_steps": 0.5,
                "temperature_schedule": schedule,
            }
        )
        values = [temperature_at(progress / 20, config) for progress in range(21)]
        assert values[0] == pytest.approx(2.0)
        assert values[10:] == pytest.approx([0.1] * 11)
        assert values[:11] == sorted(values[:11], reverse=True)
    config = VisualTokenizerObjectiveConfig(kl_weight=0.4, kl_warmup=0.2)
    assert [kl_weight(p, config) for p in (0.0, 0.1, 0.2, 1.0)] == pytest.approx([0, 0.2, 0.4, 0.4])
    assert kl_weight(0.0, VisualTokenizerObjectiveConfig(kl_weight=0.4, kl_warmup=0.0)) == 0.4


def test_codes_that_nothing_is_assigned_to_move_to_patches_that_no_code_is_near() -> None:
    torch.manual_seed(0)
    codes = nn.Parameter(torch.eye(4)[[0, 0, 1, 1]].clone())
    optimizer = torch.optim.AdamW([codes])
    codes.grad = torch.ones_like(codes)
    optimizer.step()
    used = codes.detach().clone()[[0, 2]]
    objective = TokenizerObjective(VisualTokenizerObjectiveConfig(revival=0.1), 4)
    objective.counts.copy_(torch.tensor([50.0, 0.0, 50.0, 1.0]))
    # half of the patches lie where codes are, half where none is
    features = torch.eye(4)[[0, 1] * 50 + [2, 3] * 50]
    assert objective.revive(codes, features, optimizer) == 2
    assert torch.equal(codes[[0, 2]], used)
    assert sorted(codes[[1, 3]].argmax(dim=1).tolist()) in ([2, 2], [2, 3], [3, 3])
    assert optimizer.state[codes]["exp_avg"][[1, 3]].abs().sum() == 0
    assert (optimizer.state[codes]["exp_avg"][[0, 2]] != 0).all()
    assert objective.counts.sum() == 0
    objective.counts.fill_(10.0)
    assert objective.revive(codes, features, optimizer) == 0


def test_far_patches_are_drawn_by_their_distance() -> None:
    torch.manual_seed(0)
    features = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]), dim=1)
    drawn = torch.cat([draw_far_patches(features, torch.tensor([[2.0, 0.0]]), 1) for _ in range(4000)])
    share = (drawn[:, 0] < 0).float().mean()
    distances = [0.0, 1 - 0.5**0.5, 2.0]
    assert float(share) == pytest.approx(distances[2] / sum(distances), abs=0.02)
    assert draw_far_patches(features, features[:1], 5).shape == (5, 2)
