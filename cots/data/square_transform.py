"""From a picture to the tower's pixels, exactly the same each time: for search, evaluation and galleries.

A file of its own, so that a search does not import torchvision, which takes two seconds.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


class SquareTransform:
    """PIL RGB -> (3, S, S) uint8, without randomness.

    `squash` resizes to the square and ignores the aspect, `crop` resizes the shorter side and cuts the centre out;
    `bicubic` is Pillow's, with antialiasing.
    """

    def __init__(self, size: int, resize: str = "squash", interpolation: str = "bicubic") -> None:
        self.size = size
        self.resize = resize
        self.interpolation = interpolation

    def __call__(self, image: Image.Image) -> Tensor:
        size, resampling = self.size, _RESAMPLING[self.interpolation]
        if self.resize == "squash":
            return _pixels(image.resize((size, size), resampling))
        width, height = image.size
        short = min(width, height)
        # torchvision's rule: the longer side is truncated, the crop's corner rounded
        scaled = image.resize((int(size * width / short), int(size * height / short)), resampling)
        left, top = round((scaled.width - size) / 2), round((scaled.height - size) / 2)
        return _pixels(scaled.crop((left, top, left + size, top + size)))

    def __repr__(self) -> str:
        return f"SquareTransform({self.size}, {self.resize!r}, {self.interpolation!r})"


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
