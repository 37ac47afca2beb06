import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cots.config import ModelConfig
from cots.model.dual_encoder import DualEncoder
from cots.model.tower import lower_precision

_TEXT = {
    "vocabulary": 64,
    "width": 32,
    "layers": 1,
    "heads": 2,
    "intermediate": 32,
    "positions": 16,
    "max_length": 8,
    "dropout": 0.0,
}


def _convolutional(**image: object) -> DualEncoder:
    tower = {"name": "tf_efficientnet_lite0", "image_size": 64, "pooling": "mean", **image}
    return DualEncoder(ModelConfig.model_validate({"image_tower": tower, "text_tower": _TEXT}))


def test_token_level_outputs_are_kept_beside_the_embedding(tiny_model_config: ModelConfig) -> None:
    encoder = DualEncoder(tiny_model_config).eval()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    token_ids = torch.tensor([[2, 40, 41, 3, 0, 0], [2, 40, 41, 42, 43, 3]])
    image, text = encoder(pixels, token_ids)
    assert image.embedding.shape == text.embedding.shape == (2, 32)
    assert image.tokens.shape == (2, 16, 32)  # one a patch of 16 px
    assert text.tokens.shape == (2, 6, 32)


def test_centers_are_subtracted_on_the_sphere(tiny_model_config: ModelConfig) -> None:
    encoder = DualEncoder(tiny_model_config).eval()
    token_ids = torch.randint(5, 100, (4, 6))
    plain = encoder.encode_text(token_ids).embedding
    encoder.text_center.copy_(0.2 * F.normalize(torch.randn(32), dim=0))
    centred = encoder.encode_text(token_ids).embedding
    assert torch.allclose(centred, F.normalize(plain - encoder.text_center, dim=1), atol=1e-6)


def test_a_convolutional_tower_gives_tokens_and_a_hybrid_starts_from_their_mean() -> None:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    plain = _convolutional().eval()
    assert plain.encode_image(pixels).tokens.shape == (2, 4, 1280)
    assert (plain.image_tower.grid, plain.image_tower.stride) == (2, 32)
    hybrid = _convolutional(pooling="cls", transformer_depth=1, transformer_width=48, transformer_heads=2).eval()
    assert hybrid.encode_image(pixels).tokens.shape == (2, 4, 48)


def test_hidden_patches_are_seen_as_the_mean_colour(tiny_model_config: ModelConfig) -> None:
    image = tiny_model_config.image_tower.model_copy(update={"mean": (0.2, 0.4, 0.6)})
    encoder = DualEncoder(tiny_model_config.model_copy(update={"image_tower": image})).eval()
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    hidden = torch.rand(3, encoder.image_tower.grid**2) < 0.4
    painted = pixels.clone()
    for picture, patch in hidden.nonzero().tolist():
        row, column = 16 * (patch // 4), 16 * (patch % 4)
        for channel, mean in enumerate((51, 102, 153)):
            painted[picture, channel, row : row + 16, column : column + 16] = mean
    expected, found = encoder.encode_image(painted), encoder.encode_image(pixels, hidden)
    assert torch.allclose(found.tokens, expected.tokens, atol=1e-4)
    assert torch.allclose(found.embedding, expected.embedding, atol=1e-5)
    assert not torch.allclose(found.embedding, encoder.encode_image(pixels).embedding, atol=1e-4)


def test_a_clip_is_the_mean_of_its_frames(tiny_model_config: ModelConfig) -> None:
    encoder = DualEncoder(tiny_model_config).eval()
    encoder.image_center.copy_(0.2 * F.normalize(torch.randn(32), dim=0))
    clips = torch.randint(0, 256, (2, 3, 3, 64, 64), dtype=torch.uint8)
    hidden = torch.rand(2, 3 * 16) < 0.4
    found = encoder.encode_image(clips, hidden)
    frames = [encoder.encode_image(clips[:, f], hidden[:, 16 * f : 16 * (f + 1)]) for f in range(3)]
    mean = F.normalize(sum(frame.embedding for frame in frames), dim=1)
    assert torch.allclose(found.embedding, mean, atol=1e-5)
    assert torch.allclose(found.tokens, torch.cat([frame.tokens for frame in frames], dim=1), atol=1e-4)


@pytest.mark.parametrize("kind", ["transformer", "convolutional"])
def test_towers_of_low_precision_nearly_agree_with_full_and_learn(kind: str, tiny_model_config: ModelConfig) -> None:
    full = DualEncoder(tiny_model_config) if kind == "transformer" else _convolutional()
    low = copy.deepcopy(full)
    lower_precision(low, torch.bfloat16)
    for name, module in low.named_modules():
        kept = isinstance(module, nn.BatchNorm2d) or "projection" in name
        for parameter in module.parameters(recurse=False):
            assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    token_ids = torch.randint(5, 64, (4, 8))
    for expected, found in zip(full.eval()(pixels, token_ids), low.eval()(pixels, token_ids)):
        assert found.embedding.dtype == torch.float32
        assert (found.embedding * expected.embedding).sum(dim=1).min() > 0.99
    image, text = low.train()(pixels, token_ids)
    (image.embedding * text.embedding).sum().backward()
    gradients = [(name, parameter.grad) for name, parameter in low.named_parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for _, gradient in gradients)


def test_frozen_norms_keep_their_statistics_and_learn_their_scales() -> None:
    encoder = _convolutional(freeze_norms=True).train()
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    encoder.encode_image(pixels).embedding[:, 0].sum().backward()
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before))
    assert norms[0].weight.grad is not None


def test_a_frozen_tower_stays_as_it_is_in_training(tiny_model_config: ModelConfig) -> None:
    image = tiny_model_config.image_tower.model_copy(update={"dropout": 0.5})
    encoder = DualEncoder(tiny_model_config.model_copy(update={"image_tower": image}))
    encoder.image_tower.freeze()
    encoder.train()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    first, second = encoder.encode_image(pixels), encoder.encode_image(pixels)
    assert torch.equal(first.embedding, second.embedding)
    assert not first.tokens.requires_grad
    assert first.embedding.requires_grad  # its projection learns
    assert encoder.text_tower.training


@pytest.mark.parametrize("kind", ["transformer", "convolutional", "hybrid"])
def test_activation_checkpointing_changes_memory_only(kind: str, tiny_model_config: ModelConfig) -> None:
    hybrid = {"pooling": "cls", "transformer_depth": 1, "transformer_width": 48, "transformer_heads": 2}
    frozen = {"freeze_norms": True}
    encoder = {
        "transformer": lambda: DualEncoder(tiny_model_config),
        "convolutional": lambda: _convolutional(**frozen),
        "hybrid": lambda: _convolutional(**hybrid, **frozen),
    }[kind]().train()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    token_ids = torch.randint(5, 64, (2, 8))
    gradients, kept = [], []
    for enabled in (False, True):
        encoder.set_activation_checkpointing(enabled)
        encoder.zero_grad()
        bytes_kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            image, text = encoder(pixels, token_ids)
        (image.embedding * text.embedding).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
        kept.append(bytes_kept)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*gradients))
    assert kept[1] < kept[0] / 2
