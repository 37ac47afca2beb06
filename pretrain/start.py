"""The first weights of a training: of a whole model, of a tower, or random.

A picture tower that was trained at another size is taken over too: the embeddings of its positions are interpolated.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from cots.config import PretrainConfig
from cots.errors import ConfigError, ModelError
from cots.model.caption_tokenizer import CaptionTokenizer, WordPieceTokenizer
from cots.model.dual_encoder import DualEncoder
from cots.model.image_tower import ImageTower, create_trunk
from cots.model.model_directory import load_weights, read_model, saved_tokenizer
from cots.model.open_clip_architecture import OPEN_CLIP
from cots.model.pretrained import model_directory
from cots.model.text_tower import TextTower

_TEMPORAL = "image_temporal."
# the embeddings of positions in a timm network, in open_clip's and in the blocks of a hybrid
_POSITIONS = ("pos_embed", "positional_embedding", "position")

_FETCH = "`python -m pretrain.initial_weights` fetches it"


def starting_tokenizer(config: PretrainConfig) -> CaptionTokenizer:
    """The configured tokenizer, that of the text tower's architecture, or that of the model to start from."""
    text = config.model.text_tower
    if text.name.startswith(OPEN_CLIP):
        from cots.model.clip_tokenizer import ClipTokenizer

        return ClipTokenizer.create(text.max_length)
    if text.tokenizer:
        if not Path(text.tokenizer).exists() and _is_fetched(text.tokenizer):
            raise ConfigError(f"The tokenizer {text.tokenizer} does not exist; {_FETCH}.")
        tokenizer = WordPieceTokenizer.from_file(text.tokenizer, text.max_length)
        if config.start.model and not config.start.model.startswith(OPEN_CLIP):
            _refuse_other_words(tokenizer, config)
        return tokenizer
    if config.start.model and not config.start.model.startswith(OPEN_CLIP):
        return saved_tokenizer(model_directory(config.start.model) / "tokenizer.json", text)
    raise ConfigError("model.text_tower.tokenizer is not set; give a WordPiece tokenizer.json or vocab.txt.")


def _refuse_other_words(tokenizer: CaptionTokenizer, config: PretrainConfig) -> None:
    """Raises ConfigError if ids stand for other word pieces than those that the model to start from has learnt."""
    assert config.start.model is not None
    text = config.model.text_tower
    known = saved_tokenizer(model_directory(config.start.model) / "tokenizer.json", text)
    if _words(tokenizer) != _words(known):
        raise ConfigError(
            f"The tokenizer {text.tokenizer} has other word pieces than {config.start.model}, from which the text "
            "tower starts; leave model.text_tower.tokenizer out."
        )


def _words(tokenizer: CaptionTokenizer) -> dict[str, int]:
    return json.loads(tokenizer.to_json())["model"]["vocab"]


def starting_encoder(config: PretrainConfig, tokenizer: CaptionTokenizer) -> DualEncoder:
    """A dual encoder with the weights that `start` names; what it does not name is random.

    Raises:
        ConfigError: the tokenizer has more word pieces than the text tower, or a setting does not fit the start.
        ModelError: weights are missing or of another architecture.
    """
    if tokenizer.vocabulary > config.model.text_tower.vocabulary:
        raise ConfigError(
            f"The tokenizer has {tokenizer.vocabulary} word pieces, the text tower "
            f"{config.model.text_tower.vocabulary}; set model.text_tower.vocabulary."
        )
    encoder, start = DualEncoder(config.model), config.start
    if start.model:
        load_weights(encoder, _model_weights(config, encoder), start.model)
    if start.image_tower:
        if not isinstance(encoder.image_tower, ImageTower):
            raise ConfigError(f"start.image_tower is for timm networks, not {config.model.image_tower.name}.")
        trunk = encoder.image_tower.trunk
        load_weights(trunk, _trunk_weights(config, trunk), start.image_tower)
    if start.text_tower:
        if not isinstance(encoder.text_tower, TextTower):
            raise ConfigError(f"start.text_tower is for BERT, not {config.model.text_tower.name}.")
        load_weights(encoder.text_tower.bert, _bert_weights(config), start.text_tower)
    return encoder


