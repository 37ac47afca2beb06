import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cots.errors import ModelError
from cots.model import visual_tokenizer as module
from cots.model.visual_tokenizer import (
    VisualTokenizer,
    gumbel_softmax,
    load_visual_tokenizer,
    save_visual_tokenizer,
)
from cots.tokenizer_config import VisualTokenizerConfig

SHAPE = VisualTokenizerConfig(codebook_size=50, code_dim=8, stride=8, width=16, min_width=8, blocks=1, image_size=32)


def _tokenizer(seed: int = 0, **changes: int) -> VisualTokenizer:
    torch.manual_seed(seed)
    tokenizer = VisualTokenizer(SHAPE.model_copy(update=changes)).eval().requires_grad_(False)
    with torch.no_grad():  # where the residual branches count, and codes are told apart
        for parameter in tokenizer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return tokenizer


def _pictures(count: int, side: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_tokens_are_the_most_probable_codes_of_every_patch_row_by_row() -> None:
    tokenizer = _tokenizer()
    pixels = _pictures(3, 32)
    tokens = tokenizer.tokens(pixels, 4)
    assert tokens.shape == (3, 16)
    assert tokens.dtype == torch.int64
    assert len(tokens.unique()) > 5
    log_probabilities = tokenizer(pixels, 1.0).log_probabilities
    assert torch.equal(tokens.flatten(), log_probabilities.argmax(dim=1))
    # by hand: the encoder's map, its angles with the codes
    encoded = tokenizer.encoder(pixels / 127.5 - 1)
    for picture, row, column in ((0, 0, 1), (1, 3, 0), (2, 2, 3)):
        cosines = F.cosine_similarity(encoded[picture, :, row, column], tokenizer.codes, dim=1)
        assert tokens[picture, 4 * row + column] == cosines.argmax()


def test_tokens_do_not_depend_on_the_batch_the_chunks_or_the_sharpness(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = _tokenizer()
    pixels = _pictures(5, 32)
    tokens = tokenizer.tokens(pixels, 4)
    assert torch.equal(tokens, tokenizer.tokens(pixels, 4))
    assert torch.equal(tokens[3:4], tokenizer.tokens(pixels[3:4], 4))
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", 50 * 7)
    assert torch.equal(tokens, tokenizer.tokens(pixels, 4))
    tokenizer.log_sharpness.fill_(0.0)
    assert torch.equal(tokens, tokenizer.tokens(pixels, 4))


def test_pictures_are_brought_to_the_grid() -> None:
    tokenizer = _tokenizer()
    small = _pictures(2, 32)
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert tokenizer.tokens(large, 2).shape == (2, 4)
    shown = F.interpolate(large.float(), size=(24, 24), mode="bilinear", antialias=True)
    assert torch.equal(tokenizer.tokens(large, 3), tokenizer.tokens(shown, 3))


def test_bf16_weights_name_most_patches_alike() -> None:
    tokenizer = _tokenizer()
    pixels = _pictures(8, 32)
    tokens = tokenizer.tokens(pixels, 4)
    assert (tokens == tokenizer.bfloat16().tokens(pixels, 4)).float().mean() > 0.8


def test_shapes_that_do_not_fit_are_refused() -> None:
    tokenizer = _tokenizer()
    with pytest.raises(ModelError, match="36 x 36 px cannot be cut into patches of 8 x 8; give sides"):
        tokenizer(_pictures(1, 36), 1.0)
    with pytest.raises(ModelError, match="grid of 0 x 0 has no patches"):
        tokenizer.tokens(_pictures(1, 32), 0)


@pytest.mark.parametrize("stride", [2, 4, 16])
def test_any_power_of_two_is_a_stride(stride: int) -> None:
    tokenizer = _tokenizer(stride=stride)
    tokens = tokenizer.tokens(_pictures(1, 32), 32 // stride)
    assert tokens.shape == (1, (32 // stride) ** 2)
    painted = tokenizer.reconstruct(tokens)
    assert painted.shape == (1, 3, 32, 32)
    assert 0 <= painted.min() <= painted.max() <= 1


def test_a_cold_mixture_is_the_code_drawn() -> None:
    torch.manual_seed(3)
    log_probabilities = F.log_softmax(3 * torch.randn(200, 30), dim=1)
    draws = []
    for temperature, straight_through in ((1e-4, False), (1.0, True)):
        torch.manual_seed(4)
        draws.append(gumbel_softmax(log_probabilities, temperature, straight_through=straight_through))
    soft, hard = draws
    assert torch.equal(hard.sort(dim=1).values[:, -2:], torch.tensor([0.0, 1.0]).expand(200, 2))
    torch.testing.assert_close(soft, hard, atol=1e-3, rtol=0)


def test_draws_follow_the_distribution() -> None:
    torch.manual_seed(5)
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = gumbel_softmax(probabilities.log().expand(40_000, 4), 0.1).argmax(dim=1)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 40_000, probabilities, atol=0.01, rtol=0)


def test_the_gradient_of_a_drawn_code_is_the_mixtures() -> None:
    logits = torch.randn(6, 5)
    gradients = []
    for straight_through in (False, True):
        torch.manual_seed(7)
        leaf = logits.clone().requires_grad_()
        weights = gumbel_softmax(F.log_softmax(leaf, dim=1), 0.7, straight_through=straight_through)
        (weights * torch.arange(5.0)).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_a_cold_forward_paints_what_the_tokens_paint() -> None:
    tokenizer = _tokenizer()
    tokenizer.log_sharpness.fill_(math.log(100.0))
    pixels = _pictures(2, 32)
    torch.manual_seed(0)
    picture = tokenizer(pixels, 1e-4)
    torch.manual_seed(0)
    drawn = gumbel_softmax(picture.log_probabilities, 1e-4).argmax(dim=1).view(2, 16)
    painted = tokenizer.reconstruct(drawn)
    torch.testing.assert_close(((picture.reconstruction + 1) / 2).clamp(0, 1), painted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("weights_dtype", ["float32", "float16"])
def test_a_saved_tokenizer_names_the_same(tmp_path: Path, weights_dtype: str) -> None:
    tokenizer = _tokenizer()
    pixels = _pictures(4, 32)
    save_visual_tokenizer(tmp_path / "run" / "best", tokenizer, weights_dtype=weights_dtype, card="# Card\n")
    for name in (tmp_path / "run" / "best", tmp_path / "run"):
        loaded = load_visual_tokenizer(str(name))
        assert (loaded.codebook_size, loaded.stride) == (50, 8)
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        agreement = (loaded.tokens(pixels, 4) == tokenizer.tokens(pixels, 4)).float().mean()
        assert agreement == 1 if weights_dtype == "float32" else agreement > 0.95
    assert (loaded.fingerprint() == tokenizer.fingerprint()) == (weights_dtype == "float32")
    assert loaded.fingerprint() == load_visual_tokenizer(str(tmp_path / "run")).fingerprint()
    assert _tokenizer(seed=1).fingerprint() != tokenizer.fingerprint()


def test_damaged_directories_are_named(tmp_path: Path) -> None:
    def fails(match: str) -> None:
        with pytest.raises(ModelError, match=match):
            load_visual_tokenizer(str(tmp_path / "t"))

    fails("There is no directory .*t; use `embedded`, or what `cots pretrain configs/visual_tokenizer.yaml` wrote")
    with pytest.raises(ModelError, match="There is no directory ~nonesuch/t"):
        load_visual_tokenizer("~nonesuch/t")
    (tmp_path / "t").mkdir()
    fails("holds no visual tokenizer")
    save_visual_tokenizer(tmp_path / "t", _tokenizer())
    config_file, weights_file = tmp_path / "t" / "config.json", tmp_path / "t" / "model.safetensors"
    config, weights = config_file.read_text(), weights_file.read_bytes()
    weights_file.write_bytes(weights[:-100])
    fails("model.safetensors is damaged")
    weights_file.unlink()
    fails("has no model.safetensors")
    weights_file.write_bytes(weights)
    config_file.write_text(config[:-20])
    fails("config.json is damaged")
    config_file.write_text(config.replace('"format": 1', '"format": 9'))
    fails("format 9, newer than this version reads")
    config_file.write_text(config.replace('"format": 1', '"format": "new"'))
    fails("config.json is damaged")
    config_file.write_text(config.replace('"codebook_size": 50', '"codebook_size": 51'))
    fails(r"codes is \(50, 8\), the model needs \(51, 8\): it is of another architecture")
    config_file.write_text(config.replace('"blocks"', '"block"'))
    fails("no setting 'block'; did you mean 'blocks'")
    config_file.write_text(json.dumps({"format": 1, "model": {}}))
    fails("is a model of two towers, not a visual tokenizer")


def test_tokens_compile_into_one_graph() -> None:
    tokenizer = _tokenizer()
    pixels = _pictures(2, 40)
    compiled = torch.compile(lambda shown: tokenizer.tokens(shown, 4), backend="eager", fullgraph=True)
    assert torch.equal(compiled(pixels), tokenizer.tokens(pixels, 4))
