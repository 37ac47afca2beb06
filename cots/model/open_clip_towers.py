"""The towers of an open_clip architecture, for training them with the objectives of COTS.

    model:
      embedding_dim: 512
      image_tower: {name: open_clip:ViT-B-16, mean: ..., std: ...}
      text_tower: {name: open_clip:ViT-B-16, max_length: 77}
    start: {model: open_clip:ViT-B-16/laion2b_s34b_b88k}

CLIP's own maps into the shared space become the dual encoder's projections.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cots.errors import ConfigError
from cots.model.open_clip_architecture import (
    OPEN_CLIP,
    architecture_of,
    create_open_clip,
    import_open_clip,
    needs_quick_gelu,
)
from cots.model.tower import GridTower, Tower, TowerOutput, WordTower
from cots.model_config import ImageTowerConfig, ModelConfig, TextTowerConfig


class OpenClipImageTower(GridTower):
    """Pixels (B, 3, S, S), normalised -> TowerOutput, by a vision transformer of open_clip.

    The pooled vector is what CLIP projects; tokens are the patches after the last norm.
    """

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        open_clip = import_open_clip()
        architecture = architecture_of(config.name)
        vision = {**architecture["vision_cfg"], "image_size": config.image_size, **config.architecture}
        if vision.get("timm_model_name") or isinstance(vision["layers"], list) or vision.get("attentional_pool"):
            raise ConfigError(
                f"The image tower of {config.name} is no plain vision transformer; take another, such as "
                "open_clip:ViT-B-16, or the timm network itself."
            )
        if config.transformer_depth:
            raise ConfigError(f"{config.name} is a transformer already; set model.image_tower.transformer_depth=0.")
        self.stride = vision["patch_size"]
        if config.image_size % self.stride:
            raise ConfigError(
                f"model.image_tower.image_size {config.image_size} is no multiple of the {self.stride} px patches of "
                f"{config.name}; {config.image_size - config.image_size % self.stride} would be."
            )
        # any: a private builder, but the only one of a single tower
        try:
            self.trunk: Any = open_clip.model._build_vision_tower(
                architecture["embed_dim"], vision, architecture.get("quick_gelu", False)
            )
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"open_clip cannot build {config.name} with {config.architecture}: {error}.") from error
        self.trunk.proj = None
        self.trunk.output_tokens = True
        self.width = self.trunk.ln_post.normalized_shape[0]
        self.grid = config.image_size // self.stride
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, pixels: Tensor) -> TowerOutput:
        pooled, tokens = self.trunk(pixels)
        return TowerOutput(self.dropout(pooled), tokens)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        self.trunk.set_grad_checkpointing(enabled)

    def layer_depths(self) -> dict[str, int]:
        return _depths(self, last=("trunk.ln_post",))


class OpenClipTextTower(WordTower):
    """Ids (B, L) int64 of a ClipTokenizer -> TowerOutput, by a causal text transformer of open_clip.

    The pooled vector is that of the end token, which is the highest id of its row.
    """

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        open_clip = import_open_clip()
        architecture = architecture_of(config.name)
        text = architecture["text_cfg"]
        foreign = {"hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "embed_cls", "no_causal_mask", "pool_type"}
        if foreign & text.keys():
            raise ConfigError(
                f"The text tower of {config.name} is not CLIP's own; take another architecture, such as "
                "open_clip:ViT-B-16, or model.text_tower.name=bert."
            )
        built: Any = open_clip.model._build_text_tower(
            architecture["embed_dim"], text, architecture.get("quick_gelu", False)
        )
        if config.max_length > built.context_length:
            raise ConfigError(
                f"model.text_tower.max_length {config.max_length} exceeds the {built.context_length} positions of "
                f"{config.name}."
            )
        if config.vocabulary != built.vocab_size:
            raise ConfigError(f"{config.name} has {built.vocab_size} word pieces; set model.text_tower.vocabulary so.")
        built.text_projection = None
        built.attn_mask = None
        self.trunk = built
        self.width = built.width

    def forward(self, token_ids: Tensor) -> TowerOutput:
        length, trunk = token_ids.shape[1], self.trunk
        states = trunk.token_embedding(token_ids) + trunk.positional_embedding[:length]
        mask = torch.full((length, length), float("-inf"), dtype=states.dtype, device=states.device).triu(1)
        tokens = trunk.ln_final(trunk.transformer(states, attn_mask=mask))
        ends = token_ids.argmax(dim=1)
        return TowerOutput(tokens[torch.arange(len(tokens), device=ends.device), ends], tokens)

    @property
    def word_embeddings(self) -> Tensor:
        return self.trunk.token_embedding.weight

    def set_activation_checkpointing(self, enabled: bool) -> None:
        self.trunk.set_grad_checkpointing(enabled)

    def layer_depths(self) -> dict[str, int]:
        return _depths(self, last=("trunk.ln_final",))


def open_clip_weights(name: str, config: ModelConfig) -> dict[str, Tensor]:
    """Weights for a dual encoder of open_clip's towers from a pretrained model, `open_clip:ARCH/TAG`.

    Raises:
        ConfigError: the configuration is not of this architecture, or gives the pictures another mean or deviation.
        ModelError: there is no such model.
    """
    model = create_open_clip(name, image_size=config.image_tower.image_size)
    architecture = OPEN_CLIP + name.removeprefix(OPEN_CLIP).partition("/")[0]
    if needs_quick_gelu(name) and not architecture_of(architecture).get("quick_gelu"):
        architecture += "-quickgelu"
    preprocess = import_open_clip().get_model_preprocess_cfg(model)
    wanted = {
        "model.image_tower.name": (config.image_tower.name, architecture),
        "model.text_tower.name": (config.text_tower.name, architecture),
        "model.image_tower.mean": (list(config.image_tower.mean), list(preprocess["mean"])),
        "model.image_tower.std": (list(config.image_tower.std), list(preprocess["std"])),
    }
    for setting, (given, needed) in wanted.items():
        if given != needed:
            raise ConfigError(f"Starting from {name} needs {setting}={needed}, not {given}.")
    weights = import_open_clip().model.convert_to_custom_text_state_dict(model.state_dict())
    found: dict[str, Tensor] = {}
    for ours, theirs, projection in (("image", "visual", "proj"), ("text", "text", "text_projection")):
        prefix, own = f"{theirs}.", f"{theirs}.{projection}"
        for key, value in weights.items():
            if key.startswith(prefix) and not key.startswith(own):
                found[f"{ours}_tower.trunk.{key.removeprefix(prefix)}"] = value.float()
        linear = f"{ours}_projection.linear"
        if own in weights:  # (width, D), without a shift
            found[f"{linear}.weight"] = weights[own].T.float().contiguous()
            found[f"{linear}.bias"] = torch.zeros(weights[own].shape[1])
        else:
            found[f"{linear}.weight"] = weights[f"{own}.weight"].float()
            found[f"{linear}.bias"] = weights[f"{own}.bias"].float()
    return found


def _depths(tower: Tower, last: tuple[str, ...]) -> dict[str, int]:
    """0 for what embeds, 1 and up for the blocks; `last` names what belongs to the last block."""
    depths = {}
    for name, _ in tower.named_parameters():
        _, found, rest = name.partition("transformer.resblocks.")
        depths[name] = 1 + int(rest.partition(".")[0]) if found else 0
    top = max(depths.values())
    return {name: top if name.startswith(last) else depth for name, depth in depths.items()}
