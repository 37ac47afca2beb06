"""The msrvtt_1ka protocol at its real size, on generated clips: does it run, how long does it take, and where.

    python benchmarks/msrvtt_path.py --lists data/msrvtt --data runs/msrvtt --workers 16            # 1,000 clips
    python benchmarks/msrvtt_path.py --lists data/msrvtt --data runs/msrvtt-few --clips 20

Writes clips of 10 to 30 seconds at 320 x 240 and 8 to 25 frames a second, named as the real 1k-A list names them, in
H.264 (most of them, as MSR-VTT's), HEVC, MPEG-4 and VP9, one of them cut in half on purpose; those that are there
already stay. Then the protocol runs: 12 frames a clip, ViT-B/16 at 224 px and BERT-base with random weights (or
`--model`). The clips have nothing to do with their captions, so no recall is printed.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_facts import run_facts

from cots.config import ModelConfig
from cots.embedded import EMBEDDED_MODEL
from cots.evaluation.annotations import jsfusion
from cots.evaluation.evaluate import EvaluationResult, measure
from cots.evaluation.evaluation_set import EvaluationSet
from cots.evaluation.protocols import PROTOCOLS, open_protocol
from cots.model.dual_encoder import DualEncoder
from cots.model.model_directory import open_saved_model, save_model
from cots.model.pretrained import load_model

LIST = "MSRVTT_JSFUSION_test.csv"
WIDTH, HEIGHT = 320, 240
CODECS: Sequence[tuple[str, dict[str, str]]] = (
    ("libx264", {"preset": "veryfast"}),
    ("libx264", {"preset": "veryfast", "g": "12"}),
    ("libx264", {"preset": "veryfast", "profile": "baseline"}),
    ("libx265", {"preset": "ultrafast", "x265-params": "log-level=error:pools=1"}),
    ("mpeg4", {"b": "800k"}),
    ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "b": "500k"}),
)
BROKEN = 7  # the number of the clip that is cut in half


def write_clip(path: Path, number: int) -> Path:
    """A texture that drifts, with noise: codec, length, rate and motion depend on `number`."""
    import av

    if path.exists():
        return path
    random = np.random.default_rng(number)
    codec, options = CODECS[number % len(CODECS)]
    rate, seconds = int(random.integers(8, 26)), float(random.uniform(10, 30))
    coarse = random.integers(0, 256, (12, 16), dtype=np.uint8).repeat(40, axis=0).repeat(40, axis=1)
    texture = (coarse * 0.8 + random.integers(0, 50, coarse.shape)).astype(np.uint8)
    colors = random.integers(60, 200, (2, HEIGHT // 2, 1), dtype=np.uint8).repeat(WIDTH // 2, axis=2)
    speed = random.integers(-4, 5, 2)
    scratch = path.with_suffix(".part")
    with av.open(str(scratch), "w", format="mp4" if codec != "libvpx-vp9" else "webm") as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for place in range(round(rate * seconds)):
            light = np.roll(texture, tuple(place * speed), axis=(0, 1))[:HEIGHT, :WIDTH]
            planes = np.concatenate([light, colors.reshape(-1, WIDTH)])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())
    if number == BROKEN:
        os.truncate(scratch, scratch.stat().st_size // 2)  # an mp4 whose index, at its end, is gone
    return scratch.replace(path)


def generate(lists: Path, data: Path, clips: int, workers: int) -> None:
    """Write the list and the first `clips` clips of it."""
    data.mkdir(parents=True, exist_ok=True)
    header, *rows = (lists / LIST).read_text(encoding="utf-8").splitlines()
    (data / LIST).write_text("\n".join([header, *rows[:clips]]) + "\n", encoding="utf-8")
    names = list(jsfusion([data / LIST]))
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(write_clip, [data / f"{name}.mp4" for name in names], range(len(names))))


def base_model(directory: Path) -> str:
    """ViT-B/16 and BERT-base with random weights, and the embedded model's tokenizer."""
    if not directory.exists():
        image = {"name": "vit_base_patch16_224"}
        config = ModelConfig.model_validate({"image_tower": image, "text_tower": {"vocabulary": 30522}})
        save_model(directory, DualEncoder(config), open_saved_model(EMBEDDED_MODEL).tokenizer, weights_dtype="float16")
    return str(directory)


def test_set(data: Path, clips: int) -> EvaluationSet:
    """The protocol; with fewer clips one like it, whose list is the beginning of the real one."""
    protocol = PROTOCOLS["msrvtt_1ka"]
    if clips < protocol.items:
        name = f"the first {clips} clips of msrvtt_1ka"
        protocol = replace(protocol, name=name, items=clips, captions=clips, ids_digest="")
    return open_protocol(protocol, data)


def report(result: EvaluationResult, generating: float) -> str:
    seconds = result.seconds
    lines = [
        f"{result.test_set.protocol}: {len(result.test_set.items)} clips, {result.test_set.frames.count} frames each, "
        f"{result.device}, {os.cpu_count()} cores, torch {torch.__version__}, {result.date}",
        f"clips written in {generating:.0f} s (not part of the protocol)",
        *(f"cannot be read, counted as never found: {name}: {reason}" for name, reason in result.failures.items()),
        "| decoding, all threads | encoding | captions | scoring | by the clock |",
        "|---|---|---|---|---|",
        f"| {seconds['decoding']:.1f} s | {seconds['encoding']:.1f} s | {seconds['captions']:.1f} s | "
        f"{seconds['scoring']:.2f} s | {seconds['total']:.1f} s |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=Path, required=True, help=f"folder with the real {LIST}")
    parser.add_argument("--data", type=Path, required=True, help="folder to write the clips to")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that write clips")
    parser.add_argument("--model", help="by default ViT-B/16 with BERT-base, random weights")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    facts = run_facts()
    started = time.perf_counter()
    generate(given.lists, given.data, given.clips, given.workers)
    generating = time.perf_counter() - started
    model = load_model(given.model or base_model(given.data / "model"))
    result = measure(test_set(given.data, given.clips), model, max_bad_share=max(0.01, 1.5 / given.clips))
    print(report(result, generating))
    if given.json:
        facts |= {"clips": given.clips, "device": result.device, "clips_written_s": round(generating, 1)}
        facts |= {"seconds": result.seconds, "failures": result.failures}
        given.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
