"""Clips: pooled by the mean, or by a transformer that starts as the mean."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cots.errors import ConfigError
from cots.model.caption_tokenizer import WordPieceTokenizer
from cots.model.dual_encoder import DualEncoder
from cots.model.model_directory import read_model, save_model
from cots.model.pretrained import load_model
from cots.model.temporal import TemporalTransformer, pool_clips
from cots.model_config import ModelConfig, TemporalConfig
from cots.moments import unit_mean
from cots.settings import validate_config

TRANSFORMER = TemporalConfig(kind="transformer", depth=1, heads=4, positions=5)


def _encoder(config: ModelConfig, *, trained: bool) -> DualEncoder:
    """With a temporal transformer, which has learnt something if `trained`."""
    encoder = DualEncoder(config.model_copy(update={"temporal": TRANSFORMER})).eval()
    assert encoder.image_temporal is not None
    if trained:
        torch.nn.init.normal_(encoder.image_temporal.residual.weight, std=0.1)
    return encoder


def _clips(items: int, frames: int) -> torch.Tensor:
    return torch.randint(0, 256, (items, frames, 3, 64, 64), dtype=torch.uint8)


def test_before_training_the_transformer_adds_nothing_to_the_mean(tiny_model_config: ModelConfig) -> None:
    encoder = _encoder(tiny_model_config, trained=False)
    clips = _clips(3, 4)
    frames = encoder.encode_image(clips.flatten(0, 1)).embedding.view(3, 4, -1)
    assert torch.allclose(encoder.encode_video(clips), F.normalize(frames.mean(dim=1), dim=1), atol=1e-6)


def test_a_trained_transformer_sees_the_order_of_frames_and_the_mean_does_not(tiny_model_config: ModelConfig) -> None:
    clips = _clips(2, 6)
    for encoder, differs in (
        (_encoder(tiny_model_config, trained=True), True),
        (DualEncoder(tiny_model_config), False),
    ):
        forwards, backwards = encoder.eval().encode_video(clips), encoder.encode_video(clips.flip(1))
        assert torch.allclose(forwards, backwards, atol=1e-5) is not differs


@pytest.mark.parametrize("temporal", [True, False])
def test_pictures_and_clips_of_any_length_are_encoded_together_as_alone(
    tiny_model_config: ModelConfig, temporal: bool
) -> None:
    encoder = _encoder(tiny_model_config, trained=True) if temporal else DualEncoder(tiny_model_config).eval()
    encoder.image_center.copy_(0.3 * F.normalize(torch.randn(32), dim=0))
    counts = (1, 4, 2, 1, 3, 1, 4)
    pixels = _clips(7, 4)
    together = encoder.encode_video(pixels, counts)
    for item, count in enumerate(counts):
        alone = encoder.encode_video(pixels[item : item + 1, :count])
        assert torch.allclose(together[item], alone[0], atol=1e-5)
        assert torch.allclose(encoder.encode_image(pixels[item : item + 1, :count]).embedding, alone, atol=1e-5)


def test_each_picture_passes_the_tower_once(tiny_model_config: ModelConfig) -> None:
    encoder = DualEncoder(tiny_model_config).eval()
    sizes: list[int] = []
    encoder.image_tower.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    encoder.encode_video(_clips(8, 4), (1, 1, 1, 4, 1, 1, 1, 1))
    encoder.encode_video(_clips(8, 4), (1, 1, 1, 4, 4, 1, 1, 3))
    assert sizes == [12, 16]  # of 11 and 16 frames; filled up to a multiple of 8 / 4


def test_the_embedding_of_a_picture_is_the_same_to_the_last_bit() -> None:
    frames = F.normalize(torch.randn(5, 1, 32), dim=-1)
    center = 0.3 * F.normalize(torch.randn(32), dim=0)
    counts = torch.ones(5, dtype=torch.int64)

    transformer = TemporalTransformer(32, TRANSFORMER)
    torch.nn.init.normal_(transformer.residual.weight)
    for pooling in (None, transformer):
        assert torch.equal(pool_clips(frames, counts, center, pooling), frames[:, 0])


def test_the_centre_is_subtracted_after_the_transformer() -> None:
    """A released model's clip is the clip of training, minus the centre."""

    transformer = TemporalTransformer(32, TRANSFORMER).eval()
    torch.nn.init.normal_(transformer.residual.weight, std=0.1)
    frames = F.normalize(torch.randn(4, 3, 32), dim=-1)
    center = 0.4 * F.normalize(torch.randn(32), dim=0)
    counts = torch.tensor([3, 2, 3, 2])
    in_training = pool_clips(frames, counts, torch.zeros(32), transformer)
    released = pool_clips(F.normalize(frames - center, dim=-1), counts, center, transformer)
    assert torch.allclose(released, F.normalize(in_training - center, dim=-1), atol=1e-5)


