"""Search engines side by side: latency of one query, queries a second in batches, recall, memory and time to build.

    python benchmarks/search.py --base base.npz --sizes 100000 1000000 --engines exact faiss-flat hnsw --json cpu.json
    python benchmarks/search.py --base base.npz --sizes 100000 1000000 10000000 --json gpu.json \\
        --engines exact-gpu torch-gpu faiss-gpu-flat faiss-gpu-ivf                    # on a host with a GPU

`search_data.py` says what base.npz is and how its photographs are grown to millions; the queries are captions. Each row
is a process of its own over the same file of vectors, which another has drawn from a fixed seed on the CPU. An
approximate engine is asked half of the queries with one setting after the other; for each wanted recall at 10 the first
that reaches it is taken (of several ladders of settings the quickest), and the other half gives the figures; where none
does, the highest recall of the first half stands there. A row counts as found if it scores as well as the tenth best.
Latency is of one query after the other, from an array to an array; "alone" is what FAISS takes of ours; "1 %" is with a
random hundredth of the rows allowed. A timing ends after `--seconds`, or before that after 1,000 queries asked one by
one, or 200 batches. `--json` adds to what the file holds, engine by engine, so that a run that is cut off loses one;
the table comes last. What an engine makes stays in `--scratch` and is used again.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from run_facts import run_facts
from search_data import Base, grow
from search_engines import ENGINES, Engine

from index.tuning import climb

TARGETS = (0.8, 0.9, 0.95, 0.99)
K = 10
MOST_SINGLE = 1000  # queries that a timing asks one by one
MOST_BATCHES = 200
UPLOAD = 500_000


def exact_scores(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The scores (Q, K) of the best rows, on a GPU if there is one."""
    import torch

    if not torch.cuda.is_available():
        from index.exact import exact_search

        return exact_search(vectors, queries, K)[0]
    asked = torch.from_numpy(queries).cuda()
    best = torch.full((len(queries), K), -torch.inf, device="cuda")
    for start in range(0, len(vectors), UPLOAD):
        block = torch.from_numpy(vectors[start : start + UPLOAD]).cuda().float()
        best = torch.cat([best, (asked @ block.T).topk(K).values], dim=1).topk(K).values
    return best.cpu().numpy()


def draw(base: Base, size: int, count: int, scratch: Path) -> None:
    """Draw the vectors of a size and write them with the queries and the best scores of `count` of these."""
    vectors = np.lib.format.open_memmap(scratch / f"vectors-{size}.npy", "w+", np.float16, (size, base.images.shape[1]))
    grow(base.images, size, vectors)
    vectors.flush()
    queries = base.queries.astype(np.float32)
    np.savez(_queries_file(scratch, size), queries=queries, scores=exact_scores(vectors, queries[:count]))


def _queries_file(scratch: Path, size: int) -> Path:
    """What is written last of a size."""
    return scratch / f"queries-{size}.npz"


def recall(vectors: np.ndarray, queries: np.ndarray, scores: np.ndarray, found: np.ndarray) -> float:
    """Share of the K best that are among rows found (Q, K)."""
    shares = []
    for query, best, rows in zip(queries, scores, found, strict=True):
        rows = np.unique(rows[rows >= 0])
        shares.append(np.count_nonzero(vectors[rows].astype(np.float32) @ query >= best[-1] - 1e-6) / K)
    return float(np.mean(shares))


def milliseconds(ask: Callable[[np.ndarray], Any], queries: np.ndarray, seconds: float) -> dict[str, float]:
    """p50 and p99 of one query after the other."""
    for query in queries[:5]:
        ask(query[None])
    took: list[float] = []
    while sum(took) < seconds and len(took) < MOST_SINGLE:
        query = queries[len(took) % len(queries)]
        started = time.perf_counter()
        ask(query[None])
        took.append(time.perf_counter() - started)
    p50, p99 = 1000 * np.percentile(took, (50, 99))
    return {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3)}


