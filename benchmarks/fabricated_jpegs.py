"""JPEG files as cameras and the web have them, made of small photographs."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from cots.data.image_io import open_image
from cots.data.samples import Sample, iter_samples

SIZES = ((640, 480), (640, 480), (480, 640), (640, 427), (500, 375))
DISTINCT = 1000


def make_jpegs(sources: list[str], count: int, folder: Path, size: tuple[int, int] | None) -> list[Path]:
    """Write `count` JPEGs (quality 90, 4:2:0, 85 KB on average at 640 x 480) made of the pictures of some sources.

    A picture is enlarged by bicubic interpolation, and given the noise of a sensor, without which it has half of the
    bytes of a photograph. At most `DISTINCT` are different; after these, files of the same content follow.

    Args:
        size: width and height of all; None: `SIZES` in turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = list(islice(iter_samples(sources, print), min(count, DISTINCT)))
    sizes: Iterator[tuple[int, int]] = cycle([size] if size else SIZES)
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(_jpeg, samples, islice(sizes, len(samples)), range(len(samples))))
        paths = [folder / f"{place:06}.jpg" for place in range(count)]
        list(pool.map(lambda path, content: path.write_bytes(content), paths, islice(cycle(contents), count)))
    return paths


def _jpeg(sample: Sample, size: tuple[int, int], seed: int) -> bytes:
    picture = open_image(sample.read_bytes()).resize(size, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed).normal(0, 4, (size[1], size[0], 1)).astype(np.float32)
    pixels = np.clip(np.asarray(picture, np.float32) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()
