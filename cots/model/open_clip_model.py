"""Any pretrained open_clip model behind the same face."""

import json
from typing import Any

import torch
from torch import Tensor

from cots.data.square_transform import SquareTransform
from cots.errors import ModelError
from cots.model.model_directory import fingerprint_of
from cots.model.open_clip_architecture import OPEN_CLIP, create_open_clip, import_open_clip
from cots.model.retrieval_model import RetrievalModel, half_precision


class OpenClipModel(RetrievalModel):
    """`open_clip:ARCH/TAG`: an architecture of open_clip and a pretrained tag of it, or a checkpoint file in the
    tag's place."""

    def __init__(self, name: str, device: torch.device) -> None:
        open_clip = import_open_clip()
        model: Any = create_open_clip(name)  # any: open_clip's classes share their methods, but no base
        architecture = name.removeprefix(OPEN_CLIP).partition("/")[0]
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
        with half_precision(self.device):
            return self._model.encode_image((pixels.float() - self._mean) / self._std)

    def _encode_sentences(self, texts: list[str]) -> Tensor:
        with half_precision(self.device):
            return self._model.encode_text(self._tokenizer(texts).to(self.device))
