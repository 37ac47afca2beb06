import copy

import pytest
import torch

from cots.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from cots.model.dual_encoder import DualEncoder
from cots.objectives.collaborative import CollaborativeObjective
from pretrain.optimizer import create_optimizer, rate_factor, set_rates


@pytest.fixture
def encoder(tiny_model_config: ModelConfig) -> DualEncoder:
    return DualEncoder(tiny_model_config)


def _settings_by_name(
    encoder: DualEncoder, objective: torch.nn.Module, config: OptimizerConfig
) -> dict[str, tuple[float, float]]:
    """(peak rate, weight decay) of each parameter that is trained."""
    optimizer = create_optimizer(encoder, objective, config)
    names = {id(value): name for name, value in [*encoder.named_parameters(), *objective.named_parameters()]}
    return {
        names[id(value)]: (group["peak"], group["weight_decay"])
        for group in optimizer.param_groups
        for value in group["params"]
    }


def test_every_parameter_is_in_one_group_with_its_rate_and_decay(encoder: DualEncoder) -> None:
    objective = CollaborativeObjective(ObjectiveConfig(learn_temperature=True), 32)
    config = OptimizerConfig(learning_rate=1e-3, image_tower_rate=1e-4, text_tower_rate=2e-4, weight_decay=0.05)
    settings = _settings_by_name(encoder, objective, config)
    assert settings.keys() == {*dict(encoder.named_parameters()), "log_temperature"}
    rates = {"image_tower": 1e-4, "text_tower": 2e-4}
    for name, (rate, decay) in settings.items():
        assert rate == rates.get(name.partition(".")[0], 1e-3)
        if name.endswith("bias") or "norm" in name.lower() or name == "log_temperature" or name.endswith("cls_token"):
            assert decay == 0, name
    for name in ("image_projection.linear.weight", "image_tower.trunk.blocks.0.attn.qkv.weight"):
        assert settings[name][1] == 0.05


def test_a_tower_of_rate_zero_is_frozen_and_a_fixed_temperature_left_out(encoder: DualEncoder) -> None:
    objective = CollaborativeObjective(ObjectiveConfig(), 32)
    settings = _settings_by_name(encoder, objective, OptimizerConfig(image_tower_rate=0.0))
    assert not any(name.startswith("image_tower") for name in settings)
    assert not any(parameter.requires_grad for parameter in encoder.image_tower.parameters())
    assert "log_temperature" not in settings
    assert {rate for rate, _ in settings.values()} == {1e-4}


def test_a_frozen_tower_changes_neither_weights_nor_statistics(tiny_model_config: ModelConfig) -> None:
    image = {"name": "tf_efficientnet_lite0", "image_size": 64, "pooling": "mean", "dropout": 0.5}
    text = tiny_model_config.text_tower.model_dump()
    encoder = DualEncoder(ModelConfig.model_validate({"embedding_dim": 32, "image_tower": image, "text_tower": text}))
    config = OptimizerConfig(image_tower_rate=0.0, learning_rate=1e-2)
    optimizer = create_optimizer(encoder, torch.nn.Module(), config)
    before = copy.deepcopy(encoder.state_dict())
    encoder.train()
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    image_batch, text_batch = encoder(pixels, torch.randint(5, 100, (4, 8)))
    (image_batch.embedding * text_batch.embedding).sum().backward()
    optimizer.step()
    for name, value in encoder.state_dict().items():
        if name.startswith("image_tower"):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(encoder.image_projection.linear.weight, before["image_projection.linear.weight"])
    weight = "text_tower.bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(encoder.state_dict()[weight], before[weight])


