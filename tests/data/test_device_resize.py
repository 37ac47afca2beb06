"""Resizing by matrix products against Pillow, for every size, rule, filter and orientation."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cots.data.device_resize import resize_batch
from cots.data.image_io import open_image
from cots.data.square_transform import SquareTransform

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def photo_like(width: int, height: int, seed: int) -> Image.Image:
    """Coarse blocks and fine noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def stored(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


def by_pillow(picture: Image.Image, square: SquareTransform, orientation: int) -> torch.Tensor:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    return square(open_image(file.getvalue()))


@settings(max_examples=150)
@given(
    width=st.integers(8, 700),
    height=st.integers(8, 700),
    size=st.sampled_from([16, 31, 64]),
    rule=st.sampled_from(["squash", "crop"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    orientation=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_values_are_pillows(
    width: int, height: int, size: int, rule: str, interpolation: str, orientation: int, seed: int
) -> None:
    square = SquareTransform(size, rule, interpolation)
    picture = photo_like(width, height, seed)
    difference = resize_batch(stored(picture), square, orientation)[0].int() - by_pillow(picture, square, orientation)
    assert difference.abs().max() <= 2  # two roundings, each of which may fall to the other side
    assert (difference != 0).float().mean() < 0.05


def test_a_batch_is_its_pictures_one_by_one() -> None:
    square = SquareTransform(32, "crop")
    batch = torch.cat([stored(photo_like(90, 60, seed)) for seed in range(5)])
    together = resize_batch(batch, square, 6)
    assert all(torch.equal(one, resize_batch(picture[None], square, 6)[0]) for one, picture in zip(together, batch))


@needs_gpu
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("rule", ["squash", "crop"])
def test_float16_on_a_gpu_is_off_by_one_at_most_now_and_then(orientation: int, rule: str) -> None:
    square = SquareTransform(224, rule)
    picture = photo_like(640, 480, orientation)
    found = resize_batch(stored(picture).cuda(), square, orientation)[0].cpu().int()
    difference = (found - by_pillow(picture, square, orientation)).abs()
    assert difference.max() <= 2
    assert (difference != 0).float().mean() < 0.15
