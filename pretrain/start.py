"""The first weights of a training."""

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from cots.config import PretrainConfig
from cots.errors import ConfigError, ModelError
from cots.model.dual_encoder import DualEncoder
from cots.model.model_directory import load_weights, read_model
from cots.model.pretrained import model_directory
from cots.model.text_tower import WordPieceTokenizer


def starting_tokenizer(config: PretrainConfig) -> WordPieceTokenizer:
    """The configured tokenizer, or that of the model to start from."""
    text = config.model.text_tower
    if text.tokenizer:
        return WordPieceTokenizer.from_file(text.tokenizer, text.max_length)
    if config.start.model:
        return WordPieceTokenizer.from_file(model_directory(config.start.model) / "tokenizer.json", text.max_length)
    raise ConfigError("model.text_tower.tokenizer is not set; give a WordPiece tokenizer.json or vocab.txt.")


def starting_encoder(config: PretrainConfig, tokenizer: WordPieceTokenizer) -> DualEncoder:
    """A dual encoder with the weights that `start` names; what it does not name is random.

    Raises:
        ConfigError: the tokenizer has more word pieces than the text tower.
        ModelError: weights are missing or of another architecture.
    """
    if tokenizer.vocabulary > config.model.text_tower.vocabulary:
        raise ConfigError(
            f"The tokenizer has {tokenizer.vocabulary} word pieces, the text tower "
            f"{config.model.text_tower.vocabulary}; set model.text_tower.vocabulary."
        )
    encoder, start = DualEncoder(config.model), config.start
    if start.model:
        load_weights(encoder, read_model(model_directory(start.model))[0].state_dict(), start.model)
    if start.image_tower == "timm":
        tower = config.model.image_tower
        pretrained = timm.create_model(tower.name, pretrained=True, num_classes=0, **tower.architecture)
        load_weights(encoder.image_tower.trunk, pretrained.state_dict(), f"timm's {tower.name}")
    elif start.image_tower:
        load_weights(encoder.image_tower.trunk, _read(Path(start.image_tower)), start.image_tower)
    if start.text_tower:
        load_weights(encoder.text_tower.bert, _bert_weights(Path(start.text_tower)), start.text_tower)
    return encoder


def _bert_weights(directory: Path) -> dict[str, Tensor]:
    """Weights of a BERT directory, without prefix, pooler, heads and position ids."""
    weights = {name.removeprefix("bert."): value for name, value in _read(directory / "model.safetensors").items()}
    return {
        name: value.float()
        for name, value in weights.items()
        if name.startswith(("embeddings.", "encoder.")) and not name.endswith("position_ids")
    }


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return {name: torch.as_tensor(value) for name, value in load_file(path).items()}
    except Exception as error:  # OSError and safetensors' own
        raise ModelError(f"The weights {path} cannot be read: {error}.") from error
