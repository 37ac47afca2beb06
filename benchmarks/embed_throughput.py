"""Images per second of bulk embedding against a plain loop with the same model.

    python benchmarks/embed_throughput.py data/flickr8k/val-000000.tar [--model embedded] [--images 512] [--rounds 3]

The baseline decodes with Pillow, transforms, stacks batches of 32 and calls the model, one after another, with torch's
own threads: what a person would write first. Both sides see the same files; rounds alternate, and the medians and their
ratio are printed.
"""

import argparse
import io
import statistics
import time
from itertools import islice

import torch
from PIL import Image

from cots.data.samples import Sample, iter_samples
from cots.embed import embed
from cots.model.pretrained import load_model
from cots.model.retrieval_model import RetrievalModel

BATCH = 32


def plain_loop(samples: list[Sample], model: RetrievalModel) -> int:
    done = 0
    for start in range(0, len(samples), BATCH):
        pictures = [
            Image.open(io.BytesIO(sample.read_bytes())).convert("RGB") for sample in samples[start : start + BATCH]
        ]
        done += len(model.encode_images(torch.stack([model.transform(picture) for picture in pictures])))
    return done


def bulk(samples: list[Sample], model: RetrievalModel) -> int:
    return sum(1 for _ in embed(samples, model, on_error=print, batch_size=BATCH))


def rate(run: object, samples: list[Sample], model: RetrievalModel) -> float:
    started = time.perf_counter()
    assert callable(run)
    assert run(samples, model) == len(samples)
    return len(samples) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    samples = list(islice(iter_samples([arguments.source], print), arguments.images))
    for run in (plain_loop, bulk):
        run(samples[:BATCH], model)
    plain, ours = [], []
    for _ in range(arguments.rounds):
        plain.append(rate(plain_loop, samples, model))
        ours.append(rate(bulk, samples, model))
    print(
        f"{len(samples)} images, model {model.name}, {torch.get_num_threads()} torch threads, torch {torch.__version__}"
    )
    print(f"plain loop {statistics.median(plain):6.1f} img/s  ({min(plain):.1f} to {max(plain):.1f})")
    print(f"cots.embed {statistics.median(ours):6.1f} img/s  ({min(ours):.1f} to {max(ours):.1f})")
    print(f"ratio      {statistics.median(o / p for o, p in zip(ours, plain)):6.2f}")


if __name__ == "__main__":
    main()
