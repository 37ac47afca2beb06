from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from cots.errors import ConfigError
from cots.model.clip_tokenizer import ClipTokenizer
from cots.model.dual_encoder import DualEncoder
from cots.model.model_directory import save_model
from cots.model.open_clip_towers import OpenClipImageTower, OpenClipTextTower, open_clip_weights
from cots.model.pretrained import load_model
from cots.model.tower import lower_precision
from cots.model_config import ImageTowerConfig, ModelConfig, TextTowerConfig

CAPTIONS = [
    "a red car",
    "Two DOGS can't   run -- they've #2 &amp; 10 balls!!",
    "ein Mädchen, ﬁ, 日本語 and a 🙂!?",
    "",
    "!",
    "word " * 100,
]


@pytest.fixture
def encoder(open_clip_checkpoint: Path, open_clip_config: ModelConfig) -> DualEncoder:
    encoder = DualEncoder(open_clip_config)
    encoder.load_state_dict(
        open_clip_weights(f"open_clip:cots-test-tiny/{open_clip_checkpoint}", open_clip_config), strict=False
    )
    return encoder.eval()


@pytest.fixture
def reference(open_clip_checkpoint: Path) -> Any:
    return open_clip.create_model("cots-test-tiny", pretrained=str(open_clip_checkpoint)).eval()


@pytest.mark.parametrize("length", [8, 77])
def test_the_tokenizer_gives_open_clips_ids(length: int) -> None:
    expected = open_clip.get_tokenizer("ViT-B-16")(CAPTIONS, context_length=length)
    tokenizer = ClipTokenizer.create(length)
    assert torch.equal(tokenizer(CAPTIONS, pad_to_max=True), expected)
    assert tokenizer.vocabulary == 49408
    ids = tokenizer(["a red car"])[0].tolist()
    assert (ids[0], ids[-1]) == tokenizer.special_ids[1:]
    assert tokenizer.mask_id not in ids[1:]
    assert torch.equal(tokenizer(["a caf\udce9"]), tokenizer(["a caf?"]))  # no character


def test_embeddings_are_open_clips_own(encoder: DualEncoder, reference: Any, open_clip_config: ModelConfig) -> None:
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    image = open_clip_config.image_tower
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (image.mean, image.std))
    expected = reference.encode_image((pixels / 255 - mean) / std, normalize=True)
    assert torch.allclose(encoder.encode_image(pixels).embedding, expected, atol=1e-5)
    token_ids = open_clip.get_tokenizer("cots-test-tiny")(CAPTIONS)
    expected = reference.encode_text(token_ids, normalize=True)
    assert torch.allclose(encoder.encode_text(token_ids).embedding, expected, atol=1e-5)


def test_a_caption_need_not_be_padded_to_the_whole_context(encoder: DualEncoder) -> None:
    tokenizer = ClipTokenizer.create(77)
    short, full = tokenizer(CAPTIONS[:3]), tokenizer(CAPTIONS[:3], pad_to_max=True)
    assert short.shape[1] < full.shape[1]
    short, full = encoder.encode_text(short), encoder.encode_text(full)
    assert torch.allclose(short.embedding, full.embedding, atol=1e-5)


def test_tokens_and_hidden_patches_follow_the_grid(encoder: DualEncoder) -> None:
    assert (encoder.image_tower.grid, encoder.image_tower.stride, encoder.image_tower.width) == (4, 8, 32)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    hidden = torch.ones(2, 16, dtype=torch.bool)
    first, second = encoder.encode_image(pixels, hidden).embedding
    assert torch.allclose(first, second, atol=1e-6)  # nothing of the pictures is left
    assert encoder.encode_image(pixels).tokens.shape == (2, 16, 32)


def test_all_parameters_learn_in_low_precision_and_checkpointed(encoder: DualEncoder) -> None:
    encoder.train()
    encoder.set_activation_checkpointing(True)
    lower_precision(encoder, torch.bfloat16)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    image, text = encoder(pixels, ClipTokenizer.create(16)(CAPTIONS[:4], pad_to_max=True))
    (image.embedding * text.embedding).sum().backward()
    assert image.embedding.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_a_saved_model_embeds_as_before(encoder: DualEncoder, tmp_path: Path) -> None:
    tokenizer = ClipTokenizer.create(77)
    fingerprint = save_model(tmp_path, encoder, tokenizer)
    model = load_model(str(tmp_path), device="cpu")
    assert model.fingerprint == fingerprint
    expected = encoder.encode_text(tokenizer(CAPTIONS)).embedding
    assert torch.allclose(model.encode_texts(CAPTIONS), expected, atol=1e-5)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(model.encode_images(pixels), encoder.encode_image(pixels).embedding, atol=1e-5)


def test_the_text_tower_is_one_graph() -> None:
    tower = OpenClipTextTower(TextTowerConfig(name="open_clip:cots-test-tiny"))
    explanation = torch._dynamo.explain(tower.train())(torch.randint(1, 100, (2, 8)))
    assert explanation.graph_break_count == 0, explanation.break_reasons


def test_depths_count_blocks_from_the_input(encoder: DualEncoder) -> None:
    depths = encoder.image_tower.layer_depths()
    assert depths.keys() == dict(encoder.image_tower.named_parameters()).keys()
    assert depths["trunk.conv1.weight"] == depths["trunk.positional_embedding"] == depths["trunk.ln_pre.weight"] == 0
    assert depths["trunk.transformer.resblocks.0.ln_1.weight"] == 1
    assert depths["trunk.transformer.resblocks.1.ln_1.weight"] == depths["trunk.ln_post.weight"] == 2
    depths = encoder.text_tower.layer_depths()
    assert depths["trunk.token_embedding.weight"] == 0
    assert depths["trunk.ln_final.weight"] == 2


def test_a_text_tower_of_open_clip_needs_no_vocabulary(open_clip_checkpoint: Path) -> None:
    config = TextTowerConfig(name="open_clip:cots-test-tiny")
    assert config.vocabulary == ClipTokenizer.create(77).vocabulary == len(OpenClipTextTower(config).word_embeddings)
    assert TextTowerConfig().vocabulary == 30522


@pytest.mark.parametrize(
    ("tower", "settings", "message"),
    [
        (OpenClipImageTower, {"name": "open_clip:Nonesuch"}, "no architecture 'open_clip:Nonesuch'"),
        (OpenClipImageTower, {"name": "open_clip:RN50"}, "no plain vision transformer"),
        (
            OpenClipImageTower,
            {"name": "open_clip:cots-test-tiny", "image_size": 32, "architecture": {"depth": 3}},
            r"open_clip cannot build .*cots-test-tiny with \{'depth': 3\}: .*'depth'",
        ),
        (OpenClipImageTower, {"name": "open_clip:cots-test-tiny", "image_size": 36}, "32 would be"),
        (OpenClipTextTower, {"name": "open_clip:ViT-B-16-SigLIP"}, "not CLIP's own"),
        (OpenClipTextTower, {"name": "open_clip:cots-test-tiny", "max_length": 80}, "80 exceeds the 77 positions"),
        (
            OpenClipTextTower,
            {"name": "open_clip:cots-test-tiny", "vocabulary": 30522},
            "49408 word pieces; set model.text_tower.vocabulary",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(
    open_clip_checkpoint: Path, tower: type, settings: dict, message: str
) -> None:
    config = ImageTowerConfig if tower is OpenClipImageTower else TextTowerConfig
    with pytest.raises(ConfigError, match=message):
        tower(config.model_validate(settings))