def test_all_of_it_learns_from_clips_and_pictures_give_it_no_gradient(tiny_model_config: ModelConfig) -> None:
    encoder = _encoder(tiny_model_config, trained=True).train()
    for counts, learns in (((1, 3), True), ((1, 1), False)):
        encoder.zero_grad()
        encoder.encode_video(_clips(2, 3), counts)[:, 0].sum().backward()
        gradients = [parameter.grad for parameter in encoder.image_temporal.parameters()]
        assert all(gradient is not None for gradient in gradients)  # or DDP would wait for it
        assert all(gradient.abs().sum() > 0 for gradient in gradients) is learns


def test_a_saved_temporal_model_embeds_videos_as_it_did_in_training(
    tiny_model_config: ModelConfig, vocabulary_file: Path, tmp_path: Path
) -> None:
    encoder = _encoder(tiny_model_config, trained=True)
    tokenizer = WordPieceTokenizer.from_file(vocabulary_file, 16)
    fingerprint = save_model(tmp_path / "model", encoder, tokenizer)
    read, _, found = read_model(tmp_path / "model")
    assert found == fingerprint
    clips = _clips(2, 4)
    model = load_model(str(tmp_path / "model"), device="cpu")
    assert model.handles_video
    assert torch.allclose(read.encode_video(clips), encoder.encode_video(clips))
    assert torch.allclose(model.encode_video(clips), encoder.encode_video(clips), atol=1e-4)
    frames = model.encode_images(clips[0]).numpy()
    assert not np.allclose(model.pool_frames(frames), unit_mean(frames), atol=1e-3)
    heads = TRANSFORMER.model_copy(update={"heads": 2})
    other = DualEncoder(tiny_model_config.model_copy(update={"temporal": heads}))
    other.load_state_dict(encoder.state_dict())
    assert save_model(tmp_path / "other", other, tokenizer) != fingerprint  # it would embed otherwise


def test_heads_must_divide_the_embedding() -> None:
    values = {"embedding_dim": 32, "temporal": {"kind": "transformer", "heads": 5}}
    with pytest.raises(ConfigError, match="embedding_dim 32 is no multiple of its 5 attention heads"):
        validate_config(ModelConfig, values, "a.yaml")


def test_it_learns_to_tell_a_clip_from_the_same_played_backwards() -> None:
    """Which the mean cannot, whatever it is taught."""
    generator = torch.Generator().manual_seed(0)
    frames = F.normalize(torch.randn(8, 4, 32, generator=generator), dim=-1)
    clips = torch.cat([frames, frames.flip(1)])
    targets = F.normalize(torch.randn(16, 32, generator=generator), dim=-1)
    torch.manual_seed(0)
    transformer = TemporalTransformer(32, TRANSFORMER.model_copy(update={"dropout": 0.0}))
    optimizer = torch.optim.AdamW(transformer.parameters(), 3e-3)
    counts, center = torch.full((16,), 4), torch.zeros(32)
    for _ in range(60):
        scores = pool_clips(clips, counts, center, transformer) @ targets.T
        F.cross_entropy(scores / 0.1, torch.arange(16)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = pool_clips(clips, counts, center, transformer) @ targets.T
    assert (found.argmax(dim=1) == torch.arange(16)).all()
    mean = pool_clips(clips, counts, center, None)
    assert torch.allclose(mean[:8], mean[8:], atol=1e-6)
