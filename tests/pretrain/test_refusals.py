from collections.abc import Callable

import pytest

from cots.config import PretrainConfig
from cots.errors import ConfigError
from cots.tokenizer_config import VisualTokenizerTrainingConfig
from pretrain.check import check
from pretrain.tokenizer_check import check_tokenizer_training
from pretrain.tokenizer_training import train_visual_tokenizer
from pretrain.trainer import pretrain

MakeConfig = Callable[..., PretrainConfig]

SHARED = [
    ({"optimizer": {"betas": [0.9, 1.0]}}, r"optimizer\.betas \[0\.9, 1\.0\] are decays"),
    ({"training": {"seed": -1}}, r"training\.seed -1 is no seed"),
    ({"training": {"seed": 2**64}}, r"training\.seed \d+ is no seed"),
    ({"training": {"epochs": float("inf")}}, r"training\.epochs is inf; give a finite number"),
    ({"data": {"augmentation": {"crop_scale": [1.0, 0.5]}}}, r"crop_scale \[1\.0, 0\.5\] is no range of shares"),
    ({"data": {"augmentation": {"crop_scale": [0.0, 1.0]}}}, r"crop_scale \[0\.0, 1\.0\] is no range of shares"),
    ({"data": {"augmentation": {"crop_ratio": [-1.0, 1.0]}}}, r"crop_ratio \[-1\.0, 1\.0\] is no range of aspects"),
    ({"training": {"device": "gpu"}}, r"training\.device 'gpu' is no device that torch knows"),
]
OF_TOWERS = [
    ({"objective": {"noise_filter": {"queue_size": 8, "deviations": float("nan")}}}, r"deviations is nan"),
    (
        {"objective": {"contrastive": {"weight": 0, "queue_size": 0}, "task_alignment": {"weight": 1}}},
        r"but one candidate for each pair and nothing to align; set objective\.contrastive\.in_batch=online",
    ),
    ({"objective": {"learn_temperature": True, "temperature": 1.0}}, r"temperature 1 lies outside of \[0\.01, 0\.5\]"),
]


@pytest.mark.parametrize(("sections", "words"), [*SHARED, *OF_TOWERS])
def test_settings_that_cannot_be_trained_with_are_one_sentence(
    make_config: MakeConfig, sections: dict, words: str
) -> None:
    config = make_config(**sections)
    with pytest.raises(ConfigError, match=words):
        pretrain(config)
    if "device" not in sections.get("training", {}):  # found in the step that the check takes
        with pytest.raises(ConfigError, match=words):
            check(config)


@pytest.mark.parametrize(("sections", "words"), SHARED)
def test_those_of_a_visual_tokenizer_too(make_config: MakeConfig, sections: dict, words: str) -> None:
    common = make_config(**sections).model_dump(include={"data", "optimizer", "training"})
    config = VisualTokenizerTrainingConfig.model_validate(common)
    with pytest.raises(ConfigError, match=words):
        train_visual_tokenizer(config)
    if "device" not in sections.get("training", {}):
        with pytest.raises(ConfigError, match=words):
            check_tokenizer_training(config)


def test_pixel_values_are_not_divided_by_zero(make_config: MakeConfig) -> None:
    model = make_config().model.model_dump()
    model["image_tower"]["std"] = [0.5, 0.0, 0.5]
    with pytest.raises(ConfigError, match=r"std \[0\.5, 0\.0, 0\.5\] is divided by; give numbers above 0"):
        pretrain(make_config(model=model))


def test_a_tower_that_cannot_be_built_at_a_size_says_so(make_config: MakeConfig) -> None:
    model = make_config().model.model_dump()
    model["image_tower"] = {"name": "swin_tiny_patch4_window7_224", "image_size": 64, "pooling": "mean"}
    with pytest.raises(
        ConfigError, match=r"swin_tiny_patch4_window7_224 does not take pictures of 64 px \(Input height"
    ):
        pretrain(make_config(model=model))
