"""The image tower: any timm network, its output kept as tokens.

A vision transformer gives its own tokens. A convolutional network's final map is flattened into tokens, optionally
followed by transformer blocks with a [CLS] token: the hybrid ViT of Dosovitskiy et al. 2021 (section 3.1).
"""

import difflib
import math
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import group_parameters
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cots.errors import ConfigError
from cots.model.tower import GridTower, TowerOutput
from cots.model_config import ImageTowerConfig


class ImageTower(GridTower):
    """Pixels (B, 3, S, S), normalised -> TowerOutput of width `width`.

    Raises:
        ConfigError: timm has no such network, it does not take pictures of this size, or it makes no square of tokens.
    """

    def __init__(self, config: ImageTowerConfig, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.name = config.name
        # any: timm networks share `forward_features`, but no class that says so
        self.trunk: Any = create_trunk(config) if trunk is None else trunk
        self.freeze_norms = config.freeze_norms
        self.pooling = config.pooling
        self.prefix = getattr(self.trunk, "num_prefix_tokens", 0)
        self.channels_last = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"  # Swin's maps
        sample = self._sample(config.image_size)
        self.convolutional = sample.ndim == 4
        if not self.convolutional and config.transformer_depth:
            raise ConfigError(f"{config.name} is a transformer already; set model.image_tower.transformer_depth=0.")
        if config.pooling == "cls" and not (self.prefix or config.transformer_depth):
            raise ConfigError(f"{config.name} has no [CLS] token; set model.image_tower.pooling=mean.")
        self.width = sample.shape[1] if self.convolutional else sample.shape[2]
        patches = sample[0, 0].numel() if self.convolutional else sample.shape[1] - self.prefix
        self.grid = math.isqrt(patches)
        if self.grid * self.grid != patches:
            raise ConfigError(
                f"{config.name} gives {patches} tokens of a picture of {config.image_size} px, which form no square; "
                "take another network for model.image_tower.name."
            )
        self.stride = round(config.image_size / self.grid)
        self.blocks: HybridBlocks | None = None
        if config.transformer_depth:
            self.blocks = HybridBlocks(self.width, self.grid * self.grid, config)
            self.width = config.transformer_width
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, pixels: Tensor) -> TowerOutput:
        features = self._features(pixels)
        prefix = self.prefix
        if self.convolutional:
            features = features.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
        if self.blocks is not None:
            features, prefix = self.blocks(features), 1
        tokens = features[:, prefix:]
        pooled = features[:, 0] if self.pooling == "cls" else tokens.mean(dim=1)
        return TowerOutput(self.dropout(pooled), tokens)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        try:
            self.trunk.set_grad_checkpointing(enabled)
        except AssertionError as error:
            raise ConfigError(
                f"timm's {self.name} cannot compute its layers again; set training.activation_checkpointing=false."
            ) from error
        if self.blocks is not None:
            self.blocks.activation_checkpointing = enabled

    def layer_depths(self) -> dict[str, int]:
        """As timm groups the trunk's parameters; a network that it does not group is one layer."""
        if getattr(self.trunk, "group_matcher", None):
            depths = group_parameters(self.trunk, self.trunk.group_matcher(coarse=False), reverse=True)
        else:
            depths = {name: 0 for name, _ in self.trunk.named_parameters()}
        top = max(depths.values())
        found = {f"trunk.{name}": depth for name, depth in depths.items()}
        if self.blocks is not None:
            last = len(self.blocks.blocks)
            for name, _ in self.blocks.named_parameters():
                part, _, rest = name.partition(".")
                own = {"blocks": 1 + int(rest.partition(".")[0])} if part == "blocks" else {"norm": last}
                found[f"blocks.{name}"] = top + own.get(part, 1)
        return found

    @torch.no_grad()
    def _sample(self, size: int) -> Tensor:
        """The features of one picture, to learn their shape from."""
        self.trunk.eval()
        pixels = torch.zeros(1, 3, size, size, device=next(self.trunk.parameters()).device)
        try:
            features = self.trunk.forward_features(pixels)
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            raise ConfigError(
                f"{self.name} does not take pictures of {size} px ({reason}); set model.image_tower.image_size, or "
                "what it needs in model.image_tower.architecture."
            ) from error
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise ConfigError(
                f"{self.name} gives neither a map nor tokens of a picture; take another network for "
                "model.image_tower.name."
            )
        self.trunk.train()
        return self._ordered(features)

    def _features(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N, C) of a transformer, (B, C, H, W) of one that gives a map."""
        return self._ordered(self.trunk.forward_features(pixels))

    def _ordered(self, features: Tensor) -> Tensor:
        return features.permute(0, 3, 1, 2) if self.channels_last else features


class HybridBlocks(nn.Module):
    """Transformer blocks over a convolutional map: (B, N, C) -> (B, 1 + N, W), the first token is [CLS].

    The [CLS] token starts as the mean of the patches plus a learned vector, so that at the first step it carries the
    global average that the network was pretrained with, and the blocks, whose LayerScale starts near zero, learn what
    to add to it.
    """

    def __init__(self, channels: int, patches: int, config: ImageTowerConfig) -> None:
        super().__init__()
        width = config.transformer_width
        self.project = nn.Linear(channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, patches, width) * 0.02)
        last = max(1, config.transformer_depth - 1)
        rates = [config.drop_path * layer / last for layer in range(config.transformer_depth)]
        self.blocks = nn.Sequential(
            *(Block(width, config.transformer_heads, qkv_bias=True, init_values=1e-2, drop_path=rate) for rate in rates)
        )
        self.norm = nn.LayerNorm(width)
        self.activation_checkpointing = False

    def forward(self, features: Tensor) -> Tensor:
        patches = self.project(features)
        cls_token = self.cls_token + patches.mean(dim=1, keepdim=True)
        states = torch.cat([cls_token, patches + self.position], dim=1)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                states = checkpoint(block, states, use_reentrant=False)
            else:
                states = block(states)
        return self.norm(states)


def create_trunk(config: ImageTowerConfig, pretrained: bool = False) -> nn.Module:
    """A timm network without its classifier, randomly initialised or with timm's weights.

    Raises:
        ConfigError: timm has no such network, or cannot build it so.
    """
    if not timm.is_model(config.name):
        nearest = ", ".join(difflib.get_close_matches(config.name, timm.list_models(), n=3, cutoff=0.0))
        raise ConfigError(f"timm has no architecture {config.name!r}; similar names: {nearest}.")
    extra = dict(config.architecture)
    if config.name.startswith(("vit", "deit", "eva", "beit")):
        extra.setdefault("img_size", config.image_size)
    try:
        trunk = _timm_network(config, pretrained, extra)
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"timm cannot build {config.name} with {extra}: {error}.") from error
    patch = to_2tuple(getattr(getattr(trunk, "patch_embed", None), "patch_size", 1))
    if config.image_size % patch[0] or config.image_size % patch[1]:
        raise ConfigError(
            f"model.image_tower.image_size {config.image_size} is no multiple of the {patch[0]} px patches of "
            f"{config.name}; {config.image_size - config.image_size % patch[0]} would be."
        )
    return trunk


def _timm_network(config: ImageTowerConfig, pretrained: bool, extra: dict[str, Any]) -> nn.Module:
    try:  # a rate of 0 too: some networks have another one by default
        return timm.create_model(
            config.name, pretrained=pretrained, num_classes=0, drop_path_rate=config.drop_path, **extra
        )
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        if config.drop_path:
            raise ConfigError(f"{config.name} has no stochastic depth; set model.image_tower.drop_path=0.") from error
    return timm.create_model(config.name, pretrained=pretrained, num_classes=0, **extra)
