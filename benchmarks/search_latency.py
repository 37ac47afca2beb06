"""Time of a search on the embedded gallery.

Cold: a new process that loads everything. Warm: encode + search + fetch in one process.

python benchmarks/search_latency.py [--cold 5] [--warm 200]
"""

import argparse
import statistics
import subprocess
import sys
import time

import cots
from cots.embedded import EMBEDDED_GALLERY

QUERIES = ("a dog on the beach", "a red car", "children playing", "a birthday cake", "snow on a mountain")


def cold() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cots.cli", "search", QUERIES[0], "--json"], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cold", type=int, default=5)
    parser.add_argument("--warm", type=int, default=200)
    arguments = parser.parse_args()
    seconds = [cold() for _ in range(arguments.cold)]
    spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
    print(f"cold: median {statistics.median(seconds):.2f} s ({spread}) over {len(seconds)} processes")
    gallery = cots.open_gallery(EMBEDDED_GALLERY)
    gallery.search(QUERIES[0])
    parts: dict[str, list[float]] = {"encode": [], "search": [], "fetch": []}
    for number in range(arguments.warm):
        took = gallery.search(QUERIES[number % len(QUERIES)], k=10).took_ms
        for name, values in parts.items():
            values.append(took[name])
    totals = [sum(values) for values in zip(*parts.values())]
    middle = ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in parts.items())
    p99 = statistics.quantiles(totals, n=100)[98]
    print(f"warm: median {statistics.median(totals):.1f} ms, p99 {p99:.1f} ms ({middle})")


if __name__ == "__main__":
    main()
