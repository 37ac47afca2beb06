"""Settings of the dual encoder: its two towers, how the frames of a clip become one, and the sphere that they share.

They are the section `model` of a training (see config.py), and what a saved model keeps of it.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cots.settings import Settings

Positive = Annotated[float, Field(gt=0)]
_CLIP_VOCABULARY = 49408
_UNEVEN = "{} {} is no multiple of its {} attention heads"


class ImageTowerConfig(Settings):
    name: str = "vit_base_patch16_224"
    """A timm architecture, or `open_clip:ARCH`. A convolutional network's final map is flattened into tokens; a tower
    of open_clip pools as its own architecture says, and knows no drop_path."""
    image_size: int = Field(224, ge=16)
    """Side in pixels of the square that the tower sees."""
    resize: Literal["squash", "crop"] = "squash"
    """How a picture becomes a square: `squash` ignores its aspect and loses nothing, `crop` cuts the centre out."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel mean of the pixel values in [0, 1], subtracted from them."""
    std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)
    """Per-channel deviation that they are then divided by."""
    pooling: Literal["cls", "mean"] = "cls"
    """The token that the global embedding is projected from: [CLS], or the mean over the patches."""
    transformer_depth: int = Field(0, ge=0)
    """Transformer blocks, with a [CLS] token, on top of a convolutional network's final map (a hybrid ViT)."""
    transformer_width: int = Field(384, ge=8)
    """Width of those blocks."""
    transformer_heads: int = Field(6, ge=1)
    """Attention heads of those blocks."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth rate."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the projection."""
    freeze_norms: bool = False
    """Batch norms keep the statistics they start with, in training too: a batch then no longer couples its pictures,
    and a network trained on few keeps what it learnt from many."""
    architecture: dict[str, Any] = {}
    """Further arguments of `timm.create_model`, such as `embed_dim` and `depth` of a small ViT, or of open_clip's
    `vision_cfg`."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ImageTowerConfig":
        if self.transformer_width % self.transformer_heads:
            raise ValueError(_UNEVEN.format("transformer_width", self.transformer_width, self.transformer_heads))
        return self


class TextTowerConfig(Settings):
    name: str = "bert"
    """`bert`, shaped by the settings below; or `open_clip:ARCH`, which has a shape and a tokenizer of its own and takes
    only max_length from here; a vocabulary that is given must be its own."""
    tokenizer: str = ""
    """A WordPiece `tokenizer.json` or `vocab.txt`; needed to start a training, afterwards kept in the model
    directory."""
    vocabulary: int = Field(30522, ge=8)
    """Word pieces that the tower has an embedding of: those of the tokenizer, or more."""
    width: int = Field(768, ge=8)
    """Dimension of the token embeddings and of the layers, a multiple of `heads`."""
    layers: int = Field(12, ge=1)
    """Transformer layers."""
    heads: int = Field(12, ge=1)
    """Attention heads of each layer."""
    intermediate: int = Field(3072, ge=8)
    """Width of the feed-forward layers."""
    positions: int = Field(512, ge=8)
    """Rows of the position embedding."""
    max_length: int = Field(32, ge=4)
    """Word pieces kept of a caption, [CLS] and [SEP] included."""
    pooling: Literal["cls", "mean"] = "cls"
    """The token that the global embedding is projected from: [CLS], or the mean over the word pieces."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the activations that training zeroes at random, in the embeddings, the attention and the layers."""

    @model_validator(mode="before")
    @classmethod
    def _clip_brings_its_vocabulary(cls, values: Any) -> Any:
        clip = isinstance(values, dict) and str(values.get("name")).startswith("open_clip:")
        return {"vocabulary": _CLIP_VOCABULARY, **values} if clip else values

    @model_validator(mode="after")
    def _shape_fits(self) -> "TextTowerConfig":
        if self.max_length > self.positions:
            raise ValueError(f"max_length {self.max_length} exceeds the {self.positions} positions of the text tower")
        if self.width % self.heads:
            raise ValueError(_UNEVEN.format("width", self.width, self.heads))
        return self


class TemporalConfig(Settings):
    """How the embeddings of a clip's frames become one."""

    kind: Literal["none", "transformer"] = "none"
    """`none`: their mean, as in the paper. `transformer`: the mean plus what a transformer over the frames adds, which
    is nothing before training; a picture, a clip of one frame, keeps its own embedding."""
    depth: int = Field(2, ge=1)
    """Layers of that transformer."""
    heads: int = Field(4, ge=1)
    """Attention heads of each; `embedding_dim` is a multiple of them."""
    positions: int = Field(16, ge=2)
    """Embeddings of the place within a clip, between which those of any number of frames are interpolated."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of its activations that training zeroes at random."""


class ModelConfig(Settings):
    image_tower: ImageTowerConfig = ImageTowerConfig()
    text_tower: TextTowerConfig = TextTowerConfig()
    temporal: TemporalConfig = TemporalConfig()
    embedding_dim: int = Field(256, ge=8)
    """Dimension of the shared unit sphere."""
    projection: Literal["linear", "mlp"] = "linear"
    """The map from a tower's pooled token to the sphere; `mlp` has one hidden layer and a residual linear path."""

    @model_validator(mode="after")
    def _temporal_heads_divide_width(self) -> "ModelConfig":
        if self.temporal.kind == "transformer" and self.embedding_dim % self.temporal.heads:
            raise ValueError(_UNEVEN.format("embedding_dim", self.embedding_dim, self.temporal.heads))
        return self
