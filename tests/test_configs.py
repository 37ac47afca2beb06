"""Every committed training configuration can be built, and says how it is run."""

from pathlib import Path

import pytest
import torch

from cots.config import PretrainConfig, read_config
from cots.model.dual_encoder import DualEncoder
from pretrain.start import starting_encoder, starting_tokenizer

ROOT = Path(__file__).parents[1]
# the others train a visual tokenizer
TRAININGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "\nmodel:" in path.read_text()]


def _encoder(config: PretrainConfig) -> DualEncoder:
    """Without memory or random numbers."""
    with torch.device("meta"):
        return DualEncoder(config.model)


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_its_towers_can_be_built(path: Path) -> None:
    config = read_config(path)
    assert config.data.train
    assert config.data.validation
    encoder = _encoder(config)
    assert encoder.image_tower.grid * encoder.image_tower.stride == config.model.image_tower.image_size
    assert encoder.image_tower.layer_depths().keys() == dict(encoder.image_tower.named_parameters()).keys()
    assert encoder.text_tower.layer_depths().keys() == dict(encoder.text_tower.named_parameters()).keys()


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_its_header_says_how_it_is_run(path: Path) -> None:
    header = path.read_text(encoding="utf-8").partition("\nmodel:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert any(command in header for command in (f"pretrain configs/{path.name}", "python benchmarks/"))


def test_the_base_model_is_the_papers() -> None:
    config = read_config(ROOT / "configs/cots_base.yaml")
    encoder = _encoder(config)
    assert encoder.image_tower.grid == 14
    assert sum(parameter.numel() for parameter in encoder.image_tower.parameters()) == 85_798_656
    # BERT-base without its pooler
    assert sum(parameter.numel() for parameter in encoder.text_tower.parameters()) == 109_482_240 - 768 * 769
    masked = config.objective.masked_modeling
    assert all((masked.image_weight, masked.text_weight, config.objective.task_alignment.weight))
    assert config.objective.noise_filter.queue_size
    assert config.objective.noise_filter.rule == "mixture"  # not the paper's, see benchmarks/results
    assert config.objective.contrastive.queue_size == 12_800


@pytest.mark.parametrize("name", ["finetune_image_text", "finetune_video_text"])
def test_fine_tuning_starts_from_the_embedded_model(name: str) -> None:
    config = read_config(ROOT / f"configs/{name}.yaml")
    encoder = starting_encoder(config, starting_tokenizer(config))
    assert encoder.encode_text(starting_tokenizer(config)(["a red truck"])).embedding.shape == (1, 256)
