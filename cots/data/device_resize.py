"""Pillow's resize on any device, of a batch at once.

Pillow resizes first along the rows, then along the columns, each time by a weighted sum of neighbours rounded to 8
bits. Along one axis that is a matrix whose rows are the weights, and a batch of equal sizes is two matrix products.
"""

from functools import lru_cache

import torch
from torch import Tensor

from cots.data.square_transform import SquareTransform

# EXIF orientation: whether rows and columns change places, and which upright axis (x, y) runs backwards in the file.
_STORED = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


def resize_batch(pixels: Tensor, square: SquareTransform, orientation: int = 1) -> Tensor:
    """`square`, bicubic or bilinear, of a batch on its device: (B, 3, H, W) uint8 as stored -> (B, 3, S, S), upright.

    A value is off by 1 where Pillow's fixed point, or the float16 of a GPU, rounds to the other side.

    Args:
        orientation: EXIF's, of all pictures.
    """
    swapped, back_x, back_y = _STORED[orientation]
    height, width = pixels.shape[-2:]
    upright = (height, width) if swapped else (width, height)
    (scaled_x, scaled_y), (left, top) = square.geometry(*upright)
    dtype = torch.float16 if pixels.device.type == "cuda" else torch.float32
    kind = (square.size, square.interpolation, dtype, pixels.device)
    across = _weights(upright[0], scaled_x, left, back_x, *kind)
    down = _weights(upright[1], scaled_y, top, back_y, *kind)
    if pixels.device.type == "cuda":  # another thread's stream may have made them, and the cache may let them go
        across.record_stream(torch.cuda.current_stream(pixels.device))
        down.record_stream(torch.cuda.current_stream(pixels.device))
    planes = pixels.to(dtype).flatten(0, 1)
    if swapped:
        rows = _rounded(_of_columns(planes, across))
        result = _rounded(_of_rows(rows, down)).mT
    else:
        rows = _rounded(_of_rows(planes, across))
        result = _rounded(_of_columns(rows, down))
    return result.to(torch.uint8).unflatten(0, (-1, 3))


def _of_rows(planes: Tensor, weights: Tensor) -> Tensor:
    """(P, H, W) and (S, W) -> (P, H, S)."""
    return planes @ weights.T


def _of_columns(planes: Tensor, weights: Tensor) -> Tensor:
    """(P, H, W) and (S, H) -> (P, S, W)."""
    return torch.bmm(weights.expand(len(planes), -1, -1), planes)


def _rounded(values: Tensor) -> Tensor:
    """Halves upwards, as Pillow has them: a scale of exactly 2 makes many."""
    return values.add_(0.5).floor_().clamp_(0, 255)


@lru_cache(maxsize=128)  # pictures of one source share a few lengths; one of 8,192 takes 4 MB
def _weights(
    length: int,
    scaled: int,
    start: int,
    backwards: bool,
    size: int,
    interpolation: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """(size, length): how the `size` values from `start` on of an axis scaled to `scaled` are made of its `length`."""
    scale = length / scaled
    stretch = max(scale, 1.0)
    support = (2.0 if interpolation == "bicubic" else 1.0) * stretch
    center = (torch.arange(start, start + size, dtype=torch.float64) + 0.5) * scale
    first = (center - support + 0.5).long().clamp(min=0)
    last = (center + support + 0.5).long().clamp(max=length)
    taps = first[:, None] + torch.arange(int((last - first).max()))
    values = _kernel((taps - center[:, None] + 0.5) / stretch, interpolation)
    values = values.masked_fill(taps >= last[:, None], 0.0)
    values = values / values.sum(dim=1, keepdim=True)
    weights = torch.zeros(size, length, dtype=torch.float64).scatter_add_(1, taps.clamp(max=length - 1), values)
    return (weights.flip(1) if backwards else weights).to(dtype).to(device)


def _kernel(distance: Tensor, interpolation: str) -> Tensor:
    """Pillow's filters: the triangle, and Keys' cubic with a = -0.5 (Keys 1981, equation 4)."""
    x = distance.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