def _model_weights(config: PretrainConfig, encoder: DualEncoder) -> dict[str, Tensor]:
    """Weights of the whole model that `start.model` names.

    The centres of a released model are left out: they belong to the weights it was released with. A temporal
    transformer that it lacks starts anew, as the mean of the frames.
    """
    name = config.start.model
    assert name is not None
    if name.startswith(OPEN_CLIP):
        from cots.model.open_clip_towers import open_clip_weights

        given = open_clip_weights(name, config.model)
    else:
        given = read_model(model_directory(name))[0].state_dict()
    own = encoder.state_dict()
    anew = ["image_center", "text_center"]
    if not any(key.startswith(_TEMPORAL) for key in given):
        anew += [key for key in own if key.startswith(_TEMPORAL)]
    return _fit_positions({**given, **{key: own[key] for key in anew}}, own)


def _trunk_weights(config: PretrainConfig, trunk: nn.Module) -> dict[str, Tensor]:
    """Weights of a timm network without its classifier: timm's own, or those of a .safetensors file."""
    name, tower = config.start.image_tower, config.model.image_tower
    assert name is not None
    if name == "timm":
        try:
            return create_trunk(tower, pretrained=True).state_dict()
        except (OSError, RuntimeError) as error:  # hub and network errors of many classes, missing weights
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"timm's weights of {tower.name} could not be loaded: {reason}") from error
    heads = getattr(trunk, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    weights = {key: value.float() for key, value in _read(Path(name)).items() if not key.startswith(prefixes)}
    return _fit_positions(weights, trunk.state_dict())


def _fit_positions(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the embeddings of picture positions interpolated to the grid that is wanted."""
    fitted = dict(weights)
    for name, goal in wanted.items():
        given = weights.get(name)
        if given is None or given.shape == goal.shape or name.rpartition(".")[2] not in _POSITIONS:
            continue
        grid = math.isqrt(goal.shape[-2])
        prefix = goal.shape[-2] - grid * grid  # [CLS] and registers
        side = math.isqrt(given.shape[-2] - prefix)
        if given.shape[-1] == goal.shape[-1] and side * side + prefix == given.shape[-2]:
            rows = given.reshape(1, -1, given.shape[-1])
            resampled = resample_abs_pos_embed(rows, [grid, grid], num_prefix_tokens=prefix)
            fitted[name] = resampled.reshape(goal.shape)
    return fitted


def _bert_weights(config: PretrainConfig) -> dict[str, Tensor]:
    """Weights of a BERT directory in Hugging Face's layout, without prefix, pooler, heads and position ids."""
    assert config.start.text_tower is not None
    directory = Path(config.start.text_tower)
    weights = {}
    for name, value in _read(directory / "model.safetensors").items():
        name = name.removeprefix("bert.")
        if name.startswith(("embeddings.", "encoder.")) and not name.endswith("position_ids"):
            # the oldest BERTs, converted from TensorFlow, still carry its names
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            weights[name] = value.float()
    table, positions = weights.get("embeddings.position_embeddings.weight"), config.model.text_tower.positions
    if table is not None and len(table) != positions:
        raise ModelError(
            f"{directory} has {len(table)} positions, the text tower {positions}; "
            f"set model.text_tower.positions={len(table)}."
        )
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return {name: torch.as_tensor(value) for name, value in load_file(path).items()}
    except Exception as error:  # OSError and safetensors' own
        hint = f"; {_FETCH}" if not path.exists() and _is_fetched(path) else ""
        raise ModelError(f"The weights {path} cannot be read: {error}{hint}.") from error


def _is_fetched(path: str | Path) -> bool:
    """Whether a file lies where `pretrain.initial_weights` puts what the configurations begin with."""
    return Path(path).parts[:2] == ("runs", "initial")
