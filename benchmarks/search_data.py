"""Vectors and queries of the search benchmark: real embeddings, grown to millions with noise that keeps them real.

    python benchmarks/search_data.py draw data/flickr8k/{val-000000,train-00000[0-3]}.tar --captions 1000 --out base.npz
    python benchmarks/search_data.py check base.npz          # the criterion below, in two minutes

`draw` embeds photographs by the embedded model, and three captions of each of the first 1,000 of them, which are the
queries (of photographs that the model was not trained on: the validation split comes first). The .npz of 5,000
photographs takes 6 MB, so that a machine without a model or data can run the benchmark.

How they are grown: row r is b + z, scaled to unit norm, with b the photograph r modulo their number, and z normal
noise of the covariance of b's 33 nearest photographs (itself included) times `SPREAD` squared. So noise goes where
photographs vary. Isotropic noise does not: in 256 dimensions it makes shells far from everything.

How the spread was chosen: the mean cosine s of a real photograph with its k-th best among N others follows
1 - s = c N^-p from N = 288 to 4,600 (p = 0.15, 0.19, 0.17 at k = 1, 10, 100), which says what to expect of more.
Grown photographs should be as near to each other as that; and an eighth of the photographs, grown to all, should be as
hard to find in cells as the real ones are:

    mean cosine of a photograph's      1st    10th   100th | of captions' 10 best in 1, 2, 4 of 64 cells of an IVF
    real, N = 4,600                   0.74    0.62    0.41 | 0.62  0.79  0.90
    expected at 100,000               0.83    0.78    0.66 |
    SPREAD 0.6                        0.92    0.86    0.65 | 0.59  0.77  0.89
    SPREAD 0.8                        0.88    0.79    0.63 | 0.53  0.73  0.88
    SPREAD 1.0                        0.84    0.74    0.61 | 0.54  0.71  0.86
    expected at 1,000,000             0.87    0.86    0.78 |
    SPREAD 0.8                        0.91    0.87    0.79 |

0.8 it is: neighbours are as near as expected, and a search is a little harder than among real photographs. What
growing cannot give is a photograph that fits a caption better than any there is: a caption's 10th best has a cosine of
0.68 at 100,000 where 0.74 is expected, and of 0.72 at 1,000,000 where 0.82 is.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

SPREAD = 0.8
NEIGHBOURS = 33
GROUP = 64  # photographs whose rows a thread grows at a time


@dataclass(frozen=True)
class Base:
    """Photographs (B, D) float16, captions (Q, D) float16 as queries and (Q,) as sentences, and (B,) captions."""

    images: np.ndarray
    queries: np.ndarray
    sentences: np.ndarray
    captions: np.ndarray

    @classmethod
    def load(cls, path: Path) -> "Base":
        with np.load(path) as file:
            return cls(**{name: file[name] for name in cls.__annotations__})


def draw(sources: list[str], captioned: int, limit: int | None, out: Path) -> None:
    """Embed photographs and captions, and write them."""
    from cots.data.samples import iter_samples
    from cots.embed import embed
    from cots.model.pretrained import load_model

    model = load_model("embedded")
    embedded = list(islice(embed(iter_samples(sources, on_error=print), model, on_error=print), limit))
    sentences = [sentence for item in embedded[:captioned] for sentence in item.sample.captions[:3]]
    queries = np.concatenate(
        [model.encode_texts(sentences[start : start + 32]).numpy() for start in range(0, len(sentences), 32)]
    )
    order = np.random.default_rng(0).permutation(len(sentences))
    np.savez_compressed(
        out,
        images=np.stack([item.vectors[0] for item in embedded]).astype(np.float16),
        queries=queries[order].astype(np.float16),
        sentences=np.array(sentences)[order],
        captions=np.array(["\n".join(item.sample.captions) for item in embedded]),
    )


def grow(images: np.ndarray, count: int, out: np.ndarray, spread: float = SPREAD, seed: int = 0) -> None:
    """Fill `out` (count, D), any float type, with grown rows of `images` (B, D).

    The seed says which, up to how the BLAS rounds: with two threads instead of one, 12,000 of the 256 million numbers
    of a million rows differ, by one in the last place of float16.
    """
    images = images.astype(np.float32)
    near = min(NEIGHBOURS, len(images))
    neighbours = np.argpartition(-images @ images.T, near - 1, axis=1)[:, :near]

    def fill(first: int) -> None:
        rng = np.random.default_rng((seed, first))
        for row in range(first, min(first + GROUP, len(images))):
            copies = len(range(row, count, len(images)))
            around = images[neighbours[row]]
            around = (around - around.mean(axis=0)) * np.float32(spread / near**0.5)
            grown = images[row] + rng.standard_normal((copies, near), dtype=np.float32) @ around
            out[row :: len(images)] = grown / np.linalg.norm(grown, axis=1, keepdims=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(0, len(images), GROUP)))


def _best(gallery: np.ndarray, probes: np.ndarray, depth: int) -> Iterator[np.ndarray]:
    """The `depth` highest cosines of each probe, descending, (depth,)."""
    for probe in probes.astype(np.float32):
        scores = gallery @ probe
        yield -np.sort(-scores[np.argpartition(-scores, depth)[:depth]])


def check(base: Base) -> None:
    """Print the mean cosine at ranks 1, 10 and 100 of real subsets, what follows for more, and what growing gives."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(base.images))
    images, held_out = base.images[order[400:]].astype(np.float32), base.images[order[:400]]
    sizes = [len(images) // part for part in (16, 8, 4, 2, 1)]
    print(f"{'':24}{'captions, rank 1    10   100':>30}{'photographs, rank 1    10   100':>36}")

    def row(name: str, means: np.ndarray) -> None:
        print(f"{name:24}" + "".join(f"{value:10.3f}" for value in means.ravel()))

    real = []
    for size in sizes:
        means = [
            [*np.mean(list(_best(images[:size], probes, 100)), axis=0)[[0, 9, 99]]]
            for probes in (base.queries[:400], held_out)
        ]
        real.append(np.array(means))
        row(f"real {size}", real[-1])
    for count in (100_000, 1_000_000):
        slopes = np.log((1 - real[-1]) / (1 - real[-2])) / np.log(sizes[-1] / sizes[-2])
        row(f"law at {count}", 1 - (1 - real[-1]) * (count / sizes[-1]) ** slopes)
        grown = np.empty((count + 400, images.shape[1]), np.float32)
        grow(base.images, len(grown), grown)
        probes = (base.queries[:400], grown[-400:])
        row(
            f"grown to {count}",
            np.array([np.mean(list(_best(grown[:-400], each, 100)), axis=0)[[0, 9, 99]] for each in probes]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw")
    drawing.add_argument("sources", nargs="+")
    drawing.add_argument("--captions", type=int, default=1000, help="photographs whose captions become queries")
    drawing.add_argument("--limit", type=int, help="photographs at most")
    drawing.add_argument("--out", type=Path, required=True)
    commands.add_parser("check").add_argument("base", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "draw":
        draw(arguments.sources, arguments.captions, arguments.limit, arguments.out)
    else:
        check(Base.load(arguments.base))


if __name__ == "__main__":
    main()
