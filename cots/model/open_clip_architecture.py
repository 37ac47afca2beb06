"""The architectures that the open_clip package names, and their pretrained weights."""

from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from cots.errors import ConfigError, MissingDependency, ModelError

OPEN_CLIP = "open_clip:"


def import_open_clip() -> ModuleType:
    """The open_clip package.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise MissingDependency("open_clip_torch", "pip install 'cots[open-clip]'") from error
    return open_clip


def architecture_of(name: str) -> dict[str, Any]:
    """open_clip's settings of `open_clip:ARCH`.

    Raises:
        ConfigError: there is no such architecture.
        MissingDependency: open_clip is not installed.
    """
    found = import_open_clip().get_model_config(name.removeprefix(OPEN_CLIP))
    if found is None:
        raise ConfigError(f"open_clip has no architecture {name!r}; write open_clip:ARCH, such as open_clip:ViT-B-16.")
    return found


def create_open_clip(name: str, image_size: int | None = None) -> nn.Module:
    """open_clip's own model of `open_clip:ARCH/TAG` (TAG: pretrained weights by name, or a checkpoint file).

    Args:
        image_size: side in pixels for which its position embeddings are interpolated; by default the architecture's.

    Raises:
        ModelError: there is no such architecture or no such weights, or they cannot be loaded.
        MissingDependency: open_clip is not installed.
    """
    open_clip = import_open_clip()
    architecture, separator, tag = name.removeprefix(OPEN_CLIP).partition("/")
    if not separator or architecture not in open_clip.list_models():
        raise ModelError(
            f"{name!r} is no open_clip model; write open_clip:ARCH/TAG with an ARCH of open_clip.list_models()."
        )
    if not Path(tag).is_file() and tag not in open_clip.list_pretrained_tags_by_model(architecture):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise ModelError(
            f"open_clip has no weights {tag!r} for {architecture}; its tags: {tags}; a checkpoint file works too."
        )
    try:
        return open_clip.create_model(
            architecture,
            pretrained=tag,
            require_pretrained=True,
            force_quick_gelu=needs_quick_gelu(name),
            force_image_size=image_size,
        )
    except Exception as error:  # hub, network and pickle errors of many classes
        raise ModelError(f"The weights of {name} could not be loaded: {_first_line(error)}") from error


def open_clip_tokenizer(name: str) -> Any:
    """open_clip's own tokenizer of `open_clip:ARCH/TAG`: sentences -> (B, L) int64.

    Raises:
        ModelError: it cannot be loaded.
        MissingDependency: open_clip is not installed.
    """
    open_clip = import_open_clip()
    try:
        return open_clip.get_tokenizer(name.removeprefix(OPEN_CLIP).partition("/")[0])
    except Exception as error:  # those of other architectures are fetched, with errors of many classes
        raise ModelError(f"The tokenizer of {name} could not be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def needs_quick_gelu(name: str) -> bool:
    """Whether the weights of `open_clip:ARCH/TAG` were trained with OpenAI's approximation of GELU."""
    architecture, _, tag = name.removeprefix(OPEN_CLIP).partition("/")
    return bool((import_open_clip().get_pretrained_cfg(architecture, tag) or {}).get("quick_gelu"))
