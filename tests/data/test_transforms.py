import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from cots.config import AugmentationConfig
from cots.data.sample_draws import SampleDraws
from cots.data.square_transform import SquareTransform
from cots.data.transforms import ColorJitter, TrainingTransform

SIZES = [(320, 240), (240, 320), (64, 64), (65, 64), (33, 200), (1000, 37), (63, 1)]
CPU = torch.device("cpu")
MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def _noise(width: int, height: int) -> Image.Image:
    small = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(small)


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_crop_is_torchvisions_resize_and_center_crop(size: tuple[int, int], interpolation: str) -> None:
    picture = _noise(*size)
    theirs = v2.Compose([v2.Resize(64, MODES[interpolation]), v2.CenterCrop(64)])(picture)
    assert torch.equal(SquareTransform(64, "crop", interpolation)(picture), F.pil_to_tensor(theirs))


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("size", [(2000, 3), (1500, 5), (7, 300), (3301, 100), (41, 1600)])
def test_crop_of_a_long_picture_is_that_of_the_whole_scaled(size: tuple[int, int], interpolation: str) -> None:
    picture, square = _noise(*size), SquareTransform(64, "crop", interpolation)
    scaled, (left, top) = square.geometry(*size)
    whole = picture.resize(scaled, Image.Resampling[interpolation.upper()]).crop((left, top, left + 64, top + 64))
    assert (square(picture).int() - F.pil_to_tensor(whole).int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_crop_of_a_line_takes_little_memory(size: tuple[int, int]) -> None:
    script = (
        "import resource; from PIL import Image; from cots.data.square_transform import SquareTransform; "
        f"resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30, 2 * 2**30)); "
        f"print(SquareTransform(256, 'crop')(Image.new('RGB', {size}, 'teal'))[:, 0, 0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "[0, 128, 128]\n", done.stderr


@pytest.mark.parametrize("size", SIZES)
def test_squash_resizes_to_the_square(size: tuple[int, int]) -> None:
    picture = _noise(*size)
    squashed = SquareTransform(64)(picture)
    assert (squashed.shape, squashed.dtype) == ((3, 64, 64), torch.uint8)
    assert torch.equal(squashed, F.pil_to_tensor(v2.Resize((64, 64), InterpolationMode.BICUBIC)(picture)))


def _train(transform: TrainingTransform, seed: int, *captions: str) -> tuple[torch.Tensor, list[str]]:
    torch.manual_seed(seed)
    return transform(_noise(90, 70), list(captions))


def test_a_seed_determines_the_augmentation() -> None:
    config = AugmentationConfig(rand_augment=2, grayscale=0.3, erase=0.5, drop_words=0.3)
    transform = TrainingTransform(32, config)
    sentence = "two people stand in the water with a dog"
    for seed in range(5):
        pixels, captions = _train(transform, seed, sentence)
        again, same = _train(transform, seed, sentence)
        assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.uint8)
        assert torch.equal(pixels, again)
        assert captions == same
    assert len({_train(transform, seed, sentence)[0].sum().item() for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("caption", "flipped"),
    [("a dog", True), ("a dog on the left", False), ("Right: a cat", False), ("a leftover meal, brightly lit", True)],
)
def test_a_caption_that_names_a_side_keeps_its_picture_unmirrored(caption: str, flipped: bool) -> None:
    always = AugmentationConfig(flip=1.0)
    never = AugmentationConfig(flip=0.0)
    pixels, _ = _train(TrainingTransform(32, always), 0, "a picture", caption)
    plain, _ = _train(TrainingTransform(32, never), 0, "a picture", caption)
    assert torch.equal(pixels, plain.flip(2) if flipped else plain)


def test_words_are_dropped_but_never_all() -> None:
    words = [f"word{number}" for number in range(1000)]
    transform = TrainingTransform(32, AugmentationConfig(drop_words=0.3))
    _, (thinned, single) = _train(transform, 0, " ".join(words), "dog")
    kept = thinned.split()
    assert 600 < len(kept) < 800
    assert kept == [word for word in words if word in set(kept)]
    assert single == "dog"
    transform = TrainingTransform(32, AugmentationConfig(drop_words=0.99))
    assert all(_train(transform, seed, "a dog")[1][0] in ("a", "dog", "a dog") for seed in range(20))
    assert _train(TrainingTransform(32, AugmentationConfig()), 0, " a  dog ")[1] == [" a  dog "]


class _OneFactor(SampleDraws):
    """One of the four factors of `ColorJitter` moves, the others stay where they were."""

    def __init__(self, factor: int, draws: torch.Tensor) -> None:
        super().__init__(0, CPU)
        self.factor, self.draws = factor, draws

    def uniform(self, samples: int, *shape: int) -> torch.Tensor:
        draws = torch.full((samples, *shape), 0.5)
        draws[:, self.factor] = self.draws
        return draws


@pytest.mark.parametrize(
    ("factor", "twin", "tolerance"),
    [(0, F.adjust_brightness, 1), (1, F.adjust_contrast, 2), (2, F.adjust_saturation, 2)],
)
def test_each_factor_alone_is_torchvisions(factor: int, twin: object, tolerance: int) -> None:
    pixels = torch.randint(0, 256, (6, 3, 24, 24), dtype=torch.uint8)
    draws = torch.rand(6)
    ours = ColorJitter(0.8, CPU)(pixels, _OneFactor(factor, draws))
    for picture, jittered, draw in zip(pixels, ours, draws.tolist()):
        theirs = twin(picture, 1 + (2 * draw - 1) * 0.8)
        assert (jittered.int() - theirs.int()).abs().max() <= tolerance  # torchvision truncates and rounds its grey


def test_hue_turns_colours_and_leaves_grey_and_luma() -> None:
    pixels = torch.tensor([[120.0, 120, 120], [140, 110, 110]]).to(torch.uint8)[:, :, None, None].expand(2, 3, 4, 4)
    grey, red = ColorJitter(1.0, CPU)(pixels, _OneFactor(3, torch.tensor([1.0, 1.0]))).float()  # hue by a quarter turn
    assert (grey - 120).abs().max() <= 1
    assert abs(red[1, 0, 0] - red[2, 0, 0]) > 20
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert abs(luma @ red[:, 0, 0] - luma @ pixels[1, :, 0, 0].float()) < 1.5


def test_jitter_of_no_strength_is_the_identity_and_any_stays_uint8() -> None:
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    draws = SampleDraws(0, CPU)
    assert torch.equal(ColorJitter(0.0, CPU)(pixels, draws), pixels)
    jittered = ColorJitter(0.9, CPU)(pixels, draws)
    assert (jittered.dtype, jittered.shape) == (torch.uint8, pixels.shape)
    assert not torch.equal(jittered, pixels)
