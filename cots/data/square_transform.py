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
_LONGEST = 32  # times the shorter side, of a picture that is scaled whole; scaling a part may round otherwise


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
        scaled, (left, top) = self.geometry(*image.size)
        right, bottom = left + self.size, top + self.size
        if max(scaled) > _LONGEST * self.size:  # what is cut off would take memory in proportion to the aspect
            across, down = image.width / scaled[0], image.height / scaled[1]
            box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
            return _pixels(image.resize((self.size, self.size), _RESAMPLING[self.interpolation], box))
        resized = image.resize(scaled, _RESAMPLING[self.interpolation])
        if scaled == (self.size, self.size):
            return _pixels(resized)
        return _pixels(resized.crop((left, top, right, bottom)))

    def geometry(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The width and height that a picture is scaled to, and the left upper corner of the square in that."""
        size = self.size
        if self.resize == "squash":
            return (size, size), (0, 0)
        short = min(width, height)
        # torchvision's rule: the longer side is truncated, the crop's corner rounded
        scaled = (int(size * width / short), int(size * height / short))
        return scaled, (round((scaled[0] - size) / 2), round((scaled[1] - size) / 2))

    def __repr__(self) -> str:
        return f"SquareTransform({self.size}, {self.resize!r}, {self.interpolation!r})"


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
