"""What one process does for all workers of a build: how many items a second it can list, hand out, take back and write.

    python benchmarks/build_coordination.py --items 200000 --json benchmarks/results/build_coordination.json

No model runs. The first row is the writer alone; the second takes results, as bytes from a pipe would be, through the
ledger into the writer: this bounds a build by any number of workers. The others list 50,000 members of
shards, which a build does before it embeds; the time that processes take to start counts.
"""

import argparse
import io
import json
import pickle
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import lancedb
import numpy as np
from PIL import Image
from run_facts import run_facts

from cots.data.samples import Sample
from cots.embed import Embedded, cores
from index.crew import SEND_RESULTS, Death, Outcomes, Task, embed_with
from index.gallery import TABLE, Gallery, open_gallery, schema
from index.manifest import Manifest
from index.writer import TableWriter

DIMENSION = 256
WORKERS = 8
SHARDS = 10

# In an interpreter that has loaded no more than the command has by then, because its processes start as it does.
LISTING = """
import sys, time
from index.listing import list_samples
started = time.perf_counter()
count = sum(1 for _ in list_samples(sys.argv[2:], print, int(sys.argv[1])))
print(count / (time.perf_counter() - started))
"""


class ReadyCrew:
    """Workers whose results are there at once, as bytes, because they are of no picture."""

    size = WORKERS
    window = 4096

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors
        self._messages: list[tuple[int, bytes]] = [(worker, pickle.dumps(Outcomes())) for worker in range(WORKERS)]
        self.seconds = 0.0  # of what workers would do

    def wait(self) -> Iterator[tuple[int, Outcomes | Death]]:
        messages, self._messages = self._messages, []
        for worker, message in messages:
            yield worker, pickle.loads(message)

    def give(self, worker: int, task: Task) -> None:
        started = time.perf_counter()
        pickle.loads(pickle.dumps(task))  # the coordinating process only dumps
        for start in range(0, len(task), SEND_RESULTS):
            positions = [position for position, _ in task[start : start + SEND_RESULTS]]
            done = [(position, (), f"{position:032x}", 640, 480, None) for position in positions]
            vectors = [self._vectors[position % len(self._vectors)][None] for position in positions]
            self._messages.append((worker, pickle.dumps(Outcomes(done, vectors))))
        self.seconds += time.perf_counter() - started

    def replace(self, worker: int) -> None:
        raise AssertionError("none of them dies")

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    facts = run_facts()
    vectors = np.random.default_rng(0).standard_normal((4096, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    samples = [
        Sample(
            f"/data/{place // 1000:06}/{place:09}.jpg", "image", (f"a photo of number {place}",), "photos", {}, 9, 1.0
        )
        for place in range(arguments.items)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shards = _write_shards(folder, min(arguments.items, 50_000) // SHARDS)
        rates = {
            "writer": _written(folder / "writer", _plain(samples, vectors)),
            "results, ledger and writer": _coordinated(folder / "coordinated", samples, vectors),
            "listing shards, one process": _listed(shards, processes=1),
            f"listing shards, {cores()} processes": _listed(shards, processes=cores()),
        }
    document = {
        **facts,
        "items": arguments.items,
        "dimension": DIMENSION,
        "items_per_second": {name: round(rate) for name, rate in rates.items()},
    }
    for name, rate in rates.items():
        print(f"{name:30} {rate:10,.0f} items/s")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


def _plain(samples: list[Sample], vectors: np.ndarray) -> list[Embedded]:
    return [
        Embedded(sample, vectors[place % len(vectors)][None], (), f"{place:032x}", 640, 480, None)
        for place, sample in enumerate(samples)
    ]


def _written(directory: Path, results: Iterable[Embedded]) -> float:
    gallery = _empty_gallery(directory)
    started = time.perf_counter()
    count = _write(gallery, results)
    return count / (time.perf_counter() - started)


def _coordinated(directory: Path, samples: list[Sample], vectors: np.ndarray) -> float:
    gallery = _empty_gallery(directory)
    crew = ReadyCrew(vectors)
    started = time.perf_counter()
    count = _write(gallery, embed_with(crew, samples, on_error=print))
    return count / (time.perf_counter() - started - crew.seconds)


def _write(gallery: Gallery, results: Iterable[Embedded]) -> int:
    writer = TableWriter(gallery, next_id=1)
    for result in results:
        writer.put(result)
    writer.commit()
    return gallery.table.count_rows()


def _write_shards(folder: Path, pairs: int) -> list[Path]:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "WEBP")
    shards = [folder / f"{number:06}.tar" for number in range(SHARDS)]
    for path in shards:
        with tarfile.open(path, "w") as shard:
            for place in range(pairs):
                for name, content in ((f"{place:08}.webp", picture.getvalue()), (f"{place:08}.txt", b"a photo")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
    return shards


def _listed(shards: list[Path], processes: int) -> float:
    command = [sys.executable, "-c", LISTING, str(processes), *map(str, shards)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _empty_gallery(directory: Path) -> Gallery:
    directory.mkdir()
    lancedb.connect(str(directory)).create_table(TABLE, schema=schema(DIMENSION))
    Manifest.for_model("none", "0" * 32, DIMENSION).write(directory)
    return open_gallery(directory)


if __name__ == "__main__":
    main()
