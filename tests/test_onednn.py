"""Linear maps by oneDNN are PyTorch's own, and only those that may be are."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cots import onednn
from cots.model.open_clip_model import PlainSelfAttention
from cots.onednn import quick_linears

CPU = torch.device("cpu")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that went to oneDNN, which is taken to be quicker."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    shapes: list[torch.Size] = []
    original = onednn._by_onednn

    def counted(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        shapes.append(input.shape)
        return original(input, weight, bias)

    monkeypatch.setattr(onednn, "_by_onednn", counted)
    monkeypatch.setattr(onednn, "_is_quicker", lambda: True)
    return shapes


@pytest.mark.parametrize("shape", [(9, 24), (2, 7, 24), (2, 3, 5, 24), (1, 4, 24)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_they_give_what_pytorch_gives(shape: tuple[int, ...], with_bias: bool, products: list[torch.Size]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=with_bias)
    rows = torch.randn(shape)
    for given in (rows, rows.flip(0), torch.randn(*shape[:-1], 48)[..., ::2]):
        with torch.inference_mode():
            expected = layer(given)
            with quick_linears(CPU):
                torch.testing.assert_close(layer(given), expected, rtol=1e-5, atol=1e-5)
    assert len(products) == 3


def test_other_types_few_rows_and_gradients_are_left_to_pytorch(products: list[torch.Size]) -> None:
    layer = nn.Linear(24, 40)
    rows = torch.randn(9, 24)
    with quick_linears(CPU):
        layer(rows).sum().backward()
        assert layer.weight.grad is not None
        with torch.inference_mode():
            layer(rows[:2])
            F.linear(rows.double(), layer.weight.double())
            F.linear(rows.bfloat16(), layer.weight.bfloat16())
    with torch.inference_mode(), quick_linears(torch.device("cuda")):
        layer(rows)
    assert not products


def test_attention_of_a_sequence_with_itself_is_that_of_pytorch(products: list[torch.Size]) -> None:
    torch.manual_seed(1)
    original = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    ours = PlainSelfAttention(original)
    words = torch.randn(3, 10, 32)
    causal = torch.full((10, 10), -torch.inf).triu(1)
    for mask in (None, causal):
        with torch.inference_mode():
            expected = original(words, words, words, need_weights=False, attn_mask=mask)[0]
            with quick_linears(CPU):
                found = ours(words, words, words, need_weights=False, attn_mask=mask)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(products) == 4


def test_open_clips_towers_compute_the_same(tmp_path: Path, products: list[torch.Size]) -> None:
    open_clip = pytest.importorskip("open_clip")
    from cots.model.pretrained import load_model

    model = open_clip.create_model("ViT-B-32").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    ours = load_model(f"open_clip:ViT-B-32/{tmp_path / 'weights.pt'}", device="cpu")
    pixels = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (model.visual.image_mean, model.visual.image_std))
    tokens = open_clip.get_tokenizer("ViT-B-32")(["a dog", "two red cars"])
    products.clear()
    with torch.inference_mode():
        images = F.normalize(model.encode_image((pixels / 255 - mean) / std), dim=-1)
        texts = F.normalize(model.encode_text(tokens), dim=-1)
    assert not products
    torch.testing.assert_close(ours.encode_images(pixels), images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.encode_texts(["a dog", "two red cars"]), texts, rtol=1e-4, atol=1e-5)
    assert len(products) >= 2 * 12 * 4


def test_the_quicker_of_both_is_found_without_an_error() -> None:
    assert onednn._is_quicker() in (True, False)
