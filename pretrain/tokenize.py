"""Compute visual tokens ahead of time, into webdataset shards.

    python -m pretrain.tokenize pairs-*.tar --tokenizer runs/visual_tokenizer --grid 14 --image-size 224 --out tokenized

writes a copy of each shard with the tokens of every picture beside it (cots/data/visual_tokens.py says how they are
stored). Clips are copied without: their frames are drawn anew each time.

The tokens are those of the whole picture, squashed, and of its mirror image: for a training that shows whole pictures,
objective.masked_modeling.stored_tokens=true with data.augmentation.crop_scale='[1, 1]', while flips and colours are
free. For one that crops, the tokens have to be computed from the crop, on the fly.

When it pays: seldom. The encoder of configs/visual_tokenizer.yaml takes 0.7 GFLOPs for a grid of 14 x 14 (1.8 for
the base one), forward only, where a training step of ViT-B/16 at 224 px takes about 105; a trainer that computes tokens
on the fly loses one or two steps in a hundred, and keeps the crops, which are worth more. It pays for a tokenizer of
the size of its tower, for small towers on large grids, and where the pictures are seen whole anyway.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from cots.data.media_kind import MEDIA_EXTENSIONS
from cots.data.shards import TarIndex
from cots.data.square_transform import SquareTransform
from cots.data.visual_tokens import MOST_CODES, pack_tokens, tokens_extension
from cots.errors import MediaError, SourceError
from cots.model.visual_tokenizer import VisualTokenizer, load_visual_tokenizer
from pretrain.command import exit_code
from pretrain.pair_sources import Pair
from pretrain.whole_shard import write_whole_shard

_AT_ONCE = 64


@dataclass
class Tokenized:
    """Attributes:
    pictures: that got tokens.
    clips: that were copied without.
    bad: name and reason of pictures that could not be decoded; they are copied without.
    """

    pictures: int
    clips: int
    bad: list[tuple[str, str]]


def tokenize_shards(
    shards: Sequence[str | Path],
    tokenizer: VisualTokenizer,
    out: str | Path,
    *,
    grid: int,
    image_size: int | None = None,
    workers: int = 4,
) -> Tokenized:
    """Write copies of shards, with tokens, into a folder; each whole or not at all.

    Args:
        tokenizer: on the device that computes.
        grid: patches a side.
        image_size: side in pixels that the tower sees, from which the tokens are computed exactly as in a training on
            the fly; by default grid * stride.
        workers: threads that decode.

    Raises:
        SourceError: a shard is missing or damaged, or would be written over itself.
    """
    if tokenizer.codebook_size > MOST_CODES:
        raise SourceError(f"Tokens are stored in 16 bits; the codebook of {tokenizer.codebook_size} is too large.")
    out = Path(out)
    done = Tokenized(0, 0, [])
    transform = SquareTransform(image_size or grid * tokenizer.stride)
    extension = tokens_extension(grid, tokenizer.fingerprint())
    with ThreadPoolExecutor(workers) as threads:
        for shard in shards:
            index, target = TarIndex([shard]), out / Path(shard).name
            if target.exists() and target.samefile(shard):
                raise SourceError(f"{shard} would be written over itself; give another folder with --out.")
            out.mkdir(parents=True, exist_ok=True)
            pairs = _with_tokens(index, transform, tokenizer, grid, extension, threads, done)
            write_whole_shard(
                target, ((f"{key}.{name}", content) for key, parts in pairs for name, content in parts.items())
            )
    return done


def _with_tokens(
    index: TarIndex,
    transform: SquareTransform,
    tokenizer: VisualTokenizer,
    grid: int,
    extension: str,
    threads: Executor,
    done: Tokenized,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The pairs of a shard, key and contents, with the member of tokens last."""
    places = iter(range(len(index)))
    while batch := list(islice(places, _AT_ONCE)):
        pairs = [index.read(place) for place in batch]
        squares = list(threads.map(lambda parts: _square(parts, transform), pairs))
        pictures = [square for square in squares if isinstance(square, Tensor)]
        tokens = iter(_tokens(torch.stack(pictures), tokenizer, grid)) if pictures else iter(())
        for place, parts, square in zip(batch, pairs, squares):
            if isinstance(square, Tensor):
                done.pictures += 1
                parts = {**parts, extension: pack_tokens(next(tokens).numpy())}
            elif square is None:
                done.clips += 1
            else:
                done.bad.append((index.name(place), square))
            yield index.key(place), parts


def _square(parts: dict[str, bytes], transform: SquareTransform) -> Tensor | str | None:
    """The picture as (3, S, S) uint8, or why it has none; None for a clip."""
    media = [content for name, content in parts.items() if name.rpartition(".")[2] in MEDIA_EXTENSIONS]
    if not media:
        return "the shard holds no picture for it"
    pair = Pair(media[0], ())
    if pair.is_clip:
        return None
    try:
        return transform(pair.frames(1, transform.size)[0])
    except MediaError as error:
        return error.reason


def _tokens(pixels: Tensor, tokenizer: VisualTokenizer, grid: int) -> Tensor:
    """(B, 3, S, S) uint8 -> (B, 2, grid, grid) int64 on the CPU: as it is, and mirrored."""
    pixels = pixels.to(tokenizer.codes.device)
    both = torch.stack([tokenizer.tokens(side, grid) for side in (pixels, pixels.flip(-1))], dim=1)
    return both.view(len(pixels), 2, grid, grid).cpu()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", metavar="SHARD", type=Path)
    parser.add_argument("--tokenizer", default="embedded", metavar="DIR", help="`embedded`, or what training one wrote")
    parser.add_argument("--grid", type=int, required=True, help="patches a side: the grid of the image tower")
    parser.add_argument("--image-size", type=int, help="side in pixels that the tower sees")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--workers", type=int, default=4, help="threads that decode")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    tokenizer = load_visual_tokenizer(given.tokenizer).to(given.device)
    done = tokenize_shards(
        given.shards, tokenizer, given.out, grid=given.grid, image_size=given.image_size, workers=given.workers
    )
    for name, reason in done.bad:
        print(f"unreadable, copied without tokens: {name}: {reason}", file=sys.stderr)
    print(f"{done.pictures} pictures tokenized, {done.clips} clips and {len(done.bad)} unreadable pictures copied.")


if __name__ == "__main__":
    sys.exit(exit_code(_main))
