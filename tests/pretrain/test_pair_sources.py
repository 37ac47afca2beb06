"""How large pictures are decoded."""

import io

import numpy as np
import pytest
import torch
from clip_shards import crossing
from PIL import Image
from torchvision.transforms import v2

from cots.config import AugmentationConfig
from cots.data.image_io import open_image
from cots.data.square_transform import SquareTransform
from pretrain.loader import target_of_crops
from pretrain.pair_sources import Pair


def _photo(width: int, height: int, image_format: str = "JPEG") -> bytes:
    """Smooth shapes, with noise as fine as a pixel on top."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
    noise = random.integers(-8, 9, (height, width, 3))
    content = io.BytesIO()
    Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(content, image_format)
    return content.getvalue()


def _decoded(media: bytes, target_size: int | None) -> Image.Image:
    return Pair(media, ()).frames(1, target_size)[0]


@pytest.mark.parametrize("size", [(1600, 1200), (1201, 1999)])
def test_a_large_jpeg_is_decoded_smaller_with_enough_pixels_for_every_crop(size: tuple[int, int]) -> None:
    media, random = _photo(*size), np.random.default_rng()
    for _ in range(20):
        image_size = int(random.integers(64, 300))
        scale, ratio = random.uniform(0.3, 1.0), float(np.exp(random.uniform(0, 0.5)))
        config = AugmentationConfig(crop_scale=(scale, 1.0), crop_ratio=(1 / ratio, ratio))
        decoded = _decoded(media, target_of_crops(image_size, config))
        crop = v2.RandomResizedCrop(image_size, (scale, scale), (1 / ratio, ratio))
        crops = [crop.make_params([decoded]) for _ in range(100)]
        assert min(min(params["height"], params["width"]) for params in crops) >= image_size
    assert max(_decoded(media, target_of_crops(224, AugmentationConfig())).size) < max(size)


def test_a_crop_of_a_large_jpeg_looks_as_it_did() -> None:
    media = _photo(1600, 1200)
    smaller = _decoded(media, target_of_crops(224, AugmentationConfig()))
    assert smaller.size == (800, 600)
    ours = smaller.resize((224, 224), box=(0, 100, 400, 500))
    expected = open_image(media).resize((224, 224), box=(0, 200, 800, 1000))
    assert np.abs(np.asarray(ours, np.int16) - np.asarray(expected, np.int16)).mean() < 2


@pytest.mark.parametrize("target_size", [32, 188, None])
def test_other_pictures_are_decoded_whole(target_size: int | None) -> None:
    for media in (_photo(500, 375), _photo(375, 500), _photo(1600, 1200, "PNG")):
        whole, decoded = open_image(media), _decoded(media, target_size)
        assert decoded.size == whole.size
        assert decoded.tobytes() == whole.tobytes()
    clip = Pair(crossing("red", 1, 0), ())
    for one, other in zip(clip.frames(4), clip.frames(4, target_size), strict=True):
        assert torch.equal(SquareTransform(16)(one), SquareTransform(16)(other))
