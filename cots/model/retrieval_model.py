"""What search, evaluation and the gallery know of a model: pictures and sentences in, unit vectors out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from threading import Lock

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cots.data.square_transform import SquareTransform
from cots.model.dual_encoder import ImageStream
from cots.model.folding import fold_batch_norms
from cots.model.model_directory import SavedModel


class RetrievalModel(ABC):
    """A pair of encoders into one space.

    Attributes:
        name: the name it was loaded by.
        fingerprint: hash of weights, transform and tokenizer; vectors can be compared only if it is equal.
        dimension: D of the vectors.
        device: where it computes.
        square: the exact transform of a picture.
    """

    def __init__(
        self, name: str, fingerprint: str, dimension: int, device: torch.device, square: SquareTransform
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.dimension = dimension
        self.device = device
        self.square = square

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
        with torch.inference_mode(), self._precision():
            embeddings = self._encode_pixels(pixels.to(self.device, non_blocking=True))
        return F.normalize(embeddings.float(), dim=-1).cpu()

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encode sentences into (B, D) float32 of unit norm, on the CPU."""
        if not texts:
            return torch.empty(0, self.dimension)
        with torch.inference_mode(), self._precision():
            embeddings = self._encode_sentences(list(texts))
        return F.normalize(embeddings.float(), dim=-1).cpu()

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda")

    @abstractmethod
    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 on the device -> (B, D)."""

    @abstractmethod
    def _encode_sentences(self, texts: list[str]) -> Tensor:
        """B sentences -> (B, D)."""


class CotsModel(RetrievalModel):
    """A dual encoder that this project trained. Its image stream is built at the first picture, which a search by
    words never brings."""

    def __init__(self, name: str, saved: SavedModel, device: torch.device) -> None:
        image = saved.config.image_tower
        square = SquareTransform(image.image_size, image.resize)
        super().__init__(name, saved.fingerprint, saved.config.embedding_dim, device, square)
        self.tokenizer = saved.tokenizer
        self._texts = saved.text_stream().to(device)
        self._saved = saved
        self._images: ImageStream | None = None
        self._building = Lock()

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        with self._building:
            if self._images is None:
                self._images = self._build_image_stream()
        return self._images.encode_image(pixels.contiguous(memory_format=torch.channels_last)).embedding

    def _encode_sentences(self, texts: list[str]) -> Tensor:
        return self._texts.encode_text(self.tokenizer(texts).to(self.device)).embedding

    def _build_image_stream(self) -> ImageStream:
        stream = self._saved.image_stream().to(self.device).to(memory_format=torch.channels_last)
        sample = torch.rand(1, 3, self.image_size, self.image_size, device=self.device)
        stream.image_tower = fold_batch_norms(stream.image_tower, sample)
        return stream
