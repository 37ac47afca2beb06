"""Images per second of bulk embedding against a plain loop with the same model.

    python benchmarks/embed_throughput.py data/flickr8k/val-000000.tar [--model embedded] [--images 512] [--rounds 3]

The baseline decodes with Pillow, transforms, stacks batches of 32 and calls the model, one after another, with torch's
own threads: what a person would write first; once with the encoder as trained, once as `load_model` gives it (batch
norms folded). All sides see the same files; rounds alternate, and medians and ratios are printed.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from itertools import islice

import torch
from PIL import Image

from cots.data.samples import Sample, iter_samples
from cots.embed import embed
from cots.model.model_directory import read_model
from cots.model.pretrained import load_model, model_directory
from cots.model.retrieval_model import CotsModel, RetrievalModel

BATCH = 32


Encode = Callable[[torch.Tensor], torch.Tensor]


def plain_loop(samples: list[Sample], model: RetrievalModel, encode: Encode) -> int:
    done = 0
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        pictures = [Image.open(io.BytesIO(sample.read_bytes())).convert("RGB") for sample in part]
        done += len(encode(torch.stack([model.transform(picture) for picture in pictures])))
    return done


def as_trained(name: str) -> Encode:
    """The encoder of a model directory as training left it, no batch norm folded."""
    encoder = read_model(model_directory(name))[0]

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return encoder.encode_image(pixels).embedding

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    samples = list(islice(iter_samples([arguments.source], print), arguments.images))
    sides: dict[str, Callable[[list[Sample]], int]] = {
        "plain loop": lambda part: plain_loop(part, model, model.encode_images),
        "cots.embed": lambda part: sum(1 for _ in embed(part, model, on_error=print)),
    }
    if isinstance(model, CotsModel):
        unfolded = as_trained(arguments.model)
        sides = {"plain loop, as trained": lambda part: plain_loop(part, model, unfolded), **sides}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run(samples[:BATCH])
    for _ in range(arguments.rounds):
        for name, run in sides.items():
            started = time.perf_counter()
            assert run(samples) == len(samples)
            rates[name].append(len(samples) / (time.perf_counter() - started))
    print(f"{len(samples)} images, model {model.name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, values in rates.items():
        ratio = statistics.median(ours / one for ours, one in zip(rates["cots.embed"], values))
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"{name:22} {statistics.median(values):6.1f} img/s ({spread}); cots.embed is {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
