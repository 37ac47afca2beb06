"""Pictures, or clips, a second from files on disk to vectors, against plain loops with the same model.

    python benchmarks/embed_throughput.py SOURCE... [--model embedded] [--images 512] [--rounds 3] [--json OUT]
    python benchmarks/embed_throughput.py SOURCE... --make-jpegs 512 DIR --model open_clip_vit_b16
    python benchmarks/embed_throughput.py SOURCE... --make-jpegs 48000 DIR --model vit_b16 --batches 64 128 256
    python benchmarks/embed_throughput.py 'data/clips/val-*.tar' --videos

The plain loops are what a person would write first: Pillow decodes, the transform scales, 32 pictures are stacked and
encoded, one step after another, with torch's own threads. "open_clip loop" is open_clip's own model, preprocessing and
normalisation; "plain loop, as trained" the encoder in float32 as a training left it; "plain loop" calls the model that
`load_model` gives. All sides see the same files, of a warm page cache, in alternating rounds; the ratio is that of the
best rounds, which other programs on the machine disturbed least; "cores" are seconds of processors a second.
`vit_b16` and `open_clip_vit_b16` have random weights, which cost the same. `--make-jpegs N DIR` first writes N JPEGs
made of the sources (640 x 480, or with `--mixed` five sizes) and embeds those.

On a GPU also: parity with the float32 plain loop, and the stages alone.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fabricated_jpegs import make_jpegs
from PIL import Image
from run_facts import run_facts
from torch import Tensor

from cots.config import ModelConfig
from cots.data.decode_ahead import FILES_A_GPU_JOB, MediaDecoder, content_hash
from cots.data.device_turns import DeviceTurns
from cots.data.frame_sampling import EVERY_SECOND
from cots.data.gpu_jpeg import gpu_jpeg_decoder
from cots.data.image_io import open_image
from cots.data.jpeg_header import read_baseline
from cots.data.samples import Sample, iter_samples
from cots.embed import CPU_BATCH, GPU_BATCH, GPU_ENCODERS, cores, embed
from cots.embedded import EMBEDDED_MODEL
from cots.model.dual_encoder import DualEncoder
from cots.model.model_directory import open_saved_model, read_model, save_model
from cots.model.pretrained import load_model, model_directory
from cots.model.retrieval_model import CotsModel, RetrievalModel
from cots.single_core import single_core_threads
from cots.stopwatch import Stopwatch

PLAIN_BATCH = 32
PLAIN_ON_GPU = 512  # pictures; the plain loop is fifty times as slow there
Encode = Callable[[Tensor], Tensor]
Side = Callable[[list[Sample]], int]


def named_model(name: str, scratch: Path) -> str:
    """What `load_model` takes for a name of the command line; models with random weights are written to `scratch`."""
    if name == "vit_b16":
        saved = open_saved_model(EMBEDDED_MODEL)
        settings = saved.config.model_dump()
        settings["image_tower"] |= {"name": "vit_base_patch16_224", "image_size": 224, "pooling": "cls"}
        encoder = DualEncoder(ModelConfig.model_validate(settings))
        save_model(scratch, encoder, saved.tokenizer)
        return str(scratch)
    if name == "open_clip_vit_b16":
        import open_clip

        weights = scratch / "weights.pt"
        torch.save(open_clip.create_model("ViT-B-16").state_dict(), weights)
        return f"open_clip:ViT-B-16/{weights}"
    return name


def plain_loop(samples: list[Sample], model: RetrievalModel, encode: Encode) -> np.ndarray:
    """(N, D) vectors."""
    vectors = []
    for start in range(0, len(samples), PLAIN_BATCH):
        part = samples[start : start + PLAIN_BATCH]
        pictures = [open_image(sample.read_bytes()) for sample in part]
        vectors.append(encode(torch.stack([model.transform(picture) for picture in pictures])).cpu().numpy())
    return np.concatenate(vectors)


def as_trained(name: str, device: torch.device) -> Encode:
    """The encoder of a model directory as training left it: float32, no batch norm folded."""
    encoder = read_model(model_directory(name))[0].to(device)

    def encode(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            return encoder.encode_image(pixels.to(device)).embedding

    return encode


def open_clip_loop(name: str, device: torch.device) -> Side:
    """open_clip's own model and preprocessing, as its README writes the loop."""
    import open_clip

    architecture, _, weights = name.removeprefix("open_clip:").partition("/")
    model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=weights, device=device)
    model.eval()

    def run(samples: list[Sample]) -> int:
        done = 0
        for start in range(0, len(samples), PLAIN_BATCH):
            part = samples[start : start + PLAIN_BATCH]
            pixels = torch.stack([preprocess(Image.open(sample.path)) for sample in part]).to(device)
            with torch.no_grad(), torch.autocast(device.type, enabled=device.type == "cuda"):
                features = model.encode_image(pixels)
                done += len((features / features.norm(dim=-1, keepdim=True)).cpu())
        return done

    return run


