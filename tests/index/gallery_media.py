"""Small real files for gallery tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_picture(path: Path, seed: int, size: int = 48) -> Path:
    """A picture of random blocks, different for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST).save(path)
    return path


def write_animation(path: Path, seed: int, seconds: int = 9) -> Path:
    """An animated GIF, a frame a second: a video to COTS, and one that needs no video codec to be written."""
    rng = np.random.default_rng(seed)
    frames = [
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((48, 48), Image.Resampling.NEAREST)
        for _ in range(seconds)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000, loop=0)
    return path
