"""Clips: the model as it is, fine-tuned with the mean of frames, with a temporal transformer, and frozen features.

    python -m pretrain.frame_cache "data/clips/train-*.tar" --out data/frames/clips-train
    python -m pretrain.frame_cache "data/clips/val-*.tar" --out data/frames/clips-val
    python benchmarks/video_ablation.py --gpus 0 --per-gpu 5 --frames data/frames --out video_ablation.jsonl
    python benchmarks/video_ablation.py --table video_ablation.jsonl

An arm is configs/finetune_video_text.yaml with some settings changed. Trained arms are measured after the last step,
so no checkpoint is chosen on the validation clips. Runs that are in the output file already are not
repeated, unless they failed.

Measured, text to video and back, clips of one group relevant to each other's captions:
- all validation clips, and the real ones among them (their captions ranked over real clips only);
- the motion subset: clips whose caption has a word for motion, ranked among themselves, so that what stands in the
  picture helps less;
- order: of clips whose caption tells a course of events or a direction, the share that score higher than the same
  frames played backwards. The mean of frames cannot tell (0 %, ties do not count); chance is 50 %;
- photographs: Flickr8k's validation split, which fine-tuning on clips should not cost.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from run_facts import run_facts, shortened

CONFIG = Path(__file__).parents[1] / "configs" / "finetune_video_text.yaml"
TRANSFORMER = ["model.temporal.kind=transformer"]
FROZEN = [
    "model.image_tower.name=tf_efficientnet_lite0",
    "model.image_tower.image_size=224",
    "model.projection=mlp",
    "model.text_tower.tokenizer=runs/initial/minilm/tokenizer.json",
    "start={image_tower: runs/initial/tf_efficientnet_lite0.safetensors, text_tower: runs/initial/minilm}",
    "optimizer.image_tower_rate=0",
    "optimizer.text_tower_rate=0",
    "optimizer.learning_rate=1e-3",
    "training.epochs=20",
]
ARMS: dict[str, list[str] | None] = {
    "zero-shot": None,
    "frozen features": FROZEN,
    "mean": [],
    "temporal transformer": TRANSFORMER,
    "mean, no photographs": ["photographs=no"],
    "temporal transformer, no photographs": [*TRANSFORMER, "photographs=no"],
}
BY_DEFAULT = list(ARMS)[:4]
MOTION = re.compile(
    r"\b(walk|runs?\b|running|turn|mov(e|ing)|zoom|tilt|rotat|spin|orbit|fly|flies|fast|slow|forward|backward|clockwise|"
    r"jump|danc|bloom|time ?lapse|rid(e|ing)|driv|drove|rac(e|ing)|paus|laugh|cry|throw|fight|hugg|wrestl|eat|chew|"
    r"talk|smil|slic|pour|sit(s|ting)|rise|hit(s|ting))",
    re.IGNORECASE,
)
ORDER = re.compile(
    r"\b(then|finally|eventually|in the end|forward|backward|zoom|tilt|bloom|rise|rising|clockwise|begins)",
    re.IGNORECASE,
)


def measure(name: str, frames: Path, photographs: str) -> dict[str, Any]:
    """All figures of a model, by subset."""
    from cots.evaluation import evaluate
    from cots.evaluation.evaluation_set import EvaluationSet, read_evaluation_set
    from cots.model.pretrained import load_model

    model = load_model(name)
    clips = read_evaluation_set(next(iter(sorted(frames.glob("clips-val-*.tar")))))

    def only(kept: Any, label: str) -> EvaluationSet:
        return replace(clips, protocol=label, items=tuple(item for item in clips.items if kept(item)))

    sets = {
        "all": clips,
        "real": only(lambda item: item.sample.extra.get("kind") == "real", "real"),
        "motion": only(lambda item: MOTION.search(item.captions[0]), "motion"),
        "photographs": read_evaluation_set(photographs),
    }
    figures: dict[str, Any] = {"order": time_order(only(lambda item: ORDER.search(item.captions[0]), "order"), model)}
    for label, items in sets.items():
        result = evaluate.measure(items, model)
        figures[label] = {"items": len(items.items), "RSum": 0.0}
        for direction, metrics in result.directions.items():
            way = "text to item" if direction.startswith("text") else "item to text"
            figures[label][way] = {key: round(metrics[key], 2) for key in ("R@1", "R@5", "R@10", "MedR")}
            figures[label]["RSum"] += sum(metrics[key] for key in ("R@1", "R@5", "R@10"))
    return figures


def time_order(items: Any, model: Any) -> dict[str, float]:
    """Percentage of clips whose caption is nearer to them than to the same frames played backwards."""
    import torch

    right = 0
    texts = model.encode_texts([item.captions[0] for item in items.items])
    for item, text in zip(items.items, texts):
        shown = items.frames.read(item.sample, model.image_size)
        frames = model.encode_images(torch.stack([model.transform(image) for image in shown.images])).numpy()
        forwards, backwards = (text.numpy() @ model.pool_frames(part) for part in (frames, frames[::-1].copy()))
        right += bool(forwards > backwards + 1e-6)
    return {"items": len(items.items), "accuracy": round(100 * right / max(len(items.items), 1), 1)}


def run(name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train one arm with one seed and measure it; the error in its place if it fails."""
    from cots.config import read_config  # after the worker's GPU is chosen
    from cots.errors import CotsError
    from pretrain.trainer import pretrain

    started = time.perf_counter()
    arm = ARMS[name]
    try:
        if arm is None:
            return {"arm": name, "seed": seed, "seconds": 0.0, **measure(given.model, given.frames, given.photographs)}
        directory = given.runs / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
        photographs = "" if "photographs=no" in arm else f", {{path: '{given.train_photographs}', weight: 0.25}}"
        overrides = [
            f"data.train=[{{path: '{given.frames}/clips-train-*.tar'}}{photographs}]",
            f"data.validation=[{{path: '{given.frames}/clips-val-*.tar'}}]",
            f"start.model={given.model}",
            *(override for override in arm if override != "photographs=no"),
            *given.set,
            f"training.seed={seed}",
            f"training.output={directory}",
            "training.validate_every=0",
            "training.checkpoint_every=1000",
        ]
        settings = read_config(given.config, overrides)
        pretrain(settings)
        figures = measure(str(directory), given.frames, given.photographs)
    except (CotsError, RuntimeError) as error:
        return {"arm": name, "seed": seed, "error": str(error)[:600]}
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    rate = statistics.median(row["pairs_per_second"] for row in rows if "loss" in row)
    seconds = round(time.perf_counter() - started, 1)
    return {
        "arm": name,
        "seed": seed,
        "overrides": [shortened(override, Path.cwd()) for override in [*arm, *given.set]],
        "sources": [shortened(source.path, Path.cwd()) for source in settings.data.train],
        "seconds": seconds,
        "pairs_per_second": round(rate, 1),
        **figures,
    }


