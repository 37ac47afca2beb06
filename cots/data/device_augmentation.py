"""The random transforms of training on whole batches of squares, on the device: one affine map a picture.

Crop, aspect, mirror image and the geometric operations of RandAugment are one matrix, so that every pixel is
interpolated once. All randomness is handed in as uniform numbers: what a picture becomes depends on nothing else.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cots.config import AugmentationConfig
from cots.errors import ConfigError

DRAWS = 20
"""Uniform numbers that a picture's transform takes."""
_GREY = 128.0


class DeviceAugmentation:
    """(B, 3, R, R) uint8 squares -> (B, 3, S, S) uint8 crops.

    Bicubic, without antialiasing: R should not be far above S. Of RandAugment, the geometric operations (turn, shear
    and shift in both directions); the photometric ones are left to the colour jitter.

    Raises:
        ConfigError: the configuration asks for what cannot be done here.
    """

    def __init__(self, size: int, config: AugmentationConfig) -> None:
        if config.drop_words:
            raise ConfigError(
                "data.augmentation.drop_words needs the captions' text, which data.cache_side does not keep; set "
                "data.augmentation.drop_words=0 or data.cache_side=null."
            )
        self.size = size
        self.config = config

    def __call__(self, squares: Tensor, draws: Tensor, may_flip: Tensor) -> Tensor:
        """Transform a batch.

        Args:
            squares: (B, 3, R, R) uint8.
            draws: (B, DRAWS) uniform in [0, 1).
            may_flip: (B,) bool, False where a caption says left or right.
        """
        grid = F.affine_grid(self._matrices(draws, may_flip), [len(squares), 3, self.size, self.size], False)
        pixels = F.grid_sample(squares.float() - _GREY, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
        pixels = (pixels + _GREY).round().clamp(0, 255).to(torch.uint8)
        if self.config.grayscale:
            red, green, blue = pixels.float().unbind(1)
            grey = 0.299 * red + 0.587 * green + 0.114 * blue  # a tensor of weights would be copied, and waited for
            chosen = (draws[:, 5] < self.config.grayscale).view(-1, 1, 1, 1)
            pixels = torch.where(chosen, grey.round().to(torch.uint8)[:, None], pixels)
        return self._erase(pixels, draws) if self.config.erase else pixels

    def _matrices(self, draws: Tensor, may_flip: Tensor) -> Tensor:
        """(B, 2, 3): where in the square each output coordinate lies, both in [-1, 1]."""
        config = self.config
        low, high = config.crop_scale
        area = low + (high - low) * draws[:, 0]
        first, last = (math.log(bound) for bound in config.crop_ratio)
        ratio = torch.exp(first + (last - first) * draws[:, 1])
        width, height = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
        x, y = (1 - width) * (2 * draws[:, 2] - 1), (1 - height) * (2 * draws[:, 3] - 1)
        flip = torch.where((draws[:, 4] < config.flip) & may_flip, -1.0, 1.0)
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        crop = _stack(width * flip, zero, x, zero, height, y, zero, zero, one)
        for operation in range(config.rand_augment):
            crop = self._operation(draws, operation) @ crop
        return crop[:, :2]

    def _operation(self, draws: Tensor, operation: int) -> Tensor:
        """One of five geometric operations a picture, with torchvision's ranges at the configured magnitude."""
        place = 6 + 2 * operation  # to 13, for the configuration allows four
        kind = (5 * draws[:, place]).long()
        strength = (2 * draws[:, place + 1] - 1).sign() * self.config.rand_augment_magnitude / 30
        zero, one = torch.zeros_like(strength), torch.ones_like(strength)
        angle = torch.where(kind == 0, strength * math.radians(30), zero)
        shear_x, shear_y = torch.where(kind == 1, 0.3 * strength, zero), torch.where(kind == 2, 0.3 * strength, zero)
        shift_x, shift_y = torch.where(kind == 3, 0.9 * strength, zero), torch.where(kind == 4, 0.9 * strength, zero)
        cosine, sine = angle.cos(), angle.sin()
        return _stack(cosine, shear_x - sine, shift_x, shear_y + sine, cosine, shift_y, zero, zero, one)

    def _erase(self, pixels: Tensor, draws: Tensor) -> Tensor:
        """One grey rectangle of 2 to 20 % of the area in a share `erase` of the pictures."""
        area = 0.02 + 0.18 * draws[:, 15]
        ratio = torch.exp((2 * draws[:, 16] - 1) * math.log(3.3))
        width, height = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
        left, top = draws[:, 17] * (1 - width), draws[:, 18] * (1 - height)
        place = (torch.arange(self.size, device=pixels.device) + 0.5) / self.size
        columns = (place > left[:, None]) & (place < (left + width)[:, None])
        rows = (place > top[:, None]) & (place < (top + height)[:, None])
        chosen = (draws[:, 14] < self.config.erase)[:, None, None]
        return pixels.masked_fill((chosen & rows[:, :, None] & columns[:, None, :])[:, None], int(_GREY))


def _stack(*entries: Tensor) -> Tensor:
    """Nine (B,) entries, row by row -> (B, 3, 3)."""
    return torch.stack(entries, dim=1).view(-1, 3, 3)
