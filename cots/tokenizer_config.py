"""Settings of the visual tokenizer and of its training.

A YAML file with a section `visual_tokenizer` is a tokenizer training; it takes the sections `data`, `optimizer` and
`training` of every training (see config.py), and dotted overrides like any other:

    cots pretrain configs/visual_tokenizer.yaml visual_tokenizer.codebook_size=8192
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from cots.config import DataConfig, OptimizerConfig, TrainingConfig
from cots.settings import Settings

SECTION = "visual_tokenizer"

_WITHOUT_EFFECT = {  # other settings of the shared sections
    "data": ("captions_per_item", "frames_per_item"),
    "data.augmentation": ("drop_words",),
    "optimizer": ("image_tower_rate", "text_tower_rate", "image_layer_decay", "text_layer_decay"),
    "training": ("accumulation", "activation_checkpointing", "sharding"),
}


class VisualTokenizerConfig(Settings):
    """The shape of a discrete VAE. It is convolutional: any picture whose sides are multiples of `stride` will do."""

    codebook_size: int = Field(8192, ge=2)
    """Visual tokens that there are."""
    code_dim: int = Field(32, ge=2)
    """Dimension of the sphere on which the code vectors lie. A low one keeps all of them in use (Yu et al. 2022)."""
    stride: int = Field(8, ge=2)
    """Side in pixels of the patch that one token names; a power of two."""
    width: int = Field(256, ge=8)
    """Channels at the token grid; half as many at each finer level, and no fewer than `min_width`."""
    min_width: int = Field(32, ge=8)
    """Channels that each level has at least."""
    blocks: int = Field(2, ge=1)
    """Residual blocks at each level of the encoder, and of the decoder."""
    image_size: int = Field(224, ge=16)
    """Side in pixels of the square pictures that it is trained and validated on, a multiple of `stride`."""

    @model_validator(mode="after")
    def _grid_is_whole(self) -> "VisualTokenizerConfig":
        if self.stride & (self.stride - 1):
            raise ValueError(f"stride {self.stride} is not a power of two; set 4, 8 or 16")
        if self.image_size % self.stride:
            raise ValueError(f"image_size {self.image_size} is not a multiple of the stride {self.stride}")
        return self


class VisualTokenizerObjectiveConfig(Settings):
    """The terms of the discrete VAE's loss; the equation stands in pretrain/tokenizer_objective.py."""

    reconstruction: Literal["l2", "l1"] = "l2"
    """Mean squared or mean absolute error of pixel values in [-1, 1]."""
    relaxation: Literal["soft", "straight_through"] = "soft"
    """What the decoder sees in training: a mixture of code vectors (Gumbel-softmax, Jang et al. 2017), or the code
    drawn, with the gradient of the mixture."""
    temperature_start: float = Field(1.0, gt=0)
    """Temperature of the Gumbel-softmax in the first step: the higher, the more codes are in a mixture."""
    temperature_end: float = Field(0.0625, gt=0)
    """In the last ones. At 1/16 a mixture is close to a single code (Ramesh et al. 2021, appendix A.2)."""
    temperature_schedule: Literal["cosine", "exponential", "linear"] = "cosine"
    """The way from start to end."""
    temperature_steps: float = Field(0.75, ge=0, le=1)
    """Share of the steps after which the end is reached."""
    kl_weight: float = Field(0.01, ge=0)
    """Weight of the divergence of a patch's distribution from the uniform one, in units of log(codebook_size)."""
    kl_warmup: float = Field(0.25, ge=0, le=1)
    """Share of the steps over which that weight rises from 0: an early prior makes every patch say the same."""
    usage_weight: float = Field(0.01, ge=0)
    """Weight of the divergence of the batch's mean distribution from the uniform one, in units of
    log(codebook_size): it asks for all codes to be used, without asking a single patch to be undecided."""
    revival: float = Field(0.02, ge=0, lt=1)
    """A code chosen less often than this share of its fair one is placed anew on a patch of the batch; 0: none is."""
    revival_every: int = Field(50, ge=1)
    """Steps between two such looks."""
    revival_end: float = Field(0.7, ge=0, le=1)
    """Share of the steps after which codes are left where they are."""


class VisualTokenizerTrainingConfig(Settings):
    visual_tokenizer: VisualTokenizerConfig = VisualTokenizerConfig()
    objective: VisualTokenizerObjectiveConfig = VisualTokenizerObjectiveConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig(output="runs/visual_tokenizer")

    @model_validator(mode="after")
    def _applies(self) -> "VisualTokenizerTrainingConfig":
        """A setting that would silently do nothing is refused."""
        for section, names in _WITHOUT_EFFECT.items():
            given: Any = self
            for part in section.split("."):
                given = getattr(given, part)
            for name in names:
                if getattr(given, name) != type(given).model_fields[name].default:
                    raise ValueError(f"{section}.{name} has no effect on a visual tokenizer; leave it out")
        if self.training.weights_dtype == "int8":
            raise ValueError("a visual tokenizer is stored in float32 or float16, not int8")
        return self
