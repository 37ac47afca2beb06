"""Two results on the same queries: is one better, or was it luck?

cots evaluate --compare a.json b.json
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cots.errors import EvaluationError
from cots.evaluation.bootstrap import Difference, Queries, differences
from cots.evaluation.tables import directions_of


def compare(first: str | Path, second: str | Path) -> tuple[dict[str, dict[str, Difference]], Difference]:
    """Paired bootstrap of the second result minus the first: every figure of both directions, and RSum.

    Args:
        first, second: JSON documents that `cots evaluate --json` wrote.

    Raises:
        EvaluationError: a file is no such document, or the two are not about the same captions and items.
    """
    before, after = _read(first), _read(second)
    if before["queries"]["digest"] != after["queries"]["digest"]:
        raise EvaluationError(
            f"{first} ({before['protocol']}) and {second} ({after['protocol']}) are not about the same captions, so "
            "their ranks cannot be compared query by query."
        )
    return differences(_queries(before), _queries(after))


def as_json(
    result: dict[str, dict[str, Difference]], rsum: Difference, first: str | Path, second: str | Path
) -> dict[str, Any]:
    """The document that `cots evaluate --compare A B --json` writes."""
    sides = {direction: {name: asdict(one) for name, one in side.items()} for direction, side in result.items()}
    return {"first": str(first), "second": str(second), **sides, "RSum": asdict(rsum)}


def _read(path: str | Path) -> dict[str, Any]:
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"The result {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise EvaluationError(f"The result {path} is not JSON ({error}).") from error
    if not isinstance(document, dict) or "queries" not in document:
        raise EvaluationError(f"{path} is no result that `cots evaluate --json` wrote: it has no ranks of its queries.")
    return document


def _queries(document: dict[str, Any]) -> dict[str, Queries]:
    sides = document["queries"]
    return {
        name: Queries(np.array(sides[name]["ranks"]), np.array(sides[name]["units"]))
        for name in directions_of(document)
    }