def test_rates_fall_layer_by_layer_towards_the_input(encoder: DualEncoder) -> None:
    config = OptimizerConfig(
        learning_rate=1e-3, image_tower_rate=1e-4, image_layer_decay=0.5, text_layer_decay=0.8, weight_decay=0.0
    )
    settings = _settings_by_name(encoder, torch.nn.Module(), config)
    # two blocks above the embeddings, in both towers
    expected = {
        "image_tower.trunk.norm.weight": 1e-4,
        "image_tower.trunk.blocks.1.attn.qkv.weight": 1e-4,
        "image_tower.trunk.blocks.0.mlp.fc1.bias": 0.5e-4,
        "image_tower.trunk.patch_embed.proj.weight": 0.25e-4,
        "image_tower.trunk.cls_token": 0.25e-4,
        "text_tower.bert.encoder.layer.1.attention.self.query.weight": 1e-3,
        "text_tower.bert.encoder.layer.0.output.LayerNorm.bias": 0.8e-3,
        "text_tower.bert.embeddings.word_embeddings.weight": 0.64e-3,
        "image_projection.linear.weight": 1e-3,
    }
    assert {name: settings[name][0] for name in expected} == pytest.approx(expected)


def test_a_convolutional_networks_layers_are_its_blocks_and_a_hybrids_go_on_above(
    tiny_model_config: ModelConfig,
) -> None:
    image = {
        "name": "tf_efficientnet_lite0", "image_size": 64, "transformer_depth": 2, "transformer_width": 48,
        "transformer_heads": 2,
    }  # fmt: skip
    text = tiny_model_config.text_tower.model_dump()
    encoder = DualEncoder(ModelConfig.model_validate({"embedding_dim": 32, "image_tower": image, "text_tower": text}))
    depths = encoder.image_tower.layer_depths()
    assert depths.keys() == dict(encoder.image_tower.named_parameters()).keys()
    top = depths["trunk.conv_head.weight"]
    assert top == 16  # lite0 has 1 + 2 + 2 + 3 + 3 + 4 + 1 blocks
    assert depths["trunk.conv_stem.weight"] == 0
    assert depths["trunk.blocks.1.0.conv_pw.weight"] == 2
    assert depths["blocks.cls_token"] == depths["blocks.project.weight"] == top + 1
    assert depths["blocks.blocks.0.attn.qkv.weight"] == top + 1
    assert depths["blocks.blocks.1.attn.qkv.weight"] == depths["blocks.norm.weight"] == top + 2


def test_cosine_rises_linearly_and_falls_to_the_final_rate() -> None:
    config = OptimizerConfig(warmup=0.1, final_rate=0.1)
    factors = [rate_factor(step, 100, config) for step in range(100)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.1 + 0.9 / 2)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)


def test_constant_cools_down_linearly_at_the_end() -> None:
    config = OptimizerConfig(schedule="constant", warmup=0.0, cooldown=0.2)
    factors = [rate_factor(step, 100, config) for step in range(100)]
    assert factors[:81] == [1.0] * 81
    assert factors[81:] == pytest.approx([share / 20 for share in range(19, 0, -1)])


@pytest.mark.parametrize(
    ("schedule", "warmup", "cooldown"),
    [("cosine", 1.0, 1.0), ("constant", 1.0, 0.0), ("constant", 0.5, 0.5), ("constant", 0.0, 1.0)],
)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedules_of_a_few_steps_are_sound(schedule: str, warmup: float, cooldown: float, steps: int) -> None:
    config = OptimizerConfig(schedule=schedule, warmup=warmup, cooldown=cooldown)
    assert all(0 < rate_factor(step, steps, config) <= 1 for step in range(steps))


def test_rates_are_shares_of_each_groups_peak(encoder: DualEncoder) -> None:
    config = OptimizerConfig(learning_rate=1e-3, text_tower_rate=1e-4)
    optimizer = create_optimizer(encoder, torch.nn.Module(), config)
    set_rates(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {2.5e-4, 2.5e-5}


def test_adamw_is_as_configured(encoder: DualEncoder) -> None:
    objective = CollaborativeObjective(ObjectiveConfig(), 32)
    optimizer = create_optimizer(encoder, objective, OptimizerConfig(betas=(0.8, 0.9), epsilon=1e-6))
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.9), 1e-6)}
