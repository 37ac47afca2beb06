"""JPEGs through the GPU's decoders against Pillow. On a machine without a GPU the same code decodes on the CPU."""

import io
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cots.data import gpu_jpeg
from cots.data.gpu_jpeg import (
    GpuJpegDecoder,
    JpegLibrary,
    gpu_jpeg_decoder,
    torchcodec_jpegs,
    torchvision_jpegs,
)
from cots.data.image_io import open_image
from cots.data.jpeg_header import BaselineJpeg, read_baseline
from cots.data.square_transform import SquareTransform

SQUARE = SquareTransform(64)
CPU = torch.device("cpu")
DEVICES = [
    CPU,
    pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU")),
]


@pytest.fixture(params=[torchcodec_jpegs, torchvision_jpegs])
def library(request: pytest.FixtureRequest) -> JpegLibrary:
    if request.param is torchcodec_jpegs:
        pytest.importorskip("torchcodec")
    return request.param()


def jpeg(seed: int, width: int = 160, height: int = 120, orientation: int = 1, **options: object) -> bytes:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90, exif=exif, **options)
    return file.getvalue()


def with_header(content: bytes) -> tuple[bytes, BaselineJpeg]:
    header = read_baseline(content)
    assert header is not None
    return content, header


def damaged(content: bytes) -> bytes:
    """Its tables of Huffman codes overwritten: the header can be read, no pixel can."""
    at = content.index(b"\xff\xc4")
    return content[: at + 5] + b"\xff" * 16 + content[at + 21 :]


def near(found: torch.Tensor | None, content: bytes, square: SquareTransform = SQUARE) -> bool:
    """Whether a picture is Pillow's: chroma is spread differently, so single values differ, the picture does not.

    These pictures are all colour; by nvJPEG the worst of them is at 0.9995, on average they are at 0.99996.
    """
    assert found is not None
    wanted = square(open_image(content)).float()
    return F.cosine_similarity(found.cpu().float().flatten(), wanted.flatten(), dim=0).item() > 0.999


@pytest.mark.parametrize("device", DEVICES)
def test_pictures_are_pillows_whatever_their_size_and_orientation(library: JpegLibrary, device: torch.device) -> None:
    sizes = [(160, 120), (120, 160), (201, 77), (65, 640), (160, 120)]
    contents = [jpeg(place, *sizes[place % 5], orientation=place % 8 + 1, subsampling=place % 3) for place in range(40)]
    found = GpuJpegDecoder(SQUARE, device, library).decode([with_header(content) for content in contents])
    assert all(near(picture, content) for picture, content in zip(found, contents))


@pytest.mark.parametrize("device", DEVICES)
def test_grey_pictures_have_three_equal_channels(library: JpegLibrary, device: torch.device) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg(1))).convert("L").save(file, "JPEG")
    found = GpuJpegDecoder(SQUARE, device, library).decode([with_header(file.getvalue()), with_header(jpeg(2))])
    assert found[0] is not None
    assert found[0].shape == (1, 3, 64, 64)
    assert torch.equal(found[0][:, 0], found[0][:, 2])
    assert near(found[0], file.getvalue())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [{3}, {0, 6}, {0, 1, 2, 3, 4, 5, 6}])
def test_damaged_files_are_lost_alone(library: JpegLibrary, device: torch.device, bad: set[int]) -> None:
    contents = [jpeg(place) for place in range(7)]
    header = with_header(contents[0])[1]
    files = [(damaged(content) if place in bad else content, header) for place, content in enumerate(contents)]
    found = GpuJpegDecoder(SQUARE, device, library).decode(files)
    assert {place for place, picture in enumerate(found) if picture is None} == bad
    assert all(near(found[place], contents[place]) for place in range(7) if place not in bad)


def test_pictures_of_very_different_sizes_lie_on_the_device_by_portions(
    library: JpegLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_jpeg, "PIXELS_AT_ONCE", 50_000)
    portions: list[int] = []
    decode = gpu_jpeg._decode

    def watched(files: list[torch.Tensor], rest: Callable[..., list[torch.Tensor]]) -> list[torch.Tensor | None]:
        pictures = decode(files, rest)
        portions.append(sum(picture[0].numel() for picture in pictures if picture is not None))
        return pictures

    monkeypatch.setattr(gpu_jpeg, "_decode", watched)
    sizes = [(160, 120), (400, 300), (40, 30), (160, 120), (160, 120), (160, 120), (400, 300)]
    contents = [jpeg(place, *size) for place, size in enumerate(sizes)]
    found = GpuJpegDecoder(SQUARE, CPU, library).decode([with_header(content) for content in contents])
    assert all(near(picture, content) for picture, content in zip(found, contents))
    assert portions == [19200, 120000, 1200 + 2 * 19200, 19200, 120000]


def test_large_pictures_are_left_to_pillow(library: JpegLibrary) -> None:
    decoder = GpuJpegDecoder(SQUARE, CPU, library)
    assert decoder.takes(BaselineJpeg(6000, 6000, 1))
    assert not decoder.takes(BaselineJpeg(10_000, 10_000, 1))
    assert not decoder.takes(BaselineJpeg(9000, 100, 1))


@pytest.mark.parametrize("device", DEVICES)
def test_several_threads_decode_at_once(library: JpegLibrary, device: torch.device) -> None:
    decoder = GpuJpegDecoder(SQUARE, device, library)
    contents = [[jpeg(10 * thread + place) for place in range(10)] for thread in range(6)]
    results: dict[int, list[torch.Tensor | None]] = {}

    def work(thread: int) -> None:
        for _ in range(2):
            results[thread] = decoder.decode([with_header(content) for content in contents[thread]])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, pictures in results.items():
        assert all(near(picture, content) for picture, content in zip(pictures, contents[number]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_busy_stream_does_not_see_the_next_pictures_in_its_own(
    library: JpegLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision's decoder writes on a stream of its own; here part after part is decoded where the one before lay,
    while the decoder's own stream is still busy scaling it."""
    monkeypatch.setattr(gpu_jpeg, "PIXELS_AT_ONCE", 1_000_000)
    decoder = GpuJpegDecoder(SquareTransform(224), torch.device("cuda"), library)
    contents = [jpeg(place, 640, 480) for place in range(32)]
    files = [with_header(content) for content in contents]
    load = torch.rand(4096, 4096, device="cuda")
    for _ in range(20):
        for _ in range(20):
            load = load @ load * 1e-4
        found = decoder.decode(files)
    assert all(near(picture, content, SquareTransform(224)) for picture, content in zip(found, contents))


def test_an_orientation_that_a_decoder_finds_alone_is_left_to_pillow() -> None:
    content, header = with_header(jpeg(0, orientation=6))
    pytest.importorskip("torchcodec")
    decoder = GpuJpegDecoder(SQUARE, CPU, torchcodec_jpegs())
    assert decoder.decode([(content, BaselineJpeg(header.width, header.height, 1))]) == [None]


def test_there_is_no_decoder_without_a_gpu() -> None:
    assert gpu_jpeg_decoder(SQUARE, CPU) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_a_decoder() -> None:
    assert gpu_jpeg_decoder(SQUARE, torch.device("cuda")) is not None
    assert gpu_jpeg_decoder(SquareTransform(64, "squash", "nearest"), torch.device("cuda")) is None
