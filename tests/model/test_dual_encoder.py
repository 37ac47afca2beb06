import torch
from torch.nn import functional as F

from cots.config import ModelConfig
from cots.model.dual_encoder import DualEncoder


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
    tower = {"name": "tf_efficientnet_lite0", "image_size": 64, "pooling": "mean"}
    text = {
        "vocabulary": 64,
        "width": 32,
        "layers": 1,
        "heads": 2,
        "intermediate": 32,
        "positions": 16,
        "max_length": 8,
    }
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    plain = DualEncoder(ModelConfig.model_validate({"image_tower": tower, "text_tower": text})).eval()
    assert plain.encode_image(pixels).tokens.shape == (2, 4, 1280)
    hybrid = tower | {"pooling": "cls", "transformer_depth": 1, "transformer_width": 48, "transformer_heads": 2}
    encoder = DualEncoder(ModelConfig.model_validate({"image_tower": hybrid, "text_tower": text})).eval()
    assert encoder.encode_image(pixels).tokens.shape == (2, 4, 48)
