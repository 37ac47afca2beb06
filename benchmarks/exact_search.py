"""Exact search on one GPU beside the floors of its memory and its tensor cores, torch, and FAISS.

    python benchmarks/exact_search.py --vectors 10000000 --dim 256 --json OUT.json          # about two minutes
    python benchmarks/exact_search.py --vectors 10000000 --dim 256 --sweep --json OUT.json  # tile shapes, 120 s at most

The vectors are drawn on the GPU: 4,096 random centres with noise of norm 1 about them, scaled to unit norm; a query is
one of them with noise of norm 0.5. A time is the median over `--runs` calls after warm-up of what a caller waits for:
queries as an array of the CPU go in, scores and ids come out (`ExactGpuIndex`, FAISS), filters as arrays of bool
included, except where a read-only one is kept from the query before; torch and the floors are timed with CUDA events.
Before anything is timed, hits are compared with those of float32 brute force.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_facts import run_facts

from index.exact_gpu import ExactGpuIndex
from index.topk_passes import SWEPT, TritonPasses, padded_width

CHUNK = 1_000_000
CENTRES = 4096
CHECKED = 64
SCORES = 2_500_000_000  # that brute force holds at a time
WARM_UP = 3
BATCHES = (1, 32, 1024)
SWEPT_BATCHES = (1, 32, 128, 1024)
SHARES = (0.01, 0.1, 0.5)
Row = dict[str, Any]


def draw(count: int, dimension: int) -> tuple[ExactGpuIndex, np.ndarray]:
    """An index of drawn vectors, appended in chunks, and queries (1024, D)."""
    torch.manual_seed(0)
    centres = _unit(torch.randn(CENTRES, dimension, device="cuda"))
    index = ExactGpuIndex(torch.empty(0, dimension), np.empty(0, np.int64))
    index.reserve(count)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        chosen = centres[torch.randint(CENTRES, (size,), device="cuda")]
        vectors = _unit(chosen + torch.randn(size, dimension, device="cuda") / dimension**0.5)
        index.append(vectors, np.arange(start, start + size))
    rows = torch.randint(count, (max(BATCHES),), device="cuda")
    noise = torch.randn(len(rows), dimension, device="cuda") / (2 * dimension**0.5)
    return index, _unit(index.vectors[rows].float() + noise).cpu().numpy()


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True)


def waited(call: Callable[[], Any], runs: int) -> float:
    """Median milliseconds of a call that ends when its results are on the CPU."""
    took = []
    for run in range(WARM_UP + runs):
        started = time.perf_counter()
        call()
        if run >= WARM_UP:
            took.append(1000 * (time.perf_counter() - started))
    return statistics.median(took)


def on_device(call: Callable[[], Any], runs: int) -> float:
    """Median milliseconds of a call by CUDA events."""
    took = []
    for run in range(WARM_UP + runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        if run >= WARM_UP:
            took.append(begin.elapsed_time(end))
    return statistics.median(took)


def floors(count: int, dimension: int, runs: int) -> dict[str, float]:
    """GB/s of a copy on the device, bytes read plus bytes written, TFLOP/s of a matrix product, and what follows: the
    milliseconds to read the vectors once, and to multiply them with 1,024 queries."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    bandwidth = 2 * len(source) / on_device(lambda: target.copy_(source), runs) / 1e6
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    rate = 2 * 8192**3 / on_device(lambda: left @ right, runs) / 1e9
    return {
        "copy GB/s": bandwidth,
        "fp16 TFLOP/s": rate,
        "memory floor ms": 2 * count * dimension / bandwidth / 1e6,
        "arithmetic floor ms at 1024": 2 * 1024 * count * dimension / rate / 1e9,
    }