def photo_sides(name: str, model: RetrievalModel, batches: list[int]) -> dict[str, Side]:
    sides: dict[str, Side] = {}
    few = PLAIN_ON_GPU if model.device.type == "cuda" else sys.maxsize
    if isinstance(model, CotsModel):
        unfolded = as_trained(name, model.device)
        sides["plain loop, as trained"] = lambda part: len(plain_loop(part[:few], model, unfolded))
    else:
        whole = open_clip_loop(name, model.device)
        sides["open_clip loop"] = lambda part: whole(part[:few])
    plain = load_model(name, str(model.device))  # in float32 on a CPU
    sides["plain loop"] = lambda part: len(plain_loop(part[:few], model, plain.encode_images))
    sides["decoding alone"] = lambda part: decode_alone(part, model)
    for batch in batches:
        sides[f"model alone, batch {batch}"] = partial(model_alone, model, batch)
        sides[f"cots.embed, batch {batch}"] = partial(bulk_embedding, model, batch)
    return sides


def bulk_embedding(model: RetrievalModel, batch: int, samples: list[Sample]) -> int:
    return sum(1 for _ in embed(samples, model, on_error=print, batch_size=batch))


def decode_alone(samples: list[Sample], model: RetrievalModel) -> int:
    """Files to pixels for the model, on all cores or by the GPU's decoder, as `embed` has it done."""
    jpegs = gpu_jpeg_decoder(model.square, model.device)
    decoder = MediaDecoder(model.square, EVERY_SECOND, cores(), GPU_BATCH, jpegs, Stopwatch())
    return sum(1 for _ in decoder.decode(samples))


