import pytest
import timm
import torch

from cots.errors import ConfigError
from cots.model.image_tower import ImageTower
from cots.model_config import ImageTowerConfig, ModelConfig
from cots.settings import validate_config

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "vit_tiny_patch16_224", "image_size": 100},
            r"image_size 100 is no multiple of the 16 px patches .* 96",
        ),
        ({"architecture": {**SMALL, "num_heads": 3}}, r"timm cannot build vit_base_patch16_224 with .*divisible"),
        ({"architecture": {"embed_dimm": 32}}, r"timm cannot build vit_base_patch16_224 with .*embed_dimm"),
        ({"name": "vit_base_patch16_244"}, r"no architecture .*_244.; similar names: .*vit_base_patch16_224"),
        ({"transformer_depth": 1, "architecture": SMALL}, r"is a transformer already; set .*transformer_depth=0"),
        ({"name": "tf_efficientnet_lite0", "image_size": 64}, r"has no \[CLS\] token; set .*pooling=mean"),
        (
            {"name": "swin_tiny_patch4_window7_224", "image_size": 256, "pooling": "mean"},
            r"does not take pictures of 256 px \(.*224.*\); set model\.image_tower\.image_size, or .*architecture",
        ),
        ({"name": "crossvit_9_240", "image_size": 240}, "gives neither a map nor tokens .*; take another"),
        ({"name": "volo_d1_224", "pooling": "mean"}, "gives 197 tokens .* 224 px, which form no square; take another"),
        ({"name": "vgg11", "drop_path": 0.1, "pooling": "mean"}, "vgg11 has no stochastic depth; set .*drop_path=0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_what_to_set(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        ImageTower(ImageTowerConfig.model_validate(settings))


@pytest.mark.parametrize(
    ("settings", "grid"),
    [
        ({"name": "densenet121", "image_size": 64}, 2),  # without stochastic depth
        ({"name": "repvit_m0_9", "image_size": 64}, 2),
        ({"name": "xcit_nano_12_p8_224", "image_size": 64}, 8),  # the side of its patches is one number
    ],
)
def test_networks_that_lack_what_others_have_are_built_too(settings: dict, grid: int) -> None:
    with torch.device("meta"):
        tower = ImageTower(ImageTowerConfig.model_validate({**settings, "pooling": "mean"}))
        assert tower.grid == grid
        assert tower(torch.zeros(2, 3, 64, 64)).tokens.shape == (2, grid * grid, tower.width)


def test_a_network_that_cannot_compute_twice_says_so() -> None:
    with torch.device("meta"):
        tower = ImageTower(ImageTowerConfig(name="vgg11", image_size=32, pooling="mean"))
    tower.set_activation_checkpointing(False)
    with pytest.raises(ConfigError, match=r"vgg11 .*; set training\.activation_checkpointing=false"):
        tower.set_activation_checkpointing(True)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"text_tower": {"heads": 7}}, "text_tower: .*width 768 is no multiple of its 7 attention heads"),
        ({"image_tower": {"transformer_heads": 5}}, "transformer_width 384 is no multiple of its 5 attention heads"),
        ({"text_tower": {"max_length": 40, "positions": 32}}, "max_length 40 exceeds the 32 positions"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(model: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_config(ModelConfig, model, "a.yaml")


def test_the_tokens_are_timms_features() -> None:
    config = ImageTowerConfig(image_size=32, architecture=SMALL)
    tower = ImageTower(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    features = tower.trunk.forward_features(pixels)
    output = tower(pixels)
    assert torch.equal(output.pooled, features[:, 0])
    assert torch.equal(output.tokens, features[:, 1:])


def test_a_network_that_timm_does_not_group_is_one_layer() -> None:
    trunk = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    trunk.group_matcher = None
    tower = ImageTower(ImageTowerConfig(name="tf_efficientnet_lite0", image_size=32, pooling="mean"), trunk=trunk)
    assert set(tower.layer_depths().values()) == {0}


def test_a_map_with_channels_last_gives_the_same_kind_of_tokens() -> None:
    shape = {"img_size": 32, "window_size": 2, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 1)}
    config = ImageTowerConfig(name="swin_tiny_patch4_window7_224", image_size=32, pooling="mean", architecture=shape)
    tower = ImageTower(config).eval()
    assert (tower.grid, tower.stride, tower.width) == (4, 8, 24)
    pixels = torch.randn(2, 3, 32, 32)
    features = tower.trunk.forward_features(pixels)
    assert torch.equal(tower(pixels).tokens, features.flatten(1, 2))