def per_second(ask: Callable[[np.ndarray], Any], queries: np.ndarray, seconds: float) -> float:
    """Queries a second in batches. The first two do not count, as a GPU's kernels are compiled and recorded in them,
    unless the first takes all the time there is."""
    first = time.perf_counter()
    ask(queries)
    if (took := time.perf_counter() - first) > seconds:
        return round(len(queries) / took, 1)
    ask(queries)
    started, batches = time.perf_counter(), 0
    while time.perf_counter() - started < seconds and batches < MOST_BATCHES:
        ask(queries)
        batches += 1
    return round(batches * len(queries) / (time.perf_counter() - started), 1)


def reaching(
    engine: Engine, vectors: np.ndarray, queries: np.ndarray, scores: np.ndarray
) -> tuple[dict[float, list[Any]], dict[str, Any]]:
    """For each target the first setting of each ladder that reaches it; and the highest recall, and its setting."""
    found: dict[float, list[Any]] = {target: [] for target in TARGETS}
    highest = {"most": 0.0, "most_setting": ""}

    def recall_at(setting: Any) -> float:
        return recall(vectors, queries, scores, engine.search(queries, K, setting))

    for ladder in engine.ladders:
        best = 0.0
        for setting, share in climb(ladder, recall_at):
            for target in TARGETS:
                if best < target <= share:
                    found[target].append(setting)
            best = max(best, share)
            if share > highest["most"]:
                highest = {"most": round(share, 4), "most_setting": str(setting)}
            if best >= TARGETS[-1]:
                break
    return found, highest


def measure(
    engine: Engine, setting: Any, data: dict[str, np.ndarray], seconds: float, batches: list[int]
) -> dict[str, Any]:
    """The figures of an engine with a setting, from the queries that did not choose it."""
    vectors, queries, scores = data["vectors"], data["queries"], data["scores"]
    held_out = queries[: len(scores)][1::2]

    def ask(asked: np.ndarray) -> Any:
        return engine.search(asked, K, setting)

    allowed = np.random.default_rng(0).random(len(vectors)) < 0.01
    figures: dict[str, Any] = {
        "recall": round(recall(vectors, held_out, scores[1::2], ask(held_out)), 4),
        "setting": None if setting is None else str(setting),
        **milliseconds(ask, held_out, seconds),
        "per_second": {str(batch): per_second(ask, queries[:batch], seconds) for batch in batches},
    }
    own = type(engine)
    if own.search_alone is not Engine.search_alone:
        figures["alone_p50_ms"] = milliseconds(lambda q: engine.search_alone(q, K, setting), held_out, seconds)[
            "p50_ms"
        ]
    if own.search_allowed is not Engine.search_allowed:
        filtered = milliseconds(lambda q: engine.search_allowed(q, K, setting, allowed), held_out, seconds)
        figures["allowed_p50_ms"] = filtered["p50_ms"]
    return figures


def row(name: str, size: int, scratch: Path, seconds: float, batches: list[int]) -> list[dict[str, Any]]:
    """Build an engine and measure it in this process."""
    vectors = np.asarray(np.load(scratch / f"vectors-{size}.npy", mmap_mode="r"))
    with np.load(_queries_file(scratch, size)) as file:
        data = {"vectors": vectors, "queries": file["queries"], "scores": file["scores"]}
    place = scratch / f"{name}-{size}"
    place.mkdir(exist_ok=True)
    started = time.perf_counter()
    engine = ENGINES[name](vectors, place)
    built = engine.build_seconds or time.perf_counter() - started
    shared = {
        "engine": name,
        "vectors": size,
        "build_s": round(built, 1),
        "bytes_a_vector": round(engine.size / size, 1),
    }
    chosen, scores = data["queries"][: len(data["scores"])][::2], data["scores"][::2]
    exact = engine.ladders == [[None]]
    settings, highest = ({1.0: [None]}, {}) if exact else reaching(engine, vectors, chosen, scores)
    rows = []
    for target, candidates in settings.items():
        if not candidates:
            rows.append(shared | {"target": target, "recall": None} | highest)
            continue

        def latency(setting: Any) -> float:
            return milliseconds(lambda q: engine.search(q, K, setting), chosen, seconds / 4)["p50_ms"]

        setting = min(candidates, key=latency) if candidates[1:] else candidates[0]
        rows.append(shared | {"target": target} | measure(engine, setting, data, seconds, batches))
    memory: dict[str, Any] = {"load": round(os.getloadavg()[0], 1)}
    memory |= {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "own_mb": own_memory()}
    if "gpu" in name:
        memory["device_mb"] = device_memory()
    return [each | memory for each in rows]