def brute_force(
    vectors: torch.Tensor, queries: torch.Tensor, k: int, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and positions (Q, k) of the best by matrix products in the queries' type."""
    chunk = SCORES // len(queries) if queries.dtype == torch.float16 else CHUNK
    scores = torch.empty(len(queries), 0, device="cuda", dtype=queries.dtype)
    places = torch.empty(len(queries), 0, device="cuda", dtype=torch.int64)
    for start in range(0, len(vectors), chunk):
        part = queries @ vectors[start : start + chunk].to(queries.dtype).T
        if allowed is not None:
            part[:, ~allowed[start : start + chunk]] = -torch.inf
        best = part.topk(min(k, part.shape[1]), dim=1)
        scores = torch.cat([scores, best.values], dim=1)
        places = torch.cat([places, best.indices + start], dim=1)
    scores, which = scores.topk(k, dim=1)
    return scores, places.gather(1, which)


def check(index: ExactGpuIndex, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> Row:
    """How far the hits of a batch of all queries are from those of float32 brute force, for a sample of them."""
    scores, ids = index.search(queries, k, allowed)
    sample = np.linspace(0, len(queries) - 1, CHECKED).astype(int)
    asked = torch.from_numpy(queries[sample]).cuda()
    mask = None if allowed is None else torch.from_numpy(allowed).cuda()
    best, places = brute_force(index.vectors, asked, k, mask)
    found = torch.from_numpy(ids[sample]).cuda()
    true_scores = (index.vectors[found].float() * asked[:, None]).sum(dim=2)
    return {
        "largest difference from the best scores": float((torch.from_numpy(scores[sample]).cuda() - best).abs().max()),
        "largest error of a score": float((torch.from_numpy(scores[sample]).cuda() - true_scores).abs().max()),
        "share of the same ids": float((found[:, :, None] == places[:, None]).any(dim=2).float().mean()),
    }


def compare(index: ExactGpuIndex, queries: np.ndarray, masks: dict[float, np.ndarray], runs: int) -> list[Row]:
    """A row for each way to search, batch, k and mask."""
    rows = []

    def row(way: str, batch: int, k: int, share: float | None, milliseconds: float) -> None:
        rows.append({"way": way, "batch": batch, "k": k, "allowed": share, "ms": milliseconds})
        print(f"{way}, batch {batch}, k {k}, {share}: {milliseconds:.3f} ms", flush=True)

    for batch, k in [*((batch, 10) for batch in BATCHES), (32, 100), (32, 1000)]:
        asked = queries[:batch]
        row("ExactGpuIndex", batch, k, None, waited(partial(index.search, asked, k), runs))
        for share, allowed in masks.items() if k == 10 else ():
            row("ExactGpuIndex", batch, k, share, waited(partial(index.search, asked, k, allowed), runs))
            kept = allowed.copy()
            kept.flags.writeable = False
            row("ExactGpuIndex, filter kept", batch, k, share, waited(partial(index.search, asked, k, kept), runs))
        halves = torch.from_numpy(asked).cuda().half()
        row("torch matmul + topk", batch, k, None, on_device(partial(brute_force, index.vectors, halves, k), runs))
    return rows


def faiss_rows(index: ExactGpuIndex, queries: np.ndarray, runs: int) -> list[Row]:
    """The same by FAISS's flat index of float16, if FAISS for GPUs is installed."""
    try:
        import faiss
    except ImportError:
        return []
    if not hasattr(faiss, "GpuIndexFlatIP") or not faiss.get_num_gpus():
        return []
    settings = faiss.GpuIndexFlatConfig()
    settings.useFloat16 = True
    flat = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), queries.shape[1], settings)
    for start in range(0, len(index), CHUNK):
        part = index.vectors[start : start + CHUNK].float().contiguous()
        torch.cuda.synchronize()
        flat.add_c(len(part), faiss.cast_integer_to_float_ptr(part.data_ptr()))
        torch.cuda.synchronize()
    del part
    torch.cuda.empty_cache()
    return [
        {
            "way": f"FAISS {faiss.__version__} GpuIndexFlat fp16",
            "batch": batch,
            "k": k,
            "allowed": None,
            "ms": waited(partial(flat.search, queries[:batch], k), runs),
        }
        for batch, k in ((1, 10), (32, 10), (1024, 10), (32, 100))
    ]


def kernels(index: ExactGpuIndex, queries: np.ndarray, few: np.ndarray) -> dict[str, list[tuple[str, float]]]:
    """Milliseconds of each kernel of one search, the longest first, and of all, by batch, and under a new filter."""
    from torch.profiler import ProfilerActivity, profile

    found = {}
    for name, batch, allowed in (*((str(batch), batch, None) for batch in BATCHES), ("1, new filter", 1, few)):
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            index.search(queries[:batch], 10, allowed)
        events = [event for event in profiled.key_averages() if event.self_device_time_total > 0]
        events.sort(key=lambda event: -event.self_device_time_total)
        found[name] = [
            ("all", sum(event.self_device_time_total for event in events) / 1e3),
            *((f"{event.key[:60]} x{event.count}", event.self_device_time_total / 1e3) for event in events[:10]),
        ]
    return found


