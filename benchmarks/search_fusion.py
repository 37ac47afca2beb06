"""How hybrid search should weigh ranks: the constant of reciprocal rank fusion, by captions that find their photo.

    python benchmarks/search_fusion.py --base base.npz [--json OUT]

The gallery is the first 1,000 photographs of base.npz (see search_data.py: Flickr8k's validation split), each with one
or four of its captions; the queries are fifth captions, which the gallery does not have. R@k: the share of those whose
photograph is among the first k.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import FTS
from run_facts import run_facts
from search_data import Base

import index.captions
from cots.model.pretrained import load_model

CONSTANTS = (1, 3, 5, 10, 20, 60)
DEPTH = 100
PHOTOGRAPHS = 1000


def recall(rankings: list[list[int]]) -> dict[str, float]:
    """R@1, 5 and 10 in percent of rankings, of which the i-th should begin with i."""
    places = [ranking.index(right) if right in ranking else DEPTH for right, ranking in enumerate(rankings)]
    return {f"R@{k}": round(100 * float(np.mean(np.array(places) < k)), 2) for k in (1, 5, 10)}


def by_words(captions: list[str], sentences: list[str]) -> list[list[int]]:
    """The photographs whose captions fit each sentence best by BM25."""
    rankings = []
    with tempfile.TemporaryDirectory() as folder:
        rows = pa.table({"id": np.arange(len(captions)), "caption": captions})
        table = lancedb.connect(folder).create_table("captions", rows)
        table.create_index("caption", config=FTS())
        for sentence in sentences:
            found = table.search(sentence, query_type="fts").select(["id", "_score"]).limit(DEPTH).to_arrow()
            ids, scores = found["id"].to_numpy(), found["_score"].to_numpy()
            rankings.append(ids[np.lexsort((ids, -scores))].tolist())
    return rankings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    document: dict[str, Any] = run_facts()
    rows: list[dict[str, Any]] = []

    def tell(way: str, rankings: list[list[int]], **of: int) -> None:
        rows.append({"way": way, **of, **recall(rankings)})
        conditions = "".join(f", {name} {value}" for name, value in of.items())
        figures = " / ".join(f"{rows[-1][f'R@{k}']:.1f}" for k in (1, 5, 10))
        print(f"{way}{conditions}: {figures}", flush=True)

    base = Base.load(arguments.base)
    captions = [str(caption).split("\n") for caption in base.captions[:PHOTOGRAPHS]]
    sentences = [several[4] for several in captions[: arguments.queries]]
    model = load_model("embedded")
    parts = [model.encode_texts(sentences[start : start + 32]).numpy() for start in range(0, len(sentences), 32)]
    scores = np.concatenate(parts) @ base.images[:PHOTOGRAPHS].astype(np.float32).T
    vectors = np.argsort(-scores, axis=1)[:, :DEPTH].tolist()
    print(f"R@1 / 5 / 10 over {len(sentences)} captions, by the captions that a photograph has in the gallery")
    tell("vectors alone", vectors)
    for count in (1, 4):
        words = by_words(["\n".join(several[:count]) for several in captions], sentences)
        tell("words alone", words, captions=count)
        for constant in CONSTANTS:
            index.captions.RRF_CONSTANT = constant
            fused = [[item for item, _ in index.captions.fuse(pair)] for pair in zip(vectors, words)]
            tell("fused", fused, captions=count, constant=constant)
    if arguments.json:
        document |= {"photographs": PHOTOGRAPHS, "queries": len(sentences), "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
