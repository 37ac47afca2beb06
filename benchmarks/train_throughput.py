"""Training steps on one GPU: pairs per second, model-FLOP utilisation and peak memory, each beside open_clip's.

    python benchmarks/train_throughput.py --tokenizer vocab.txt                            # one GPU, synthetic data
    python benchmarks/train_throughput.py --tokenizer vocab.txt --shards 'train-*.tar'     # decoded from disk too
    torchrun --nproc-per-node 2 benchmarks/train_throughput.py --tokenizer vocab.txt --only "every level"
    python benchmarks/train_throughput.py --tokenizer vocab.txt --config configs/cots_large.yaml --batch 128 --only ...
    python benchmarks/train_throughput.py --tokenizer vocab.txt --only --shards 'train-*.tar' --gpus 2

Pixels and word pieces are random and lie on the GPU. Every row is a process of its own, so that memory and compiled
code of one do not help another. Utilisation is the FLOPs of the maths that must be done (counted by
pretrain/flops.py) over the rate of a bf16 matrix product of 8192 x 8192, measured in the same process just before the
steps, when the GPU is as warm as they will find it. The visual tokenizer has random weights, which costs the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run_facts import run_facts

from cots.config import PretrainConfig, read_config
from cots.model.visual_tokenizer import VisualTokenizer, save_visual_tokenizer
from cots.tokenizer_config import VisualTokenizerConfig
from pretrain.determinism import deterministic_arithmetic
from pretrain.distributed import Ranks, process_group
from pretrain.flops import flops_per_pair, matrix_rate
from pretrain.loader import Batch
from pretrain.step_cost import step_flops
from pretrain.trainer import create_step

WARM_UP, STEPS = 6, 16
NO_TOKENS = ["objective.masked_modeling.image_weight=0", "objective.masked_modeling.text_weight=0"]
NO_ALIGNMENT = ["objective.task_alignment.weight=0"]
NO_FILTER = ["objective.noise_filter.queue_size=0"]
IN_BATCH = ["objective.contrastive.queue_size=0", "objective.contrastive.in_batch=online"]
ROWS: dict[str, list[str]] = {
    "open_clip ViT-B-16, eager": [],
    "open_clip ViT-B-16, compiled": [],
    "contrastive only": [*NO_TOKENS, *NO_ALIGNMENT, *NO_FILTER, *IN_BATCH],
    "contrastive, momentum queues": [*NO_TOKENS, *NO_ALIGNMENT, *NO_FILTER],
    "queues and tokens": [*NO_ALIGNMENT, *NO_FILTER],
    "queues and alignment": [*NO_TOKENS, *NO_FILTER],
    "queues and filter": [*NO_TOKENS, *NO_ALIGNMENT],
    "every level, deterministic": ["training.deterministic=true"],
    "every level, eager": ["training.compile=false"],
    "every level, compiled under autocast": ["training.precision=fp32"],
    "every level": [],
    "every level, activation checkpointing": ["training.activation_checkpointing=true"],
    "every level, 2 parts": ["training.accumulation=2"],
}


def our_step(config: PretrainConfig, ranks: Ranks, batch_size: int) -> tuple[Callable[[], Any], float]:
    """A closure that takes a step on synthetic pairs, and its FLOPs a pair."""
    stepper = create_step(config, ranks)
    flops = step_flops(stepper, batch_size) / batch_size
    size, text = config.model.image_tower.image_size, config.model.text_tower
    pixels = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8, device=ranks.device)
    token_ids = torch.randint(1000, text.vocabulary, (batch_size, text.max_length), device=ranks.device)
    batch = Batch(pixels, token_ids, torch.arange(batch_size, device=ranks.device))
    stepper.parallel.train()
    count = 0

    def take() -> None:
        nonlocal count
        batch.item_ids += batch_size
        stepper.take(batch, count, 1000)
        count += 1

    return take, flops


def open_clip_step(compiled: bool, device: torch.device, batch_size: int) -> tuple[Callable[[], Any], float]:
    """open_clip's model, loss and AdamW as its training script runs them under `--precision amp_bf16`."""
    import open_clip

    model = open_clip.create_model("ViT-B-16", output_dict=True).to(device).train()
    context = model.context_length
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
    images = torch.randn(batch_size, 3, 224, 224, device=device)
    texts = torch.randint(49408, (batch_size, context), device=device)

    def loss(network: Any, count: int) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            output = network(images[:count], texts[:count])
            return loss_of(output["image_features"], output["text_features"], output["logit_scale"])

    flops = flops_per_pair(lambda count: loss(model, count).backward(), batch_size)
    model.zero_grad(set_to_none=True)
    network = torch.compile(model) if compiled else model

    def take() -> None:
        loss(network, batch_size).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return take, flops


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Build one row's step, warm it up and time it."""
    settings = [] if name.startswith("open_clip") else [*ROWS[name], *arguments.set]
    arithmetic = deterministic_arithmetic("training.deterministic=true" in settings)
    with arithmetic, process_group("cuda") as ranks, tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        if name.startswith("open_clip"):
            torch.backends.cuda.matmul.allow_tf32 = True  # as its training script does; our trainer does not
            take, flops = open_clip_step("compiled" in name, ranks.device, arguments.batch)
        else:
            config = read_config(arguments.config, [*_common(arguments, scratch), *settings])
            take, flops = our_step(config, ranks, arguments.batch)
        context = torch.autocast("cuda", torch.bfloat16, enabled="autocast" in name)
        with context:
            for _ in range(WARM_UP):
                take()
            torch.cuda.synchronize()
            built = time.perf_counter() - started
            if arguments.hold:
                _wait_for_go(arguments.hold.with_name(f"{arguments.hold.name}.{ranks.rank}"))
            rate = matrix_rate(ranks.device)
            assert rate is not None
            torch.cuda.reset_peak_memory_stats()
            seconds = []
            for _ in range(STEPS):
                begun = time.perf_counter()
                take()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begun)
            if arguments.profile:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    take()
                    torch.cuda.synchronize()
                table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=40)
                arguments.profile.write_text(table)
        middle = statistics.median(seconds)
        return {
            "name": name,
            "config": "" if name.startswith("open_clip") else arguments.config,
            "settings": settings,
            "gpus": ranks.count,
            "milliseconds": 1000 * middle,
            "spread": 1000 * (max(seconds) - min(seconds)),
            "pairs_per_second": ranks.count * arguments.batch / middle,
            "gflops_per_pair": flops / 1e9,
            "mfu": flops * arguments.batch / middle / rate,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "matrix_tflops": rate / 1e12,
            "built_seconds": built,
            "first": ranks.first,
        }


