"""What each level of the objective brings: every arm from the same start, on the same number of samples, several seeds.

    python benchmarks/ablation.py --gpus 0 1 --per-gpu 3 --seeds 0 1 2 --out ablation.jsonl
    python benchmarks/ablation.py --arms "contrastive only" "cooler: objective.temperature=0.07" --set training.epochs=8
    python benchmarks/ablation.py --table ablation.jsonl

An arm is configs/ablation.yaml with some settings changed: one of those below, or `NAME: key=value ...`. Arms whose
names end in `, noisy` see shards in which a fifth of all captions are exchanged between pictures. Recall is that of the
averaged weights after the last step: no checkpoint is chosen, so validation pairs play no part in an arm. Runs that are
in the output file already are not repeated, unless they failed. A row says the sources that it was trained on, and how
it was run.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from run_facts import run_facts, shortened

CONFIG = Path(__file__).parents[1] / "configs" / "ablation.yaml"
QUEUES = ["objective.contrastive.queue_size=12800"]
TOKENS = [
    "objective.masked_modeling.image_weight=0.05",
    "objective.masked_modeling.text_weight=0.2",
]
ALIGNMENT = ["objective.task_alignment.weight=0.1"]
FILTER = ["objective.noise_filter.queue_size=6000", "objective.noise_filter.deviations=0.5"]
STRONGER = [
    "objective.masked_modeling.image_weight=0.1",
    "objective.masked_modeling.text_weight=0.5",
    "objective.task_alignment.weight=0.3",
]
MIXTURE = ["objective.noise_filter.queue_size=6000", "objective.noise_filter.rule=mixture"]
LEVELS: dict[str, list[str]] = {
    "contrastive only": [],
    "+ momentum queues": QUEUES,
    "+ masked modelling": TOKENS,
    "+ task alignment": ALIGNMENT,
    "+ noise filter": FILTER,
    "all together": [*QUEUES, *TOKENS, *ALIGNMENT, *FILTER],
}
ARMS = LEVELS | {  # named with --arms
    "all together, mixture": [*QUEUES, *TOKENS, *ALIGNMENT, *MIXTURE],
    "stronger levels": [*QUEUES, *STRONGER, *FILTER],
    "stronger levels, mixture": [*QUEUES, *STRONGER, *MIXTURE],
}
NOISE = 0.2
SHARDS = Path("data/flickr8k")


def write_noisy_shards(shards: Iterable[Path], out: Path, share: float, seed: int = 0) -> None:
    """Copy webdataset shards with `share` of all captions exchanged between items, none left in its place."""
    out.mkdir(parents=True, exist_ok=True)
    members = {shard: _members(shard) for shard in shards}
    captions: list[tuple[Path, str, int]] = [
        (shard, name, place)
        for shard, files in members.items()
        for name, content in files.items()
        if name.endswith(".json")
        for place in range(len(json.loads(content)["captions"]))
    ]
    random = np.random.default_rng(seed)
    chosen = [captions[index] for index in random.permutation(len(captions))[: round(share * len(captions))]]
    documents = {(shard, name): json.loads(members[shard][name]) for shard, name, _ in captions}
    texts = [documents[shard, name]["captions"][place] for shard, name, place in chosen]
    for (shard, name, place), text in zip(chosen, texts[1:] + texts[:1]):
        documents[shard, name]["captions"][place] = text
    for shard, files in members.items():
        with tarfile.open(out / shard.name, "w") as tar:
            for name, content in files.items():
                document = documents.get((shard, name))
                content = json.dumps(document).encode() if document else content
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def settings_of(arm: str) -> tuple[str, list[str]]:
    """The name of an arm and its settings, given as `NAME` of ARMS or as `NAME: key=value key=value`."""
    name, colon, given = arm.partition(": ")
    return name, given.split() if colon else ARMS[name.removesuffix(", noisy")]


def run(name: str, overrides: list[str], seed: int, runs: Path, config: Path) -> dict[str, Any]:
    """Train one arm with one seed, and read its last validation."""
    from cots.config import read_config  # after the worker's GPU is chosen
    from cots.errors import CotsError
    from pretrain.trainer import pretrain

    directory = runs / f"{name.replace(' ', '_').replace('+', 'plus').replace(',', '')}_{seed}"
    started = time.perf_counter()
    try:
        settings = read_config(config, [*overrides, f"training.seed={seed}", f"training.output={directory}"])
        pretrain(settings)
    except (CotsError, RuntimeError) as error:
        return {"arm": name, "seed": seed, "error": str(error)[:600]}
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    metrics = next(iter(rows[-1]["validation"].values()))
    steps = [row for row in rows if "loss" in row]
    return {
        "arm": name,
        "seed": seed,
        "overrides": [shortened(override, Path.cwd()) for override in overrides],
        "sources": [shortened(source.path, Path.cwd()) for source in settings.data.train],
        "seconds": round(time.perf_counter() - started, 1),
        "pairs_per_second": round(statistics.median(row["pairs_per_second"] for row in steps), 1),
        "filter_kept": steps[-1].get("filter_kept"),
        **{f"{way}/{metric}": metrics[way][metric] for way in metrics for metric in ("R@1", "R@5", "R@10")},
    }


def serve(gpu: str, jobs: Any, results: Any, runs: Path, config: Path) -> None:
    """A worker process: one arm after another on its GPU. What CUDA's libraries prepare for a network's shapes, a
    minute's work for a convolutional one, is then done once."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    runs.mkdir(parents=True, exist_ok=True)
    sys.stderr = (runs / f"worker-{os.getpid()}.log").open("w", buffering=1)
    while (job := jobs.get()) is not None:
        name, overrides, seed = job
        results.put({"gpu": gpu, **run(name, overrides, seed, runs, config)})


