"""Time of a search through all of `cots search`, part by part, and beside FAISS alone.

    python benchmarks/search_latency.py [--gallery DIR] [--cold 5] [--warm 200] [--where SQL] [--json OUT]

Cold: a new process that loads everything. Opening: gallery, snapshot and engine in a fresh process that has imported
what it needs, and the memory that this takes. Warm: one process, one query after the other; "FAISS alone" is the
structure's own search of the same vectors with the same effort, and what is ours is all but that and encoding.
`search_gallery.py` makes a gallery of a million rows.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from run_facts import run_facts

import cots
from cots.embedded import EMBEDDED_GALLERY
from index.search import Searcher

QUERIES = (
    "a dog on the beach", "a red car", "children playing", "a birthday cake", "snow on a mountain",
    "two men playing football", "a woman with a camera", "a boy jumps into water", "people in a crowded street",
    "a climber on a rock",
)  # fmt: skip
OPENING = """
import json, sys, time
import cots, lancedb
from cots.model.pretrained import load_model
from index.search import Searcher
gallery = cots.open_gallery(sys.argv[1])
model = load_model(gallery.manifest.model)
def memory():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(lines[name].split()[0]) // 1024 for name in ("RssAnon", "RssFile")}
before, started = memory(), time.perf_counter()
gallery = cots.open_gallery(sys.argv[1])
snapshot = gallery.snapshot
mapped = time.perf_counter()
searcher = Searcher(gallery, model)
opened = time.perf_counter()
searcher.search("a dog on the beach")
after = memory()
taken = {f"{name} MB": after[name] - before[name] for name in after}
seconds = {"snapshot s": mapped - started, "engine s": opened - mapped, "first search s": time.perf_counter() - opened}
print(json.dumps(seconds | taken))
"""


def cold(gallery: str) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "cots.cli", "search", QUERIES[0], "--json", "--gallery", gallery]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def opening(gallery: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", OPENING, gallery], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def alone(searcher: Searcher, query: np.ndarray) -> float:
    """Milliseconds that the structure itself takes for a query (D,), or exact search if that answers."""
    index: Any = searcher.index
    structure = getattr(index, "_structure", None)
    if structure is None:
        started = time.perf_counter()
        index.search(query[None], 20)
    else:
        import faiss

        effort = index.effort
        if index.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(effort.breadth, 40))
        else:
            parameters = faiss.SearchParametersIVF(nprobe=effort.breadth)
        started = time.perf_counter()
        structure.search(query[None], 20 * effort.proposals, params=parameters)
    return 1000 * (time.perf_counter() - started)


def warm(searcher: Searcher, count: int, **asked: Any) -> dict[str, np.ndarray]:
    """Milliseconds (count,) of each part and of all; if nothing else is asked, of FAISS alone and of what is ours too.

    Every condition is a new one if `where` has a place for a number.
    """
    parts: dict[str, list[float]] = {name: [] for name in ("encode", "search", "fetch", "total", "FAISS alone")}
    vectors = searcher.model.encode_texts(QUERIES).numpy()
    for number in range(-1, count):
        numbered = asked | {"where": asked["where"].format(number)} if "where" in asked else asked
        started = time.perf_counter()
        took = searcher.search(QUERIES[number % len(QUERIES)], **numbered).took_ms
        if number < 0:  # loads what it needs
            continue
        parts["total"].append(1000 * (time.perf_counter() - started))
        for name in ("encode", "search", "fetch"):
            parts[name].append(took[name])
        parts["FAISS alone"].append(alone(searcher, vectors[number % len(QUERIES)]))
    figures = {name: np.array(values) for name, values in parts.items()}
    if asked:
        return {name: figures[name] for name in ("encode", "search", "fetch", "total")}
    return figures | {"ours": figures["total"] - figures["encode"] - figures["FAISS alone"]}


def report(name: str, figures: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Print and return p50 and p99 of each part."""
    summary = {
        part: {"p50_ms": round(float(np.median(took)), 3), "p99_ms": round(float(np.percentile(took, 99)), 3)}
        for part, took in figures.items()
    }
    parts = (f"{part} {each['p50_ms']:.2f} / {each['p99_ms']:.2f}" for part, each in summary.items())
    print(f"{name}: {', '.join(parts)}", flush=True)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gallery", default=str(EMBEDDED_GALLERY))
    parser.add_argument("--cold", type=int, default=5)
    parser.add_argument("--warm", type=int, default=200)
    parser.add_argument("--where", default="kind = 'image'")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    document: dict[str, Any] = run_facts()
    if arguments.cold:
        seconds = [cold(arguments.gallery) for _ in range(arguments.cold)]
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"cold: median {statistics.median(seconds):.2f} s ({spread}) over {len(seconds)} processes")
        opened = opening(arguments.gallery)
        document |= {"cold_s": [round(each, 3) for each in seconds], "opening": opened}
        print("opening: " + ", ".join(f"{name} {value:.2f}" for name, value in opened.items()))
    gallery = cots.open_gallery(arguments.gallery)
    gallery.search(QUERIES[0])
    searcher = gallery._searcher
    assert searcher is not None
    rows, kind = len(gallery.snapshot), searcher.index.kind
    print(f"{rows:,} rows, engine {kind}; milliseconds, p50 / p99")
    new = f"{arguments.where} AND id > -1 - {{}}"  # a condition that was not asked with before
    asked: dict[str, dict[str, Any]] = {
        "vector": {},
        "--kind video": {"kind": "video"},
        f"--where {arguments.where!r}": {"where": new},
        "the same again": {"where": arguments.where},
        "--mode text": {"mode": "text"},
        "--mode hybrid": {"mode": "hybrid"},
    }
    searches = {name: report(name, warm(searcher, arguments.warm, **each)) for name, each in asked.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"peak memory {peak:,} MB")
    if arguments.json:
        document |= {"rows": rows, "engine": kind, "searches": arguments.warm, "warm": searches, "peak_mb": peak}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
