"""JPEGs decoded, turned upright and scaled on a GPU, by the nvJPEG of TorchCodec, or else of torchvision.

nvJPEG uses the chip's JPEG engines where it has them (A100, H100), which leaves the rest of the chip to a model. It
gives nothing of a batch of which one file is damaged, and may not notice that a file is cut off; so
`cots.data.jpeg_header` sorts out what it is given, and what it refuses is for Pillow to read or to name.
"""

import io
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from cots.data.device_resize import resize_batch
from cots.data.device_turns import DeviceTurns
from cots.data.jpeg_header import BaselineJpeg
from cots.data.square_transform import SquareTransform

MAX_SIDE = 8192
MAX_PIXELS = 36_000_000
PIXELS_AT_ONCE = 48_000_000  # 144 MB decoded, twice that while they are scaled; 156 pictures of 640 x 480
TURNS = 3  # one decodes, one scales, one stands ready

# torch.frombuffer complains of bytes, which are never written to here.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)


Encoded = tuple[bytes | memoryview, BaselineJpeg]


@dataclass(frozen=True)
class JpegLibrary:
    """Attributes:
    decode: files, (N,) uint8 each, and a device -> (3, H, W) uint8 on it, complete; a RuntimeError if one is damaged.
    heeds_streams: it waits for the current stream before it writes to memory that pictures of this stream have left.
    turns: its pictures are upright; else they are as stored.
    """

    decode: Callable[[list[Tensor], torch.device], list[Tensor]]
    heeds_streams: bool
    turns: bool


def torchcodec_jpegs() -> JpegLibrary:
    """TorchCodec works on the current stream, with a decoder for each thread.

    Raises:
        ImportError, OSError, RuntimeError: it is not installed, or built for other versions of torch or CUDA.
    """
    from torchcodec.decoders import decode_jpeg

    def decode(files: list[Tensor], device: torch.device) -> list[Tensor]:
        return list(decode_jpeg(files, mode="RGB", device=device))

    return JpegLibrary(decode, heeds_streams=True, turns=True)


def torchvision_jpegs() -> JpegLibrary:
    """torchvision, which has announced that its decoders will go, has one decoder on a stream of its own, which waits
    for no other (pytorch/vision#9606) and whose kernels come after a model's.

    Raises:
        ImportError: they have gone.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(files: list[Tensor], device: torch.device) -> list[Tensor]:
        return list(decode_jpeg(files, mode=ImageReadMode.RGB, device=device))

    return JpegLibrary(decode, heeds_streams=False, turns=False)


class GpuJpegDecoder:
    """Decodes JPEGs as `open_image` and `square` would, on a device; several threads may use it at once.

    Args:
        square: how pictures are scaled.
        device: a GPU; on a CPU the library's libjpeg decodes.
        library: which decodes.

    Attributes:
        device, library: as given.
    """

    def __init__(self, square: SquareTransform, device: torch.device, library: JpegLibrary) -> None:
        self._square = square
        self.library = library
        self.device = device
        self._turns = DeviceTurns(device, TURNS, urgent=True)

    def takes(self, header: BaselineJpeg) -> bool:
        """Whether a picture is small enough to lie on the device whole; Pillow reads a larger one at a fraction."""
        return header.pixels <= MAX_PIXELS and max(header.width, header.height) <= MAX_SIDE

    def decode(self, files: Sequence[Encoded]) -> list[Tensor | None]:
        """Each file's upright picture, (1, 3, S, S) uint8 on the device, complete; None of one that cannot be decoded.

        No more than `PIXELS_AT_ONCE`, or one picture, lie on the device at once for each of `TURNS` threads.
        """
        pictures: list[Tensor | None] = []
        with self._turns.turn() as stream:
            for part in _portions(files):
                if stream is not None and not self.library.heeds_streams:
                    stream.synchronize()
                encoded = [torch.frombuffer(content, dtype=torch.uint8) for content, _ in part]
                decoded = _decode(encoded, lambda files: self.library.decode(files, self.device))
                pictures += self._scale(decoded, [header for _, header in part])
                del decoded  # before the next part is
        return pictures

    def _scale(self, decoded: list[Tensor | None], headers: list[BaselineJpeg]) -> list[Tensor | None]:
        alike: dict[tuple[torch.Size, int], list[int]] = defaultdict(list)
        for place, (picture, header) in enumerate(zip(decoded, headers)):
            orientation = 1 if self.library.turns else header.orientation
            if picture is not None and (not self.library.turns or _is_upright(picture, header)):
                alike[picture.shape, orientation].append(place)
        scaled: list[Tensor | None] = [None] * len(decoded)
        for (_, orientation), places in alike.items():
            together = torch.stack([picture for place in places if (picture := decoded[place]) is not None])
            for place, picture in zip(places, resize_batch(together, self._square, orientation).split(1)):
                scaled[place] = picture
        return scaled


def gpu_jpeg_decoder(square: SquareTransform, device: torch.device) -> GpuJpegDecoder | None:
    """The decoder of a device, or None if there is none: on a CPU, where no library has nvJPEG, or for a filter that
    `resize_batch` lacks."""
    if device.type != "cuda" or square.interpolation not in ("bicubic", "bilinear"):
        return None
    sample = io.BytesIO()
    Image.new("RGB", (64, 64)).save(sample, "JPEG")
    for library in (torchcodec_jpegs, torchvision_jpegs):
        try:
            decoder = GpuJpegDecoder(square, device, library())
        except (ImportError, OSError, RuntimeError):
            continue
        if decoder.decode([(sample.getvalue(), BaselineJpeg(64, 64, 1))])[0] is not None:
            return decoder
    return None


def _is_upright(picture: Tensor, header: BaselineJpeg) -> bool:
    """Whether a decoder found the orientation that Pillow would: of a damaged EXIF they may think otherwise."""
    height, width = picture.shape[-2:]
    return (width, height) == header.upright_size


def _portions(files: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
    """Runs of files of no more than `PIXELS_AT_ONCE` together, or one file."""
    ends = itertools.accumulate((header.pixels for _, header in files), initial=0)
    start = begun = 0
    for place, end in enumerate(ends):
        if end - begun > PIXELS_AT_ONCE and place - 1 > start:
            yield files[start : place - 1]
            start, begun = place - 1, end - files[place - 1][1].pixels
    if start < len(files):
        yield files[start:]


def _decode(files: list[Tensor], decode: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor | None]:
    """The picture of each file; None of those that cannot be decoded, found by halving."""
    try:
        return list(decode(files))
    except RuntimeError:  # of a damaged file, or of memory, of which half a batch needs less
        if len(files) == 1:
            return [None]
    half = len(files) // 2
    return _decode(files[:half], decode) + _decode(files[half:], decode)
