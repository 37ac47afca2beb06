"""Where models come from: the embedded one, a training output, or open_clip."""

import json
import os
from pathlib import Path

import torch

from cots.embedded import EMBEDDED_MODEL
from cots.errors import ModelError
from cots.model.model_directory import open_saved_model
from cots.model.open_clip_architecture import OPEN_CLIP
from cots.model.retrieval_model import CotsModel, RetrievalModel


def load_model(name: str = "embedded", device: str | None = None, *, bulk: bool = False) -> RetrievalModel:
    """Load a model for embedding and search.

    Args:
        name: `embedded`; a directory that `cots pretrain` wrote (a run, or a model inside it); or `open_clip:ARCH/TAG`.
        device: a torch device; by default cuda if there is one, else cpu.
        bulk: many pictures will be encoded: in bfloat16, on a CPU that multiplies it faster than float32.

    Raises:
        ModelError: there is no such model, or it is damaged.
        MissingDependency: it needs open_clip, which is not installed.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name.startswith(OPEN_CLIP):
        from cots.model.open_clip_model import OpenClipModel

        return OpenClipModel(name, target, bulk)
    return CotsModel(name, open_saved_model(model_directory(name)), target, bulk)


def model_directory(name: str) -> Path:
    """The directory that a model's name stands for.

    Raises:
        ModelError: there is none.
    """
    if name == "embedded":
        return EMBEDDED_MODEL
    path = Path(os.path.expanduser(name))  # that of Path raises for a user who does not exist
    for candidate in (path, path / "best"):
        if (candidate / "config.json").is_file():
            _refuse_visual_tokenizer(candidate)
            return candidate
    if path.is_dir():
        raise ModelError(
            f"The directory {name} holds no model (no config.json, no best/); give one that `cots pretrain` wrote."
        )
    raise ModelError(f"There is no model {name!r}; use `embedded`, a model directory, or open_clip:ARCH/TAG.")


def _refuse_visual_tokenizer(directory: Path) -> None:
    try:
        saved = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # damaged, which what reads it says
    if isinstance(saved, dict) and "visual_tokenizer" in saved:
        raise ModelError(f"{directory} is a visual tokenizer, not a model of two towers; name the model's directory.")
