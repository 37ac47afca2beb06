from pathlib import Path

import pytest

from cots.errors import ConfigError
from cots.settings import read_values, validate_config
from cots.tokenizer_config import VisualTokenizerTrainingConfig

COMMITTED = Path(__file__).parents[1] / "configs" / "visual_tokenizer.yaml"


def _read(path: Path, *overrides: str) -> VisualTokenizerTrainingConfig:
    """As `cots pretrain` does."""
    return validate_config(VisualTokenizerTrainingConfig, read_values(path, overrides), str(path))


def test_the_committed_configuration_is_small_enough_to_ship() -> None:
    import torch

    from cots.model.visual_tokenizer import VisualTokenizer

    config = _read(COMMITTED)
    with torch.device("meta"):
        tokenizer = VisualTokenizer(config.visual_tokenizer)
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) * 2 < 4e6
    assert config.training.weights_dtype == "float16"
    base = _read(COMMITTED, "visual_tokenizer.codebook_size=8192")
    assert base.visual_tokenizer.codebook_size == 8192


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("visual_tokenizer.codebok_size=3", "no setting 'visual_tokenizer.codebok_size'; did you mean"),
        ("objective.kl_wieght=1", r"did you mean 'objective\.kl_weight'"),
        ("objective.temperature=1", r"did you mean 'objective\.temperature_"),
        ("visual_tokenizer.stride=6", "stride 6 is not a power of two"),
        ("visual_tokenizer.image_size=36", "image_size 36 is not a multiple of the stride 8"),
        ("training.accumulation=2", r"training\.accumulation has no effect on a visual tokenizer; leave it out"),
        ("data.augmentation.drop_words=0.1", r"data\.augmentation\.drop_words has no effect"),
        ("training.weights_dtype=int8", "int8"),
        ("objective.relaxation=hard", "'soft' or 'straight_through'"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "tokenizer.yaml"
    path.write_text("visual_tokenizer: {codebook_size: 64, image_size: 32}\n")
    with pytest.raises(ConfigError, match=message):
        _read(path, override)
