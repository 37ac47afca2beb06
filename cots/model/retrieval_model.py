"""What search, evaluation and the gallery know of a model: pictures and sentences in, unit vectors out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from threading import Lock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from cots.data.square_transform import SquareTransform
from cots.model.dual_encoder import ImageStream
from cots.model.folding import fold_batch_norms
from cots.model.model_directory import SavedModel
from cots.model.tower import lower_precision
from cots.moments import unit_mean
from cots.onednn import bfloat16_is_quicker, quick_linears
from cots.recording import RecordedFunction


class RetrievalModel(ABC):
    """A pair of encoders into one space.

    Attributes:
        name: the name it was loaded by.
        fingerprint: hash of weights, transform and tokenizer; vectors can be compared only if it is equal.
        dimension: D of the vectors.
        device: where it computes.
        square: the exact transform of a picture.
        handles_video: whether it can embed clips, as every model can that `load_model` gives: by the mean of frames'
            vectors, if by nothing better. A model of your own for which that would mean nothing says False; then no
            clip becomes a vector, and an evaluation on clips is refused.
        bulk: whether it encodes pictures in bfloat16, on a CPU that gains by it. Cosines with the vectors of float32
            are above 0.999, but a measurement had better not depend on the processor.
    """

    handles_video = True
    bulk = False

    def __init__(
        self, name: str, fingerprint: str, dimension: int, device: torch.device, square: SquareTransform
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.dimension = dimension
        self.device = device
        self.square = square
        self._image_vectors: Callable[[Tensor], Tensor] = self._unit_images
        self._text_vectors: Callable[[Tensor], Tensor] = self._unit_texts
        if device.type == "cuda":
            self._image_vectors = RecordedFunction(self._unit_images, device)
            self._text_vectors = RecordedFunction(self._unit_texts, device)

    @property
    def image_size(self) -> int:
        return self.square.size

    def transform(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size -> (3, S, S) uint8."""
        return self.square(image)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, S, S) uint8 pixels into (B, D) float32 of unit norm, on the CPU."""
        if len(pixels) == 0:
            return torch.empty(0, self.dimension)
        return self._image_vectors(pixels.to(self.device, non_blocking=True)).cpu()

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Encode (B, F, 3, S, S) uint8 frames of clips into (B, D) float32 of unit norm, on the CPU."""
        frames = self.encode_images(pixels.flatten(0, 1)).view(*pixels.shape[:2], self.dimension).numpy()
        pooled = [torch.from_numpy(self.pool_frames(clip)) for clip in frames]
        return torch.stack(pooled) if pooled else torch.empty(0, self.dimension)

    def pool_frames(self, frames: np.ndarray) -> np.ndarray:
        """(F, D) float32 embeddings of a clip's frames, in their order, -> (D,) float32, unit norm.

        Without a temporal transformer: their mean.
        """
        return unit_mean(frames)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encode sentences into (B, D) float32 of unit norm, on the CPU."""
        if not texts:
            return torch.empty(0, self.dimension)
        return self._text_vectors(self._token_ids(list(texts)).to(self.device)).cpu()

    def _unit_images(self, pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            embeddings = self._encode_pixels(pixels)
        return F.normalize(embeddings.float(), dim=-1)

    def _unit_texts(self, token_ids: Tensor) -> Tensor:
        with torch.inference_mode():
            embeddings = self._encode_tokens(token_ids)
        return F.normalize(embeddings.float(), dim=-1)

    @abstractmethod
    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 on the device -> (B, D); of its own accord it waits for nothing."""

    @abstractmethod
    def _token_ids(self, texts: list[str]) -> Tensor:
        """B sentences -> (B, L) int64, on the CPU."""

    @abstractmethod
    def _encode_tokens(self, token_ids: Tensor) -> Tensor:
        """(B, L) on the device -> (B, D); of its own accord it waits for nothing."""


def half_precision(device: torch.device) -> torch.autocast:
    """On a GPU, networks whose weights are float32 compute in float16."""
    return torch.autocast(device.type, torch.float16, enabled=device.type == "cuda")


class CotsModel(RetrievalModel):
    """A dual encoder that this project trained. Its image stream is built at the first picture, which a search by
    words never brings.

    Args:
        bulk: see `RetrievalModel`.
    """

    def __init__(self, name: str, saved: SavedModel, device: torch.device, bulk: bool = False) -> None:
        image = saved.config.image_tower
        square = SquareTransform(image.image_size, image.resize)
        super().__init__(name, saved.fingerprint, saved.config.embedding_dim, device, square)
        self.tokenizer = saved.tokenizer
        self._texts = saved.text_stream().to(device)
        self._saved = saved
        self._images: ImageStream | None = None
        self._has_linears = False  # in the image tower
        self.bulk = bulk
        self._building = Lock()

    def pool_frames(self, frames: np.ndarray) -> np.ndarray:
        if self._saved.config.temporal.kind == "none":
            return unit_mean(frames)
        with torch.inference_mode():
            clip = torch.from_numpy(frames)[None].to(self.device)
            return self._image_stream().pool_frames(clip)[0].cpu().numpy()

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        stream = self._image_stream()
        with quick_linears(self.device) if self._has_linears else nullcontext():
            return stream.encode_image(pixels.contiguous(memory_format=torch.channels_last)).embedding

    def _token_ids(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts)

    def _encode_tokens(self, token_ids: Tensor) -> Tensor:
        with half_precision(self.device), quick_linears(self.device):
            return self._texts.encode_text(token_ids).embedding

    def _image_stream(self) -> ImageStream:
        with self._building:
            if self._images is None:
                self._images = self._build_image_stream()
        return self._images

    def _build_image_stream(self) -> ImageStream:
        stream = self._saved.image_stream().to(self.device).to(memory_format=torch.channels_last)
        self._has_linears = any(isinstance(module, nn.Linear) for module in stream.image_tower.modules())
        sample = torch.rand(1, 3, self.image_size, self.image_size, device=self.device)
        stream.image_tower = fold_batch_norms(stream.image_tower, sample)
        if self.bulk and self.device.type == "cpu" and bfloat16_is_quicker():
            lower_precision(stream, torch.bfloat16)
        if self.device.type == "cuda":
            lower_precision(stream, torch.float16)
            # Complete, whichever thread's stream uses it next. To wait for the whole device would fail, and spoil what
            # another thread records just then (index/recorded.py).
            torch.cuda.current_stream(self.device).synchronize()
        return stream
