import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cots.config import AugmentationConfig
from cots.data.device_augmentation import DRAWS, DeviceAugmentation
from cots.errors import ConfigError

NOTHING = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}


def _squares(count: int, side: int) -> torch.Tensor:
    """Smooth pictures, which every bicubic filter samples alike."""
    coarse = torch.rand(count, 3, 5, 5)
    return (255 * torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")).to(torch.uint8)


def _augment(config: dict, squares: torch.Tensor, draws: torch.Tensor, size: int = 48) -> torch.Tensor:
    may_flip = torch.ones(len(squares), dtype=torch.bool)
    return DeviceAugmentation(size, AugmentationConfig(**{**NOTHING, **config}))(squares, draws, may_flip)


def test_without_randomness_a_picture_comes_back_as_it_was() -> None:
    squares = torch.randint(256, (4, 3, 48, 48), dtype=torch.uint8)
    assert torch.equal(_augment({}, squares, torch.rand(4, DRAWS)), squares)


def test_a_crop_is_the_part_of_the_picture_that_the_draws_say() -> None:
    """The slow way: each picture cut out with whole pixels and resized by torchvision."""
    squares, draws = _squares(6, 64), torch.rand(6, DRAWS)
    draws[:, 1] = 0.5  # no distortion
    draws[:, 2:4] = (draws[:, 2:4] * 32).round() / 32
    cropped = _augment({"crop_scale": (0.25, 0.25)}, squares, draws)
    for square, draw, ours in zip(squares, draws, cropped):
        left, top = round(draw[2].item() * 32), round(draw[3].item() * 32)
        expected = F.resized_crop(square, top, left, 32, 32, [48, 48], InterpolationMode.BICUBIC, antialias=False)
        inner = (slice(None), slice(3, -3), slice(3, -3))  # at the rim one of them sees beyond the crop
        assert (ours[inner].int() - expected[inner].int()).abs().float().mean() < 2


def test_captions_that_name_a_side_keep_their_picture_unmirrored() -> None:
    squares, draws = _squares(2, 48), torch.rand(2, DRAWS)
    augment = DeviceAugmentation(48, AugmentationConfig(**{**NOTHING, "flip": 1.0}))
    mirrored, kept = augment(squares, draws, torch.tensor([True, False]))
    assert (mirrored.int() - squares[0].flip(2).int()).abs().max() <= 1
    assert (kept.int() - squares[1].int()).abs().max() <= 1


def test_what_a_picture_becomes_depends_on_its_own_draws_alone() -> None:
    config = {"crop_scale": (0.3, 1.0), "flip": 0.5, "rand_augment": 2, "erase": 0.5, "grayscale": 0.5}
    squares, draws = _squares(8, 48), torch.rand(8, DRAWS)
    together = _augment(config, squares, draws)
    alone = torch.cat([_augment(config, squares[i : i + 1], draws[i : i + 1]) for i in range(8)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, _augment(config, squares, torch.rand(8, DRAWS)))


def test_grey_pictures_have_the_luma_of_their_colours() -> None:
    squares, draws = torch.randint(256, (40, 3, 48, 48), dtype=torch.uint8), torch.rand(40, DRAWS)
    changed = _augment({"grayscale": 0.5}, squares, draws)
    for square, ours in zip(squares, changed):
        luma = np.tensordot([0.299, 0.587, 0.114], square.numpy(), 1)
        expected = torch.from_numpy(luma).expand(3, 48, 48)
        assert torch.equal(ours, square) or (ours - expected).abs().max() < 0.5001
    grey = [torch.equal(ours[0], ours[1]) for ours in changed]
    assert grey == (draws[:, 5] < 0.5).tolist()


def test_erasing_hides_one_grey_rectangle() -> None:
    squares = torch.full((200, 3, 48, 48), 200, dtype=torch.uint8)
    erased = (_augment({"erase": 0.5}, squares, torch.rand(200, DRAWS)) == 128).all(dim=1)
    share = erased.flatten(1).float().mean(dim=1)
    assert 60 < (share > 0).sum() < 140
    assert share[share > 0].max() < 0.25
    first = erased[share > 0][0]
    rows, columns = first.any(dim=1).sum(), first.any(dim=0).sum()
    assert first.sum() == rows * columns


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set data\.augmentation\.drop_words=0 or data\.cache_side=null\.$"):
        DeviceAugmentation(48, AugmentationConfig(drop_words=0.1))
