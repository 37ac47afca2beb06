"""From pictures to the tower's pixels, at random, for training.

All give uint8 (3, S, S); the model scales and normalises on its own device, so that a quarter of the bytes travel.
"""

import re

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from cots.config import AugmentationConfig
from cots.data.sample_draws import SampleDraws

_SIDED = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def mentions_side(caption: str) -> bool:
    """Whether a mirror image would make a caption wrong: it says left or right."""
    return _SIDED.search(caption) is not None


class TrainingTransform:
    """PIL RGB and its caption -> ((3, S, S) uint8, caption), both augmented with torch's global generator."""

    def __init__(self, size: int, config: AugmentationConfig) -> None:
        crop = v2.RandomResizedCrop(
            size, config.crop_scale, config.crop_ratio, interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        self._on_picture: list[v2.Transform] = [crop]
        if config.rand_augment:
            bilinear = InterpolationMode.BILINEAR
            self._on_picture.append(
                v2.RandAugment(config.rand_augment, config.rand_augment_magnitude, interpolation=bilinear, fill=128)
            )
        if config.grayscale:
            self._on_picture.append(v2.RandomGrayscale(config.grayscale))
        self._on_pixels: list[v2.Transform] = []
        if config.erase:
            self._on_pixels.append(v2.RandomErasing(config.erase, scale=(0.02, 0.2), value=128))
        self._flip = config.flip
        self._drop_words = config.drop_words

    def __call__(self, image: Image.Image, captions: list[str]) -> tuple[Tensor, list[str]]:
        for transform in self._on_picture:
            image = transform(image)
        pixels = F.pil_to_tensor(image)
        if torch.rand(()) < self._flip and not any(mentions_side(caption) for caption in captions):
            pixels = F.horizontal_flip(pixels)
        for transform in self._on_pixels:
            pixels = transform(pixels)
        return pixels, [self._thin(caption) for caption in captions]

    def _thin(self, caption: str) -> str:
        if not self._drop_words:
            return caption
        words = caption.split()
        kept = [word for word, draw in zip(words, torch.rand(len(words)).tolist()) if draw >= self._drop_words]
        return " ".join(kept) if kept else caption


class ColorJitter:
    """Brightness, contrast, saturation and hue, one draw a picture, on the device: (B, 3, S, S) uint8 -> the same.

    All four are affine in RGB, so they are one 3 x 3 matrix and one offset a picture: saturation and hue scale and
    rotate the chroma plane of YIQ, brightness and contrast scale around black and around the picture's mean grey.
    """

    def __init__(self, strength: float, device: torch.device) -> None:
        self.strength = strength
        to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
        # on the device from the start: a copy from the CPU in a step would wait for the device
        self._to_yiq, self._from_yiq = to_yiq.to(device), torch.linalg.inv(to_yiq).to(device)

    def __call__(self, pixels: Tensor, draws: SampleDraws) -> Tensor:
        if not self.strength:
            return pixels
        count, device = len(pixels), pixels.device
        change = (2 * draws.uniform(count, 4) - 1) * self.strength
        brightness, contrast, saturation = (1 + change[:, :3]).unbind(dim=1)
        angle = change[:, 3] / 4 * 2 * torch.pi
        turn = torch.zeros(count, 3, 3, device=device)
        turn[:, 0, 0] = 1
        turn[:, 1, 1] = turn[:, 2, 2] = saturation * angle.cos()
        turn[:, 1, 2], turn[:, 2, 1] = -saturation * angle.sin(), saturation * angle.sin()
        matrix = self._from_yiq @ turn @ self._to_yiq * (brightness * contrast)[:, None, None]
        values = pixels.float()
        grey = (values.mean(dim=(2, 3)) @ self._to_yiq[0]) * brightness * (1 - contrast)
        values = torch.einsum("bij,bjhw->bihw", matrix, values) + grey[:, None, None, None]
        return values.round().clamp(0, 255).to(torch.uint8)
