"""From a configuration file to the training that it asks for: the entry point of `cots pretrain` and `-m pretrain`."""

from collections.abc import Sequence
from pathlib import Path

from cots.config import PretrainConfig
from cots.settings import read_values, validate_config
from cots.tokenizer_config import SECTION, VisualTokenizerTrainingConfig


def launch(path: str | Path, overrides: Sequence[str] = (), check: bool = False) -> None:
    """Run the training of a YAML file, or only check what it would read and need.

    A file with a section `visual_tokenizer` trains a visual tokenizer, any other one the two towers.

    Raises:
        CotsError: whatever is wrong with the configuration, the sources or the run.
    """
    values = read_values(path, overrides)
    if SECTION in values:
        tokenizer_config = validate_config(VisualTokenizerTrainingConfig, values, str(path))
        if check:
            from pretrain.tokenizer_check import check_tokenizer_training

            check_tokenizer_training(tokenizer_config)
            return
        from pretrain.tokenizer_training import train_visual_tokenizer

        train_visual_tokenizer(tokenizer_config)
        return
    config = validate_config(PretrainConfig, values, str(path))
    if check:
        from pretrain.check import check as check_training

        check_training(config)
        return
    from pretrain.trainer import pretrain

    pretrain(config)
