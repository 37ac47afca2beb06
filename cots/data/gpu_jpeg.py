"""JPEGs decoded, turned upright and scaled on a GPU, by torchvision's nvJPEG.

nvJPEG uses the chip's JPEG engines where it has them (A100, H100), which leaves the rest of the chip to a model. It
knows no EXIF, gives nothing of a batch of which one file is damaged, and may not notice that a file is cut off; so
`cots.data.jpeg_header` sorts out what it is given, and what it refuses is for Pillow to read or to name.
"""

import io
import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence

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


class GpuJpegDecoder:
    """Decodes JPEGs as `open_image` and `square` would, on a device; several threads may use it at once.

    Args:
        square: how pictures are scaled.
        device: a GPU; on a CPU torchvision's libjpeg decodes.

    Attributes:
        device: as given.
    """

    def __init__(self, square: SquareTransform, device: torch.device) -> None:
        self._square = square
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
                decoded = _decode([content for content, _ in part], self.device, stream)
                pictures += self._scale(decoded, [header.orientation for _, header in part])
        return pictures

    def _scale(self, decoded: list[Tensor | None], orientations: list[int]) -> list[Tensor | None]:
        alike: dict[tuple[torch.Size, int], list[int]] = defaultdict(list)
        for place, (picture, orientation) in enumerate(zip(decoded, orientations)):
            if picture is not None:
                alike[picture.shape, orientation].append(place)
        scaled: list[Tensor | None] = [None] * len(decoded)
        for (_, orientation), places in alike.items():
            together = torch.stack([picture for place in places if (picture := decoded[place]) is not None])
            for place, picture in zip(places, resize_batch(together, self._square, orientation).split(1)):
                scaled[place] = picture
        return scaled


def gpu_jpeg_decoder(square: SquareTransform, device: torch.device) -> GpuJpegDecoder | None:
    """The decoder of a device, or None if there is none: on a CPU, where torchvision is built without nvJPEG, or for
    a filter that `resize_batch` lacks."""
    if device.type != "cuda" or square.interpolation not in ("bicubic", "bilinear"):
        return None
    sample = io.BytesIO()
    Image.new("RGB", (64, 64)).save(sample, "JPEG")
    decoder = GpuJpegDecoder(square, device)
    try:
        found = decoder.decode([(sample.getvalue(), BaselineJpeg(64, 64, 1))])
    except ImportError:  # torchvision has announced that its decoders will go
        return None
    return None if found[0] is None else decoder


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


def _decode(
    contents: list[bytes | memoryview], device: torch.device, stream: torch.cuda.Stream | None
) -> list[Tensor | None]:
    """(3, H, W) uint8 as stored, of each file; None of those that cannot be decoded, found by halving."""
    from torchvision.io import ImageReadMode, decode_jpeg

    if stream is not None:
        # The decoder works on a stream of its own and waits for no other: before it may write to memory that pictures
        # of this stream have left, their kernels must be done (pytorch/vision#9606).
        stream.synchronize()
    encoded = [torch.frombuffer(content, dtype=torch.uint8) for content in contents]
    try:
        return list(decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device))
    except RuntimeError:  # of a damaged file, or of memory, of which half a batch needs less
        if len(contents) == 1:
            return [None]
    half = len(contents) // 2
    return _decode(contents[:half], device, stream) + _decode(contents[half:], device, stream)