def model_alone(model: RetrievalModel, batch: int, samples: list[Sample]) -> int:
    """Pixels that lie on the device to vectors, as many as there are samples, with as many threads as `embed` has."""
    pixels = torch.randint(0, 256, (batch, 3, model.image_size, model.image_size), dtype=torch.uint8)
    pixels, turns = pixels.to(model.device), DeviceTurns(model.device, GPU_ENCODERS)
    threads = torch.get_num_threads() if model.device.type == "cpu" else GPU_ENCODERS

    def encode(_: int) -> int:
        if model.device.type == "cpu":
            return len(model.encode_images(pixels))
        with turns.turn():
            return len(model.encode_images(pixels))

    with single_core_threads(threads, "encode") as pool:
        return sum(pool.map(encode, range(-(-len(samples) // batch))))


def gpu_jpeg_sides(samples: list[Sample], model: RetrievalModel) -> dict[str, float]:
    """Pictures a second of nvJPEG alone, and of nvJPEG and resizing with three threads, from bytes in memory."""
    contents = [sample.read_bytes() for sample in samples[:4096]]
    headers = [read_baseline(content) for content in contents]
    files = [(content, header) for content, header in zip(contents, headers) if header is not None]
    jobs = [files[start : start + FILES_A_GPU_JOB] for start in range(0, len(files), FILES_A_GPU_JOB)]
    decoder = gpu_jpeg_decoder(model.square, model.device)
    assert decoder is not None, "neither TorchCodec nor torchvision decodes JPEGs on this GPU"

    def raw(job: list[Any]) -> None:
        encoded = [torch.frombuffer(content, dtype=torch.uint8) for content, _ in job]
        decoder.library.decode(encoded, model.device)

    rates: dict[str, float] = {}
    for name, work, threads in (("nvJPEG alone", raw, 1), ("nvJPEG and resizing", decoder.decode, 3)):
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, jobs[:4]))
            torch.cuda.synchronize()
            started = time.perf_counter()
            list(pool.map(work, jobs))
            rates[name] = len(files) / (time.perf_counter() - started)
    return rates


def where_time_goes(samples: list[Sample], model: RetrievalModel, batch: int) -> dict[str, float]:
    """Of a run of `embed`: threads at work on each kind, on average; all of them at work means that it is the brake."""
    stopwatch = Stopwatch()
    started = time.perf_counter()
    for _ in embed(samples, model, on_error=print, batch_size=batch, stopwatch=stopwatch):
        pass
    seconds = time.perf_counter() - started
    return {f"threads {kind}": spent / seconds for kind, spent in stopwatch.seconds.items()}


def parity(name: str, samples: list[Sample], model: RetrievalModel) -> dict[str, float]:
    """Cosines of `embed`'s vectors with those of Pillow and the encoder as trained, in float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    wanted = plain_loop(samples[:PLAIN_ON_GPU], model, as_trained(name, model.device))
    found = np.concatenate([item.vectors for item in embed(samples[:PLAIN_ON_GPU], model, on_error=print)])
    cosines = (wanted * found).sum(axis=1)
    return {"smallest cosine": float(cosines.min()), "mean cosine": float(cosines.mean())}


def video_stages(samples: list[Sample], model: RetrievalModel) -> dict[str, float]:
    """Milliseconds a clip of each stage, one after another on one thread (encoding on all)."""
    seconds: dict[str, float] = dict.fromkeys(("decode", "resize", "hash", "encode"), 0.0)
    for sample in samples:
        marks = [time.perf_counter()]
        frames = EVERY_SECOND.read(sample, model.image_size)
        marks.append(time.perf_counter())
        pixels = torch.stack([model.transform(picture) for picture in frames.images])
        marks.append(time.perf_counter())
        content_hash(sample)
        marks.append(time.perf_counter())
        model.encode_images(pixels)
        marks.append(time.perf_counter())
        for stage, begun, ended in zip(seconds, marks, marks[1:]):
            seconds[stage] += ended - begun
    return {f"{stage}, ms a clip": 1000 * spent / len(samples) for stage, spent in seconds.items()}


def video_sides(model: RetrievalModel, batches: list[int]) -> dict[str, Side]:
    def plain(samples: list[Sample]) -> int:
        for sample in samples:
            pictures = EVERY_SECOND.read(sample, model.image_size).images
            model.encode_images(torch.stack([model.transform(picture) for picture in pictures]))
        return len(samples)

    sides: dict[str, Side] = {"plain loop": plain, "decoding alone": lambda part: decode_alone(part, model)}
    for batch in batches:
        sides[f"cots.embed, batch {batch}"] = partial(bulk_embedding, model, batch)
    return sides


def measure(sides: dict[str, Side], samples: list[Sample], rounds: int, warm_up: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"side": name, "rates": [], "cores": []} for name in sides]
    for run in sides.values():
        run(samples[:warm_up])
    for _ in range(rounds):
        for row, run in zip(rows, sides.values()):
            used, started = time.process_time(), time.perf_counter()
            done = run(samples)
            seconds = time.perf_counter() - started
            row["rates"].append(done / seconds)
            row["cores"].append((time.process_time() - used) / seconds)
    for row in rows:
        row["rate"], row["cores"] = statistics.median(row["rates"]), statistics.median(row["cores"])
    return rows


def print_table(rows: list[dict[str, Any]], unit: str) -> None:
    ours = max((row for row in rows if row["side"].startswith("cots.embed")), key=lambda row: max(row["rates"]))
    print(f"{unit:28}{'best':>9}{'median':>9}{'worst':>9}{'cores':>7}   {ours['side']} is")
    for row in rows:
        best, ratio = max(row["rates"]), max(ours["rates"]) / max(row["rates"])
        print(
            f"{row['side']:28}{best:9.2f}{row['rate']:9.2f}{min(row['rates']):9.2f}{row['cores']:7.1f}   {ratio:.2f} x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--images", type=int, help="so many of the files; by default 512, or all JPEGs made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--make-jpegs", nargs=2, metavar=("N", "DIR"))
    parser.add_argument("--mixed", action="store_true", help="JPEGs of five sizes, not one")
    parser.add_argument("--videos", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ran = run_facts()
    with ExitStack() as stack:
        name = named_model(arguments.model, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        model = load_model(name, bulk=True)
        on_gpu = model.device.type == "cuda"
        sources = arguments.sources
        if arguments.make_jpegs:
            count, folder = arguments.make_jpegs
            make_jpegs(sources, int(count), Path(folder), None if arguments.mixed else (640, 480))
            sources = [folder]
        started = time.perf_counter()
        most = arguments.images or int((arguments.make_jpegs or ["512"])[0])
        samples = list(islice(iter_samples(sources, print), most))
        listing = len(samples) / (time.perf_counter() - started)
        batches = arguments.batches or [GPU_BATCH if on_gpu else CPU_BATCH]
        warm_up = 2000 if on_gpu else 2 * CPU_BATCH
        facts: dict[str, Any] = {"files listed a second": listing}
        if arguments.videos:
            rows = measure(video_sides(model, batches), samples, arguments.rounds, warm_up)
            facts |= video_stages(samples, model)
        else:
            rows = measure(photo_sides(name, model, batches), samples, arguments.rounds, warm_up)
            if on_gpu:
                facts |= gpu_jpeg_sides(samples, model) | where_time_goes(samples, model, batches[0])
            if isinstance(model, CotsModel):
                facts |= parity(name, samples, model)
    device = torch.cuda.get_device_name(model.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    size = statistics.mean(sample.size for sample in samples) / 1000
    setting = {
        **ran,
        "device": device,
        "cores": cores(),
        "model": arguments.model,
        "samples": len(samples),
        "kilobytes": size,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps({**setting, "rows": rows, "facts": facts}, indent=1) + "\n")
    print(f"{len(samples)} files of {size:.0f} KB, {arguments.model}, {device}, torch {torch.__version__}")
    for fact, value in facts.items():
        print(f"{fact:28}{value:10.4g}")
    print_table(rows, "clips/s" if arguments.videos else "img/s")


if __name__ == "__main__":
    main()
