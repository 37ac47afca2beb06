"""Any pretrained open_clip model behind the same face."""

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cots.data.square_transform import SquareTransform
from cots.errors import ModelError
from cots.model.caption_tokenizer import without_surrogates
from cots.model.model_directory import fingerprint_of
from cots.model.open_clip_architecture import OPEN_CLIP, create_open_clip, import_open_clip, open_clip_tokenizer
from cots.model.retrieval_model import RetrievalModel, half_precision
from cots.onednn import bfloat16_is_quicker, quick_linears


class OpenClipModel(RetrievalModel):
    """`open_clip:ARCH/TAG`: an architecture of open_clip and a pretrained tag of it, or a checkpoint file in the
    tag's place.

    Args:
        bulk: see `RetrievalModel`.
    """

    def __init__(self, name: str, device: torch.device, bulk: bool = False) -> None:
        open_clip = import_open_clip()
        model: Any = create_open_clip(name)  # any: open_clip's classes share their methods, but no base
        architecture = name.removeprefix(OPEN_CLIP).partition("/")[0]
        self._model = model.eval().to(device)
        self._tokenizer = open_clip_tokenizer(name)
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
        if device.type == "cpu":  # after the fingerprint, which has the original's names
            for module in list(self._model.modules()):
                if type(module).__name__ == "ResidualAttentionBlock" and not hasattr(module, "ln_1_kv"):
                    module.attn = PlainSelfAttention(module.attn)

        self.bulk = bulk

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        normalised = (pixels.float() - self._mean) / self._std
        if self.bulk and self.device.type == "cpu" and bfloat16_is_quicker():
            with torch.autocast("cpu", torch.bfloat16):
                return self._model.encode_image(normalised)
        with half_precision(self.device), quick_linears(self.device):
            return self._model.encode_image(normalised)

    def _token_ids(self, texts: list[str]) -> Tensor:
        return self._tokenizer([without_surrogates(text) for text in texts])

    def _encode_tokens(self, token_ids: Tensor) -> Tensor:
        with half_precision(self.device), quick_linears(self.device):
            return self._model.encode_text(token_ids)


class PlainSelfAttention(nn.Module):
    """What an nn.MultiheadAttention computes of a sequence with itself, in evaluation mode: its own linear maps lie in
    one function with the rest, where `quick_linears` does not see them.

    Args:
        original: batch first, with one projection for queries, keys and values.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = original.num_heads
        self.weight, self.bias = original.in_proj_weight, original.in_proj_bias
        self.output = original.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """(B, L, C), three times the same, and what is added to the scores -> (B, L, C), and no weights.

        It is (L, L), or (B * heads, L, L) of a CoCa, whose texts end in a token that does not see their padding.
        """
        assert key is query
        assert value is query
        assert not need_weights
        batch, length, width = query.shape
        joined = F.linear(query, self.weight, self.bias).view(batch, length, 3, self.heads, width // self.heads)
        asked, keys, values = joined.permute(2, 0, 3, 1, 4).unbind(0)
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.view(batch, self.heads, length, length)
        attended = F.scaled_dot_product_attention(asked, keys, values, attn_mask=attn_mask)
        return self.output(attended.transpose(1, 2).reshape(batch, length, width)), None