def own_memory() -> int:
    """Megabytes of this process that are not pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) // 1024


def device_memory() -> int:
    """Megabytes in use on the GPU."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return (total - free) >> 20


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; of targets that the same setting reaches one row."""
    columns = ("vectors", "engine", "recall@10", "p50 / p99 ms", "alone ms", "1 % ms", "q/s at 32 / 1,024")
    columns += ("build s", "bytes a vector", "peak / own MB")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    seen = set()
    for each in sorted(rows, key=lambda each: (each["vectors"], list(ENGINES).index(each["engine"]), each["target"])):
        cells = [f"{each['vectors']:,}", each["engine"]]
        if each["recall"] is None:
            most = f", at most {each['most']:.3f}" if "most" in each else ""
            cells += [f"{each['target']} is not reached{most}", "", "", "", ""]
        elif (*cells, each["setting"]) in seen:
            continue
        else:
            cells += [f"{each['recall']:.3f}", f"{each['p50_ms']:.2f} / {each['p99_ms']:.2f}"]
            cells += [f"{each[key]:.2f}" if key in each else "" for key in ("alone_p50_ms", "allowed_p50_ms")]
            cells += [" / ".join(f"{rate:,.0f}" for rate in each["per_second"].values())]
            seen.add((*cells[:2], each["setting"]))
        cells += [f"{each['build_s']:,}", f"{each['bytes_a_vector']:,}", f"{each['peak_mb']:,} / {each['own_mb']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="what search_data.py drew")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["exact", "faiss-flat", "ivf", "ivfpq"])
    parser.add_argument("--queries", type=int, default=512, help="that choose settings and measure recall, half each")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 1024], help="queries asked at once")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timing")
    parser.add_argument("--scratch", type=Path, help="where vectors and structures lie; by default nowhere for long")
    parser.add_argument("--json", type=Path, help="results, to be added to")
    parser.add_argument("--draw", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.draw:
        draw(Base.load(arguments.base), arguments.draw, arguments.queries, arguments.scratch)
        return
    if arguments.row:
        name, size = arguments.row
        print(json.dumps(row(name, int(size), arguments.scratch, arguments.seconds, arguments.batches)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        run(arguments, scratch)


def run(arguments: argparse.Namespace, scratch: Path) -> None:
    facts = run_facts()
    document: dict[str, Any] = {"command": "", "rows": []}
    if arguments.json and arguments.json.is_file():
        document = json.loads(arguments.json.read_text())
    document |= facts
    command = [sys.executable, __file__, "--base", str(arguments.base), "--scratch", str(scratch)]
    command += ["--queries", str(arguments.queries), "--seconds", str(arguments.seconds), "--batches"]
    command += [str(batch) for batch in arguments.batches]
    for size in arguments.sizes:
        if not _queries_file(scratch, size).is_file():
            started = time.perf_counter()
            # Its threads multiply small matrices, which OpenBLAS with threads of its own does at half the pace.
            one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
            subprocess.run([*command, "--draw", str(size)], check=True, env=one_thread)
            _tell(f"{size} are drawn", started)
        for name in arguments.engines:
            started = time.perf_counter()
            done = subprocess.run([*command, "--row", name, str(size)], capture_output=True, text=True)
            if done.returncode:
                print(f"{name} of {size}: {(done.stderr.strip() or 'killed').splitlines()[-1]}", file=sys.stderr)
                continue
            others = [each for each in document["rows"] if (each["engine"], each["vectors"]) != (name, size)]
            run_by = {key: facts[key] for key in ("command", "date")}  # rows of another run may stand beside these
            document["rows"] = others + [each | run_by for each in json.loads(done.stdout.splitlines()[-1])]
            _tell(f"{name} of {size} is measured", started)
            if arguments.json:
                written = arguments.json.with_suffix(".part")
                written.write_text(json.dumps(document, indent=1) + "\n")
                written.replace(arguments.json)
    print(table(document["rows"]))


def _tell(what: str, since: float) -> None:
    print(f"{what}: {time.perf_counter() - since:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