def sweep(index: ExactGpuIndex, queries: np.ndarray, seconds: float, runs: int) -> list[Row]:
    """A row for each batch and tile shape until the time is up."""
    import triton

    facts = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    width = padded_width(queries.shape[1])
    deadline = time.perf_counter() + seconds
    expected = index.search(queries, 10)[0]
    rows = []
    for shape in dict.fromkeys(SWEPT):
        if shape.shared_bytes(width) > facts["max_shared_mem"] or (shape.kernel != "streamed" and width > 256):
            continue
        for batch in SWEPT_BATCHES:
            if time.perf_counter() > deadline:
                return rows
            index.passes = TritonPasses(
                width, facts["multiprocessor_count"], facts["max_shared_mem"], (shape,), (shape,), (shape,)
            )
            row: Row = {"shape": str(shape), "batch": batch}
            try:
                row["ms"] = waited(partial(index.search, queries[:batch], 10), runs)
                row["off by"] = float(np.abs(index.search(queries[:batch], 10)[0] - expected[:batch]).max())
            except Exception as error:  # a shape that a device or compiler cannot take is a result too
                row |= {"ms": None, "error": str(error).splitlines()[0][:200]}
            rows.append(row)
            print(row, flush=True)
    return rows


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="compare tile shapes instead")
    parser.add_argument("--sweep-seconds", type=float, default=120)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    document: dict[str, Any] = {
        **run_facts(),
        "cuda": torch.version.cuda,
        "vectors": arguments.vectors,
        "dimension": arguments.dim,
        "floors": floors(arguments.vectors, arguments.dim, arguments.runs),
    }
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    index, queries = draw(arguments.vectors, arguments.dim)
    if arguments.sweep:
        document["sweep"] = sweep(index, queries, arguments.sweep_seconds, max(arguments.runs // 2, 5))
    else:
        rng = np.random.default_rng(0)
        masks = {share: rng.random(len(index)) < share for share in SHARES}
        checked = ((queries, 10, None), (queries[:64], 100, None), (queries, 10, 0.5), (queries, 10, 0.01))
        checked += ((queries[:1], 10, 0.01),)
        document["checks"] = [
            {"batch": len(asked), "k": k, "allowed": share} | check(index, asked, k, masks.get(share or 0))
            for asked, k, share in checked
        ]
        print(json.dumps(document["checks"], indent=1), flush=True)
        torch.cuda.reset_peak_memory_stats()
        index.search(queries, 10)
        document["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        document["rows"] = compare(index, queries, masks, arguments.runs)
        document["kernels"] = kernels(index, queries, masks[SHARES[0]])
        document["rows"] += faiss_rows(index, queries, arguments.runs)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1))
    report(document)


def report(document: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"\n{document['gpu']}, {document['versions']}, {document['vectors']:,} x {document['dimension']}")
    print(", ".join(f"{name} {value:.2f}" for name, value in document["floors"].items()))
    if "sweep" in document:
        for batch in SWEPT_BATCHES:
            rows = [row for row in document["sweep"] if row["batch"] == batch]
            timed = sorted((row for row in rows if row["ms"] is not None), key=lambda row: row["ms"])
            failed = [[row["shape"], row["error"]] for row in rows if row["ms"] is None]
            table = [[row["shape"], f"{row['ms']:.3f}, scores off by {row['off by']:.0e}"] for row in timed]
            print_table(f"batch {batch}, best first", ["shape", "ms"], table + failed)
        return
    print(f"peak {document['peak GB']:.2f} GB; checks: {document['checks']}")
    for batch, found in document["kernels"].items():
        print_table(f"kernels, batch {batch}", ["kernel", "ms"], [[name, f"{took:.3f}"] for name, took in found])
    floor = document["floors"]["memory floor ms"]
    table = [
        [
            row["way"],
            str(row["batch"]),
            str(row["k"]),
            "all" if row["allowed"] is None else f"{100 * row['allowed']:g} %",
            f"{row['ms']:.2f}",
            f"{row['ms'] / floor:.2f}",
        ]
        for row in document["rows"]
    ]
    print_table("searches", ["way", "batch", "k", "allowed", "ms", "times the memory floor"], table)


if __name__ == "__main__":
    main()
