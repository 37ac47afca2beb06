"""Any pretrained open_clip model behind the same face."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cots.data.square_transform import SquareTransform
from cots.errors import MissingDependency, ModelError
from cots.model.model_directory import fingerprint_of
from cots.model.retrieval_model import RetrievalModel


class OpenClipModel(RetrievalModel):
    """`open_clip:ARCH/TAG`: an architecture of open_clip and a pretrained tag of it, or a checkpoint file in the
    tag's place."""

    def __init__(self, name: str, device: torch.device) -> None:
        try:
            import open_clip
        except ImportError as error:
            raise MissingDependency("open_clip_torch", "pip install 'cots[open_clip]'") from error
        architecture, separator, tag = name.removeprefix("open_clip:").partition("/")
        known = open_clip.list_models()
        if not separator or architecture not in known:
            raise ModelError(
                f"{name!r} is no open_clip model; write open_clip:ARCH/TAG with an ARCH of open_clip.list_models()."
            )
        if not Path(tag).is_file() and tag not in open_clip.list_pretrained_tags_by_model(architecture):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
            raise ModelError(
                f"open_clip has no weights {tag!r} for {architecture}; its tags: {tags}; a checkpoint file works too."
            )
        quick_gelu = bool((open_clip.get_pretrained_cfg(architecture, tag) or {}).get("quick_gelu"))
        try:
            model = open_clip.create_model(
                architecture, pretrained=tag, require_pretrained=True, force_quick_gelu=quick_gelu
            )
        except Exception as error:  # hub, network and pickle errors of many classes
            raise ModelError(
                f"The weights of {name} could not be loaded: {str(error).strip().splitlines()[0]}"
            ) from error
        self._model = model.eval().to(device)
        self._tokenizer = open_clip.get_tokenizer(architecture)
        preprocess = open_clip.get_model_preprocess_cfg(model)
        size = preprocess["size"][0] if isinstance(preprocess["size"], (tuple, list)) else preprocess["size"]
        resize = {"shortest": "crop", "squash": "squash"}.get(preprocess["resize_mode"])
        if resize is None:
            raise ModelError(
                f"{name} resizes by {preprocess['resize_mode']!r}, which is not supported; choose another model."
            )
        self._mean = 255 * torch.tensor(preprocess["mean"], device=device).view(1, 3, 1, 1)
        self._std = 255 * torch.tensor(preprocess["std"], device=device).view(1, 3, 1, 1)
        transform: dict[str, Any] = json.loads(json.dumps(preprocess)) | {"architecture": architecture}
        with torch.inference_mode():
            dimension = self._model.encode_text(self._tokenizer(["a"]).to(device)).shape[1]
        super().__init__(
            name,
            fingerprint_of(model.state_dict(), transform, type(self._tokenizer).__name__.encode()),
            dimension,
            device,
            SquareTransform(size, resize, preprocess["interpolation"]),
        )

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self._model.encode_image((pixels.float() - self._mean) / self._std)

    def _encode_sentences(self, texts: list[str]) -> Tensor:
        return self._model.encode_text(self._tokenizer(texts).to(self.device))
