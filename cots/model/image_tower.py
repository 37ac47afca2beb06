"""The image tower: any timm network, its output kept as tokens.

A vision transformer gives its own tokens. A convolutional network's final map is flattened into tokens, optionally
followed by transformer blocks with a [CLS] token: the hybrid ViT of Dosovitskiy et al. 2021 (section 3.1).
"""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cots.config import ImageTowerConfig
from cots.errors import ConfigError


@dataclass
class TowerOutput:
    """What a tower makes of a batch.

    Attributes:
        pooled: (B, C) the token that the global embedding is projected from.
        tokens: (B, N, C) one vector a patch or word piece, without [CLS] for images, with it for text.
    """

    pooled: Tensor
    tokens: Tensor


class ImageTower(nn.Module):
    """Pixels (B, 3, S, S), normalised -> TowerOutput of width `width`."""

    def __init__(self, config: ImageTowerConfig, trunk: nn.Module | None = None) -> None:
        super().__init__()
        # any: timm networks share `forward_features`, but no class that says so
        self.trunk: Any = _create_trunk(config) if trunk is None else trunk
        self.pooling = config.pooling
        self.prefix = getattr(self.trunk, "num_prefix_tokens", 0)
        self.trunk.eval()
        with torch.no_grad():
            sample = self._features(torch.zeros(1, 3, config.image_size, config.image_size))
        self.trunk.train()
        self.convolutional = sample.ndim == 4
        if not self.convolutional and config.transformer_depth:
            raise ConfigError(f"{config.name} is a transformer already; set model.image_tower.transformer_depth=0.")
        if config.pooling == "cls" and not (self.prefix or config.transformer_depth):
            raise ConfigError(f"{config.name} has no [CLS] token; set model.image_tower.pooling=mean.")
        self.width = sample.shape[1] if self.convolutional else sample.shape[2]
        self.blocks: nn.Module | None = None
        if config.transformer_depth:
            self.blocks = HybridBlocks(self.width, sample.shape[2] * sample.shape[3], config)
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

    def _features(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N, C) of a transformer, (B, C, H, W) of a convolutional network."""
        return self.trunk.forward_features(pixels)


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
        rates = torch.linspace(0, config.drop_path, config.transformer_depth).tolist()
        self.blocks = nn.Sequential(
            *(Block(width, config.transformer_heads, qkv_bias=True, init_values=1e-2, drop_path=rate) for rate in rates)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        patches = self.project(features)
        cls_token = self.cls_token + patches.mean(dim=1, keepdim=True)
        return self.norm(self.blocks(torch.cat([cls_token, patches + self.position], dim=1)))


def _create_trunk(config: ImageTowerConfig) -> nn.Module:
    """A timm network without its classifier, randomly initialised."""
    if not timm.is_model(config.name):
        nearest = ", ".join(timm.list_models(f"*{config.name[:6]}*")[:3]) or "see timm.list_models()"
        raise ConfigError(f"timm has no architecture {config.name!r}; similar names: {nearest}.")
    extra = dict(config.architecture)
    if config.name.startswith(("vit", "deit", "eva", "beit")):
        extra.setdefault("img_size", config.image_size)
    try:
        return timm.create_model(config.name, num_classes=0, drop_path_rate=config.drop_path, **extra)
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"timm cannot build {config.name} with {extra}: {error}.") from error
