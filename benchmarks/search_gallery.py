"""Makes a gallery of any size, whose rows are those of a real build but for the files, which do not exist.

    python benchmarks/search_gallery.py --base base.npz --rows 1000000 --gallery big [--engine hnsw]

Four rows of five are pictures; the fifth is of a video, which has a pooled row and nine moments. Vectors are grown as
`search_data.py` says, moments lie about their video, and captions are those of photographs. The table is written
through the project's schema, in commits of 100,000 rows, with the full-text index, the manifest and the structure of a
build.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from search_data import Base, grow

from cots.model.pretrained import load_model
from index.captions import index_captions
from index.engine import renew_engine
from index.gallery import create_gallery, open_gallery, schema
from index.lock import writing

COMMIT = 100_000
MOMENTS = 9
MOMENT_SPREAD = 0.5  # norm of what is added to a video's vector: two moments have a cosine of 0.8


def rows_of(base: Base, count: int) -> Iterator[pa.Table]:
    """The rows, a commit at a time."""
    dimension = base.images.shape[1]
    pictures = count * 4 // 5
    videos = (count - pictures) // (1 + MOMENTS)
    pictures = count - videos * (1 + MOMENTS)
    vectors = np.empty((pictures + videos, dimension), np.float16)
    grow(base.images, len(vectors), vectors)
    number = np.concatenate([np.arange(pictures), np.repeat(pictures + np.arange(videos), 1 + MOMENTS)])
    place = np.concatenate([np.full(pictures, -1), np.tile(np.arange(1 + MOMENTS) - 1, videos)])
    ids = np.arange(count)
    items = np.where(place < 0, ids, ids - place - 1)
    rng = np.random.default_rng(0)
    for start in range(0, count, COMMIT):
        part = slice(start, min(start + COMMIT, count))
        which, moment = number[part], place[part]
        block = vectors[which].astype(np.float32)
        noise = rng.standard_normal(block.shape, dtype=np.float32) * np.float32(MOMENT_SPREAD / dimension**0.5)
        block += np.where(moment >= 0, np.float32(1), np.float32(0))[:, None] * noise
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        video, absent = which >= pictures, moment < 0
        names = [
            f"{'clips' if v else 'photos'}/{n // 1000:05}/{n:08}.{'mp4' if v else 'jpg'}" for n, v in zip(which, video)
        ]
        captions = base.captions[which % len(base.captions)]
        columns = {
            "id": ids[part],
            "item": items[part],
            "kind": np.where(video, "video", "image"),
            "moment": ~absent,
            "path": names,
            "source": np.char.add("source ", (which % 50).astype(str)),
            "caption": captions,
            "captions": [caption.split("\n") for caption in captions],
            "licence": [""] * len(which),
            "start": pa.array(moment.astype(float), mask=absent),
            "end": pa.array(moment + 1.0, mask=absent),
            "frame_time": pa.array(moment + 0.5, mask=absent),
            "content_hash": [f"{n:016x}" for n in which],
            "size": 50_000 + which % 100_000,
            "mtime": 1.7e9 + which,
            "width": np.full(len(which), 640, np.int32),
            "height": np.full(len(which), 480, np.int32),
            "duration": pa.array(np.full(len(which), float(MOMENTS)), mask=~video),
        }
        flat = pa.array(block.astype(np.float16).ravel())
        columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, dimension)
        yield pa.table(columns).cast(schema(dimension))


def make(base: Base, count: int, directory: Path, engine: str) -> None:
    """Write the gallery and say how long each step took."""
    model = load_model("embedded")
    started = time.perf_counter()

    def tell(step: str) -> None:
        nonlocal started
        print(f"{step}: {time.perf_counter() - started:.1f} s", flush=True)
        started = time.perf_counter()

    with writing(directory):
        gallery = create_gallery(directory, model)
        for rows in rows_of(base, count):
            gallery.table.add(rows)
        tell(f"{count:,} rows written")
        index_captions(gallery)
        tell("captions indexed")
        gallery.manifest = replace(gallery.manifest, next_id=count)
        gallery.manifest.write(gallery.directory)
        gallery = open_gallery(directory)
        len(gallery.snapshot)
        tell("snapshot written")
        renew_engine(gallery, engine, model=model)
        tell(f"engine {engine} made and tuned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--gallery", type=Path, required=True)
    parser.add_argument("--engine", default="exact")
    arguments = parser.parse_args()
    make(Base.load(arguments.base), arguments.rows, arguments.gallery, arguments.engine)


if __name__ == "__main__":
    main()
