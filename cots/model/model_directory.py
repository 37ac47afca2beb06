"""A saved model: one directory with config.json, model.safetensors, tokenizer.json and MODEL_CARD.md.

Weights may be stored as float32, float16 or int8. In int8 every matrix of at least 4096 elements is rounded row by
row to 255 levels, with one float16 scale a row under the name `NAME.scale`; the rest is float16. They are float32
again once loaded.

The fingerprint is a hash of the weights as stored, of the transform and of the tokenizer: equal on every machine,
different for any model that would embed differently.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cots.errors import ConfigError, ModelError
from cots.model.caption_tokenizer import CaptionTokenizer, WordPieceTokenizer
from cots.model.dual_encoder import DualEncoder, ImageStream, Stream, TextStream
from cots.model.open_clip_architecture import OPEN_CLIP
from cots.model_config import ModelConfig, TextTowerConfig
from cots.settings import validate_config

AnyStream = TypeVar("AnyStream", bound=Stream)

FORMAT = 1
_SCALE = ".scale"


def save_model(
    directory: str | Path,
    model: DualEncoder,
    tokenizer: CaptionTokenizer,
    *,
    weights_dtype: str = "float32",
    card: str = "",
) -> str:
    """Write a model directory (each file whole or not at all) and return its fingerprint."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stored = _pack(model.state_dict(), weights_dtype)
    settings = model.config.model_dump(mode="json")
    settings["text_tower"]["tokenizer"] = ""
    config = {"format": FORMAT, "model": settings, "weights_dtype": weights_dtype}
    write_whole(directory / "tokenizer.json", tokenizer.to_json().encode())
    write_whole(directory / "MODEL_CARD.md", (card or "# A COTS model\n").encode())
    write_whole(directory / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    write_weights(directory / "model.safetensors", stored)
    return fingerprint_of(stored, _transform_of(model.config), (directory / "tokenizer.json").read_bytes())


def read_model(directory: str | Path) -> tuple[DualEncoder, CaptionTokenizer, str]:
    """Read a model directory: the encoder (float32, CPU, evaluation mode), its tokenizer and its fingerprint.

    Raises:
        ModelError: a file is missing or damaged, the format is newer, or the weights are of another architecture.
    """
    saved = open_saved_model(directory)
    return saved.encoder(), saved.tokenizer, saved.fingerprint


class SavedModel:
    """A model directory whose weights lie in memory as stored, to be built whole or one stream at a time.

    All that is built is float32, on the CPU, in evaluation mode; building raises ModelError if weights are missing or
    of another architecture.

    Attributes:
        config: the model's settings.
        tokenizer: of its text stream.
        fingerprint: see `fingerprint_of`.
    """

    def __init__(
        self, directory: Path, config: ModelConfig, tokenizer: CaptionTokenizer, stored: dict[str, Tensor]
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._stored = stored
        self._directory = directory
        self.fingerprint = fingerprint_of(stored, _transform_of(config), (directory / "tokenizer.json").read_bytes())

    def encoder(self) -> DualEncoder:
        return self._build(DualEncoder, "")

    def image_stream(self) -> ImageStream:
        return self._build(ImageStream, "image_")

    def text_stream(self) -> TextStream:
        return self._build(TextStream, "text_")

    def _build(self, kind: type[AnyStream], prefix: str) -> AnyStream:
        try:
            with _NoRandomNumbers():
                stream = kind(self.config)
        except ConfigError as error:
            raise ModelError(f"{self._directory / 'config.json'}: {error}") from error
        stored = {name: value for name, value in self._stored.items() if name.startswith(prefix)}
        load_weights(stream, _unpack(stored, f"{self._directory}"), f"{self._directory}")
        return stream.eval()


class _NoRandomNumbers(TorchFunctionMode):
    """Leaves parameters as allocated: for a network whose weights are about to be read, a second of work for BERT."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def open_saved_model(directory: str | Path) -> SavedModel:
    """Read a model directory.

    Raises:
        ModelError: a file is missing or damaged, the format is newer, or the tokenizer is another model's.
    """
    directory = Path(directory)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (directory / name).is_file():
            raise ModelError(
                f"The model directory {directory} has no {name}; it must be one that `cots pretrain` wrote."
            )
    try:
        saved = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        format_version, values = int(saved["format"]), saved["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{directory / 'config.json'} is damaged ({error}); copy or train the model again.") from error
    if format_version > FORMAT:
        raise ModelError(
            f"The model {directory} has format {format_version}, newer than this version reads ({FORMAT}); "
            "upgrade cots."
        )
    try:
        stored = load_file(directory / "model.safetensors")
        config = validate_config(ModelConfig, values, str(directory / "config.json"))
        tokenizer = saved_tokenizer(directory / "tokenizer.json", config.text_tower)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{directory / 'model.safetensors'} is damaged ({error}); copy or train the model again."
        ) from error
    except ConfigError as error:
        raise ModelError(str(error)) from error
    if tokenizer.vocabulary > config.text_tower.vocabulary:
        raise ModelError(
            f"{directory / 'tokenizer.json'} has {tokenizer.vocabulary} word pieces, the text tower "
            f"{config.text_tower.vocabulary}; copy or train the model again."
        )
    return SavedModel(directory, config, tokenizer, stored)


def saved_tokenizer(path: Path, config: TextTowerConfig) -> CaptionTokenizer:
    """The tokenizer in a model's `tokenizer.json`.

    Raises:
        ConfigError: the file is missing or no tokenizer.
    """
    if config.name.startswith(OPEN_CLIP):
        from cots.model.clip_tokenizer import ClipTokenizer

        return ClipTokenizer.from_file(path, config.max_length)
    return WordPieceTokenizer.from_file(path, config.max_length)


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Load weights whose names and shapes must be exactly the module's.

    Raises:
        ModelError: they are not; the first difference is named.
    """
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights:
            raise ModelError(f"{origin} has no weights for {name}: it is of another architecture.")
        if name not in wanted:
            raise ModelError(f"{origin} has weights for {name}, which the model lacks: it is of another architecture.")
        if weights[name].shape != wanted[name].shape:
            raise ModelError(
                f"{origin}: {name} is {tuple(weights[name].shape)}, the model needs {tuple(wanted[name].shape)}: "
                "it is of another architecture."
            )
    model.load_state_dict(weights)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file of a model's directory, or leave what is there."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_bytes(content)
    scratch.replace(path)


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write weights as they are, or leave what is there."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.touch()
    mode = scratch.stat().st_mode  # what a new file gets here; safetensors would keep its own from everybody else
    save_file(weights, scratch)
    scratch.chmod(mode)
    scratch.replace(path)


def fingerprint_of(stored: dict[str, Tensor], transform: dict[str, Any], tokenizer: bytes) -> str:
    """32 hexadecimal digits over the stored weights (names, types, shapes, bytes), the transform and the tokenizer."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(stored):
        tensor = stored[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    digest.update(json.dumps(transform, sort_keys=True).encode())
    digest.update(tokenizer)
    return digest.hexdigest()


def _transform_of(config: ModelConfig) -> dict[str, Any]:
    image, text = config.image_tower, config.text_tower
    # heads leave no trace in the weights' shapes
    temporal = {"temporal_heads": config.temporal.heads} if config.temporal.kind != "none" else {}
    return {
        **temporal,
        "image_size": image.image_size,
        "resize": image.resize,
        "mean": list(image.mean),
        "std": list(image.std),
        "image_pooling": image.pooling,
        "text_pooling": text.pooling,
        "max_length": text.max_length,
    }


def _pack(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for name, value in weights.items():
        value = value.detach().cpu().contiguous()
        if not value.is_floating_point() or dtype == "float32":
            stored[name] = value.clone()
        elif dtype == "int8" and value.ndim >= 2 and value.numel() >= 4096:
            rows = value.float().reshape(value.shape[0], -1)
            scale = (rows.abs().amax(dim=1).clamp_min(1e-6) / 127).half().float()
            stored[name] = (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8).reshape(value.shape)
            stored[name + _SCALE] = scale.half()
        else:
            stored[name] = value.half()
    return stored


def _unpack(stored: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, value in stored.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in stored:
            continue
        if value.dtype == torch.int8:
            if name + _SCALE not in stored:
                raise ModelError(f"{origin} has no weights for {name + _SCALE}; copy or train the model again.")
            scale = stored[name + _SCALE].float()
            weights[name] = value.float() * scale.view(-1, *[1] * (value.ndim - 1))
        else:
            weights[name] = value.float() if value.is_floating_point() else value
    return weights
