"""Where pairs come from: webdataset shards and tables, each a list of pairs that is read by random access."""

import glob
import io
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image

from cots.config import SourceConfig
from cots.data.image_io import open_image
from cots.data.media_kind import HEADER_BYTES, MEDIA_EXTENSIONS, sniff
from cots.data.samples import Sample, iter_samples
from cots.data.shards import TarIndex, read_captions
from cots.data.tables import plain_fields
from cots.errors import MediaError, SourceError

CLIP_FRAMES = 4  # that show what a clip looks like, where a step does not draw its own
_LEAST_TARGET = 188  # a JPEG of up to 500 x 375, which takes a millisecond or two, is decoded whole


@dataclass
class Pair:
    """Attributes:
    media: a picture's or a clip's bytes.
    captions: of it.
    group: items of one group are relevant to each other's captions; empty: those of this item only.
    stored: whatever else lies under its key in a shard, by extension.
    """

    media: bytes
    captions: Sequence[str]
    group: str = ""
    stored: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def is_clip(self) -> bool:
        return sniff(self.media[:HEADER_BYTES], "", lambda: io.BytesIO(self.media)) == "video"

    def frames(self, count: int, target_size: int | None = None) -> list[Image.Image]:
        """The picture, or `count` frames of the clip, spread evenly.

        Args:
            target_size: that of `open_image`, for pictures of more than 500 x 375; clips are decoded whole.

        Raises:
            MediaError: it cannot be decoded.
        """
        return self.frames_at([(place + 0.5) / count for place in range(count)], target_size)

    def frames_at(self, shares: Sequence[float], target_size: int | None = None) -> list[Image.Image]:
        """The picture, or the clip's frames at some shares of its duration; those that do not decode are missing.

        Raises:
            MediaError: none can be decoded.
        """
        if not self.is_clip:
            return [open_image(self.media, target_size=target_size and max(target_size, _LEAST_TARGET))]
        from cots.data.video_io import read_frames

        return read_frames(self.media, shares=shares).images

    def evaluation_frames(self, short_side: int) -> list[Image.Image]:
        """The frames that `cots evaluate` and a gallery embed.

        Raises:
            MediaError: none can be decoded.
        """
        if not self.is_clip:
            return [open_image(self.media, target_size=short_side)]
        from cots.data.frame_sampling import EVERY_SECOND

        return EVERY_SECOND.read_media(self.media, short_side, "").images


class PairSource(Protocol):
    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> Pair:
        """Raises MediaError if there is no picture or no caption."""


class ShardPairs:
    """Pairs of webdataset shards: a picture or clip and a .json with "captions" (or a .txt) under one key."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.index = TarIndex(paths)

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        return self.index.name(index)

    def read(self, index: int) -> Pair:
        parts = self.index.read(index)
        try:
            captions, fields = read_captions(parts)
        except ValueError as error:
            raise MediaError("", f"its captions cannot be read ({error})") from error
        media = _media_of(parts)
        if media is None or not captions:
            raise MediaError("", "the shard holds no picture for it" if media is None else "it has no caption")
        captions = tuple(caption.encode(errors="replace").decode() for caption in captions)  # JSON has half characters
        return Pair(media, captions, plain_fields(fields).get("group", ""), parts)


def _media_of(parts: Mapping[str, bytes]) -> bytes | None:
    """The picture or clip of a key, by its extension; else the first member that is no text."""
    named = [extension for extension in parts if extension.rpartition(".")[2] in MEDIA_EXTENSIONS]
    others = [extension for extension in parts if extension not in ("json", "txt", "cls")]
    return parts[(named or others)[0]] if others else None


class TablePairs:
    """Pairs of anything else that `iter_samples` reads, such as a table.

    The samples lie pickled one behind the other: millions of objects would take seconds to send to each worker, and a
    forked one would copy them all, as their references are counted.

    Attributes:
        left_out: what is no readable picture or clip, or has no caption.
    """

    def __init__(self, path: str) -> None:
        self.left_out: list[MediaError] = []
        records: list[bytes] = []
        for sample in iter_samples([path], self.left_out.append):
            if sample.captions:
                records.append(pickle.dumps(tuple(vars(sample).values())))
            else:
                self.left_out.append(MediaError(sample.path, "it has no caption"))
        self._records = b"".join(records)
        self._ends = np.cumsum([0, *map(len, records)])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "left_out": []}  # which is for the user, not for workers

    def __len__(self) -> int:
        return len(self._ends) - 1

    def sample(self, index: int) -> Sample:
        start, end = self._ends[index : index + 2].tolist()
        return Sample(*pickle.loads(self._records[start:end]))

    def name(self, index: int) -> str:
        return self.sample(index).path

    def read(self, index: int) -> Pair:
        sample = self.sample(index)
        return Pair(sample.read_bytes(), sample.captions, sample.extra.get("group", ""))


def name_of(sources: Sequence[PairSource], item: int) -> str:
    """The name of an item, counted through all sources."""
    for source in sources:
        if item < len(source):
            return source.name(item)
        item -= len(source)
    raise IndexError(item)


def open_source(config: SourceConfig) -> PairSource:
    """Open a source of pairs.

    Raises:
        SourceError: it does not exist or holds no pair.
    """
    path, tars = os.path.expanduser(config.path), []
    if path.endswith(".tar"):
        tars = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))  # a name may hold brackets
    source: PairSource = ShardPairs(tars) if tars else TablePairs(config.path)
    if len(source) == 0:
        left_out = source.left_out if isinstance(source, TablePairs) else []
        why = f", for none of its {len(left_out)} entries can be used: {left_out[0]}" if left_out else ""
        raise SourceError(f"The source {config.path} holds no pair of a picture and a caption{why}.")
    return source