def _wait_for_go(file: Path) -> None:
    file.touch()
    while file.exists():
        time.sleep(0.1)


def from_disk(arguments: argparse.Namespace) -> dict[str, float]:
    """The trainer itself on shards: the last row of its log."""
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [
            *_common(arguments, scratch),
            f"data.train=[{{path: '{arguments.shards}', weight: 4}}]",
            "data.validation=[]",
            f"data.workers={arguments.workers}",
            f"training.batch_size={arguments.gpus * arguments.batch}",
            f"training.output={scratch}/run",
            f"training.epochs={arguments.epochs}",
            "training.log_every=8",
            *arguments.set,
        ]
        several = ["-m", "torch.distributed.run", "--nproc-per-node", str(arguments.gpus)] if arguments.gpus > 1 else []
        command = [sys.executable, *several, "-m", "pretrain", str(arguments.config), *overrides]
        subprocess.run(command, check=True)
        rows = [json.loads(line) for line in (Path(scratch) / "run" / "log.jsonl").read_text().splitlines()]
        return rows[-1]


def _common(arguments: argparse.Namespace, scratch: str) -> list[str]:
    directory = Path(scratch) / "visual_tokenizer"
    if not directory.exists():
        save_visual_tokenizer(directory, VisualTokenizer(VisualTokenizerConfig(codebook_size=8192)))
    return [
        f"model.text_tower.tokenizer={arguments.tokenizer}",
        f"objective.masked_modeling.visual_tokenizer={directory}",
        f"training.batch_size={arguments.batch}",
        "start={}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/cots_base.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of our rows")
    parser.add_argument("--tokenizer", required=True, help="a BERT vocab.txt")
    parser.add_argument("--batch", type=int, default=512, help="pairs a GPU")
    parser.add_argument("--shards", default="", help="also train from these webdataset shards")
    parser.add_argument("--workers", type=int, default=14, help="loader processes a GPU")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that train from the shards")
    parser.add_argument("--epochs", type=float, default=4, help="passes over four times the shards")
    parser.add_argument("--only", nargs="*", choices=list(ROWS), help="rows to measure, by default all")
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--hold", type=Path, help="once warm, make this file, and go on when it is gone")
    parser.add_argument("--profile", type=Path, help="write the kernels of one step here, by their time")
    parser.add_argument("--out", type=Path, default=Path("train_throughput.jsonl"))
    arguments = parser.parse_args()
    if arguments.row or (arguments.only and len(arguments.only) == 1):
        facts = run_facts(sys.argv[:-2] if arguments.row else sys.argv)
        row = measure(arguments.row or arguments.only[0], arguments) | {"batch": arguments.batch, "run": facts}
        if row.pop("first"):
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(_line(row), flush=True)
        return
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, batch {arguments.batch} a GPU", flush=True)
    for name in ROWS if arguments.only is None else arguments.only:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", name], check=False)
    if arguments.shards:
        last = from_disk(arguments)
        shown = {key: last[key] for key in ("pairs_per_second", "mfu", "data_wait", "peak_memory_gib")}
        told = {"name": "every level, from disk", "config": arguments.config, "settings": arguments.set}
        row = {**told, "gpus": arguments.gpus, **shown, "run": run_facts()}
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"every level, from disk, {arguments.gpus} GPU: {shown}", flush=True)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['name']:40} {row['gpus']} GPU {row['milliseconds']:7.1f} ms (spread {row['spread']:.1f}) "
        f"{row['pairs_per_second']:7.0f} pairs/s  {row['gflops_per_pair']:6.1f} GFLOP a pair  "
        f"MFU {row['mfu']:.1%} of {row['matrix_tflops']:.0f} TFLOP/s  peak {row['peak_gib']:.1f} GiB  "
        f"(ready after {row['built_seconds']:.0f} s)"
    )


if __name__ == "__main__":
    main()