def serve(gpu: str, jobs: Any, results: Any, given: argparse.Namespace) -> None:
    """A worker process: one arm after another on its GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    given.runs.mkdir(parents=True, exist_ok=True)
    sys.stderr = (given.runs / f"worker-{os.getpid()}.log").open("w", buffering=1)
    while (job := jobs.get()) is not None:
        name, seed = job
        results.put({"gpu": gpu, **run(name, seed, given)})


def table(results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    columns = [
        *(
            (subset, way, metric)
            for subset in ("all", "real")
            for way in ("text to item",)
            for metric in ("R@1", "R@5", "R@10")
        ),
        ("all", "item to text", "R@1"),
        ("motion", "text to item", "R@1"),
        ("motion", "text to item", "R@5"),
        ("order", "accuracy"),
        ("photographs", "text to item", "R@1"),
        ("photographs", "RSum"),
    ]
    header = [" ".join(column).replace("text to item", "t2v").replace("item to text", "v2t") for column in columns]
    lines = ["| arm | seeds | " + " | ".join(header) + " |", "|---" * (len(header) + 2) + "|"]
    for name in dict.fromkeys(result["arm"] for result in results):
        own = [result for result in results if result["arm"] == name and "error" not in result]
        cells = []
        for column in columns:
            values = [_at(result, column) for result in own]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "failed")
        lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _at(result: dict[str, Any], keys: tuple[str, ...]) -> float:
    value: Any = result
    for key in keys:
        value = value[key]
    return float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", default=BY_DEFAULT, choices=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--gpus", nargs="*", default=["0"])
    parser.add_argument("--per-gpu", type=int, default=3, help="runs that share a GPU, of up to 22 GB each")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--model", default="embedded", help="to start from")
    parser.add_argument(
        "--frames", type=Path, default=Path("data/frames"), help="of clips-train-*.tar, clips-val-*.tar"
    )
    parser.add_argument("--train-photographs", default="data/flickr8k/train-*.tar")
    parser.add_argument("--photographs", default="data/flickr8k/val-000000.tar", help="for measuring")
    parser.add_argument("--set", nargs="*", default=[], help="settings changed in every arm")
    parser.add_argument("--runs", type=Path, default=Path("runs/video_ablation"))
    parser.add_argument("--out", type=Path, default=Path("video_ablation.jsonl"))
    parser.add_argument("--table", type=Path, help="only print the table of this file")
    given = parser.parse_args()
    if given.table:
        print(table([json.loads(line) for line in given.table.read_text().splitlines()]))
        return
    done = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    known = {(result["arm"], result["seed"]) for result in done if "error" not in result}
    wanted = [
        (name, seed) for seed in given.seeds for name in given.arms if ARMS[name] is not None or seed == given.seeds[0]
    ]
    missing = [job for job in wanted if job not in known]
    facts = run_facts()
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    for job in missing:
        jobs.put(job)
    # else each run starts a thread for every core, and all of them wait for each other
    threads = max(len(os.sched_getaffinity(0)) // (len(given.gpus) * given.per_gpu), 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    for gpu in given.gpus:
        for _ in range(given.per_gpu):
            context.Process(target=serve, args=(gpu, jobs, results, given)).start()
            jobs.put(None)
    for _ in missing:
        result = results.get() | {"run": facts}
        done.append(result)
        with given.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(result.get("error") or f"{result['arm']} {result['seed']}: {result['all']}", flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
