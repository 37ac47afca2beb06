"""What a structure should be tuned with where a gallery has no captions: what each kind of queries promises and keeps.

    python benchmarks/tuning_queries.py --base base.npz [--size 100000] [--json OUT]

The gallery is the photographs of base.npz, grown to size (see search_data.py). Each structure is tuned to a recall at
10 with queries of each kind; then captions of these photographs that were not tuned with, and everyday nouns ("a globe
of the Earth"), are asked. "promised" is the recall of the half of the queries that did not choose the effort, which is
what a gallery's `info` would say.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from run_facts import run_facts
from search_data import Base, grow

from cots.embedded import EMBEDDED_GALLERY
from cots.model.pretrained import load_model
from index.ann import AnnIndex, Effort, make_structure
from index.exact import exact_search
from index.tuning import NOISE, QUERIES, Queries, everyday_sentences, tune

KINDS = ("ivf", "ivfpq", "hnsw")
TARGETS = (0.9, 0.95, 0.99)
MADE_OF = ("a drawing of ", "a 3D emoji of ", "an animated emoji of ")


def everyday_nouns() -> list[str]:
    """What the embedded gallery's drawings and emoji show, in a word or a few."""
    items = [json.loads(line) for line in (EMBEDDED_GALLERY / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    nouns = []
    for item in items:
        beginning = next((start for start in MADE_OF if item["captions"][0].startswith(start)), None)
        if beginning is not None:
            nouns.append(item["captions"][0].removeprefix(beginning))
    return nouns


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--size", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    document: dict[str, Any] = run_facts() | {"size": arguments.size, "rows": []}
    rng = np.random.default_rng(1)
    base = Base.load(arguments.base)
    vectors = np.empty((arguments.size, base.images.shape[1]), np.float16)
    grow(base.images, arguments.size, vectors)
    model = load_model("embedded")
    captions = rng.permutation(base.queries.astype(np.float32))
    nouns = model.encode_texts([str(noun) for noun in rng.permutation(everyday_nouns())[:QUERIES]]).numpy()
    drawn = vectors[rng.integers(0, len(vectors), QUERIES)].astype(np.float32)
    tuned_with = {
        "noisy vectors": unit(drawn + NOISE * unit(rng.standard_normal(drawn.shape))).astype(np.float32),
        "everyday sentences": model.encode_texts(everyday_sentences()).numpy(),
        "captions": captions[:QUERIES],
    }
    asked = {"captions": captions[QUERIES : 2 * QUERIES], "nouns": nouns}
    best = {name: exact_search(vectors, queries, 10)[0][:, -1:] for name, queries in asked.items()}
    print("structure, target, tuned with: effort, promised; captions and nouns find")
    for kind in KINDS:
        structure = make_structure(kind, vectors)
        index = AnnIndex(structure, kind, Effort(1), vectors, np.arange(len(vectors)), few_rows=0)
        for target in TARGETS:
            for name, queries in tuned_with.items():
                promised = tune(index, vectors, Queries(queries, name), target).recall["10"]
                found = {
                    other: round(float((index.search(queries, 10)[0] >= best[other] - 1e-6).mean()), 4)
                    for other, queries in asked.items()
                }
                effort = {"breadth": index.effort.breadth, "proposals": index.effort.proposals}
                row = {"structure": kind, "target": target, "tuned_with": name, **effort, "promised": promised, **found}
                document["rows"].append(row)
                print(f"{kind}, {target}, {name}: {effort}, {promised}; {found}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
