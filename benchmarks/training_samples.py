"""A training sample of a photograph, from a file of a shard or a table to pixels and word pieces, on one core.

    OMP_NUM_THREADS=1 python benchmarks/training_samples.py data/flickr8k/val-000000.tar [--count 40] [--json OUT]

JPEGs of several sizes are made of the pictures of a source. Three sides read the same files, picture by picture in
turns, in one process, over a warm page cache: the trainer's samples (`TrainingPairs`, which decodes large JPEGs no
larger than the smallest crop needs), the same with every JPEG decoded whole, and what open_clip's trainer does with a
picture (its training transform of an opened file, without captions). A picture's time is the median of its rounds; a
figure is the mean over pictures.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from fabricated_jpegs import make_jpegs
from PIL import Image
from run_facts import run_facts

from cots.config import AugmentationConfig, SourceConfig
from cots.data.transforms import TrainingTransform
from cots.model.pretrained import load_model
from pretrain.loader import TrainingPairs, target_of_crops
from pretrain.pair_sources import open_source

SIZES = ((500, 375), (1024, 768), (1600, 1200), (4000, 3000))
OURS, WHOLE, THEIRS = "TrainingPairs", "TrainingPairs, decoded whole", "open_clip's transform"


def sides(paths: list[Path], table: Path, image_size: int) -> dict[str, Callable[[int], Any]]:
    """What reads picture `index` of the files, by name."""
    table.write_text("".join(json.dumps({"path": str(path), "caption": "a dog on a beach"}) + "\n" for path in paths))
    sources = [open_source(SourceConfig(path=str(table)))]
    augmentation = AugmentationConfig()
    transform, tokenizer = TrainingTransform(image_size, augmentation), load_model("embedded").tokenizer
    sized = TrainingPairs(sources, tokenizer, transform, 1, 1, 0, target_of_crops(image_size, augmentation))
    whole = TrainingPairs(sources, tokenizer, transform, 1, 1, 0)
    peer = open_clip.image_transform(image_size, is_train=True, aug_cfg={"scale": augmentation.crop_scale})
    return {
        OURS: lambda index: sized[index, index],
        WHOLE: lambda index: whole[index, index],
        THEIRS: lambda index: peer(Image.open(paths[index])),
    }


def milliseconds(read: Callable[[int], Any], index: int) -> float:
    started = time.perf_counter()
    read(index)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="of pictures that the JPEGs are made of")
    parser.add_argument("--count", type=int, default=40, help="of pictures of each size")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = run_facts() | {"image_size": arguments.image_size, "sizes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for size in SIZES:
            named = f"{size[0]} x {size[1]}"
            paths = make_jpegs(arguments.sources, arguments.count, Path(scratch) / named, size)
            readers = sides(paths, Path(scratch) / f"{named}.jsonl", arguments.image_size)
            took: dict[str, list[list[float]]] = {name: [[] for _ in paths] for name in readers}
            for turn in range(arguments.rounds):
                for index in range(len(paths)):
                    names = list(readers)
                    for name in names[turn % 3 :] + names[: turn % 3]:  # the first one of a picture finds it cold
                        took[name][index].append(milliseconds(readers[name], index))
            means = {name: statistics.fmean(map(statistics.median, rounds)) for name, rounds in took.items()}
            document["sizes"][named] = {name: round(mean, 2) for name, mean in means.items()}
            kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1000
            print(f"{named:12} {kilobytes:6.0f} kB  " + "  ".join(f"{n} {mean:.2f} ms" for n, mean in means.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