def table(results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    ways = ("text_to_image", "image_to_text")
    header = [f"{way.replace('_', ' ')} {metric}" for way in ways for metric in ("R@1", "R@5", "R@10")]
    lines = ["| arm | seeds | " + " | ".join(header) + " |", "|---" * (len(header) + 2) + "|"]
    for name in dict.fromkeys(result["arm"] for result in results):
        own = [result for result in results if result["arm"] == name and "error" not in result]
        cells = []
        for way in ways:
            for metric in ("R@1", "R@5", "R@10"):
                values = [result[f"{way}/{metric}"] for result in own]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "failed")
        lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms", nargs="*", help="by default the levels; `, noisy` may be added to a name, settings after a colon"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--gpus", nargs="*", default=["0"])
    parser.add_argument("--per-gpu", type=int, default=2, help="runs that share a GPU")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--set", nargs="*", default=[], help="settings changed in every arm")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--out", type=Path, default=Path("ablation.jsonl"))
    parser.add_argument("--table", type=Path, help="only print the table of this file")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for line in arguments.table.read_text().splitlines()]))
        return
    given = arguments.arms or [*LEVELS, "contrastive only, noisy", "+ noise filter, noisy", "all together, noisy"]
    settings = dict(map(settings_of, given))
    names = list(settings)
    if any(name.endswith(", noisy") for name in names):
        write_noisy_shards(sorted(SHARDS.glob("train-*.tar")), arguments.runs / "noisy", NOISE)
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    known = {(result["arm"], result["seed"]) for result in done if "error" not in result}
    facts = run_facts()
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    count = 0
    for seed in arguments.seeds:
        for name in names:
            if (name, seed) not in known:
                overrides = [*settings[name], *arguments.set]
                if name.endswith(", noisy"):
                    overrides.append(f"data.train=[{{path: '{arguments.runs}/noisy/train-*.tar'}}]")
                jobs.put((name, overrides, seed))
                count += 1
    # else each run starts a thread for every core, and all of them wait for each other
    threads = max(len(os.sched_getaffinity(0)) // (len(arguments.gpus) * arguments.per_gpu), 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    workers = [
        context.Process(target=serve, args=(gpu, jobs, results, arguments.runs, arguments.config))
        for gpu in arguments.gpus
        for _ in range(arguments.per_gpu)
    ]
    for worker in workers:
        worker.start()
        jobs.put(None)
    for _ in range(count):
        result = results.get() | {"run": facts}
        done.append(result)
        with arguments.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(result.get("error") or f"{result['arm']} {result['seed']}: {result['text_to_image/R@1']:.1f}", flush=True)
    print(table(done))


def _members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        files = ((member.name, tar.extractfile(member)) for member in tar if member.isfile())
        return {name: file.read() for name, file in files if file is not None}


if __name__ == "__main__":
    main()
