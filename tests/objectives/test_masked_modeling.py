import pytest
import torch
from torch.nn import functional as F

from cots.data.masking import IGNORED
from cots.objectives.masked_modeling import MaskedModelingHead

B, N, C, D, CLASSES = 3, 10, 16, 8, 20


def _inputs() -> dict[str, torch.Tensor]:
    places = torch.stack([torch.randperm(N)[:4] for _ in range(B)])
    targets = torch.randint(CLASSES, (B, 4))
    targets[1, 2:] = IGNORED
    return {
        "tokens": torch.randn(B, N, C),
        "places": places,
        "targets": targets,
        "partner": F.normalize(torch.randn(B, D), dim=1),
    }


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_equals_its_definition(tied: bool) -> None:
    head = MaskedModelingHead(C, D, CLASSES, tied=tied)
    weight = torch.randn(CLASSES, C) if tied else head.decoder.weight
    inputs = _inputs()
    output = head(**inputs, tied_weight=weight if tied else None)
    hits, total = 0, 0
    for item in range(B):
        losses = []
        for place, target in zip(inputs["places"][item], inputs["targets"][item]):
            if target == IGNORED:
                continue
            hidden = head.transform(inputs["tokens"][item, place] + head.partner(inputs["partner"][item]))
            logits = weight @ hidden + head.bias
            losses.append(F.cross_entropy(logits[None], target[None]).item())
            hits, total = hits + int(logits.argmax() == target), total + 1
        assert output.losses[item].item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert output.accuracy.item() == pytest.approx(hits / total)


def test_the_partner_learns_from_what_was_hidden() -> None:
    head = MaskedModelingHead(C, D, CLASSES, tied=False)
    inputs = _inputs()
    inputs["partner"].requires_grad_()
    head(**inputs).losses.sum().backward()
    assert inputs["partner"].grad.abs().sum(dim=1).min() > 0


def test_an_item_with_nothing_hidden_costs_nothing() -> None:
    head = MaskedModelingHead(C, D, CLASSES, tied=False)
    inputs = _inputs()
    inputs["targets"][0] = IGNORED
    output = head(**inputs)
    assert output.losses[0].item() == 0
    output.losses.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


def test_losses_are_float32_for_a_head_in_bf16() -> None:
    head = MaskedModelingHead(C, D, CLASSES, tied=False)
    inputs = _inputs()
    exact = head(**inputs).losses
    rounded = head.bfloat16()(**{**inputs, "tokens": inputs["tokens"].bfloat16()}).losses
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)
