"""Two results on the same queries: is one better, or was it luck?

cots evaluate --compare a.json b.json
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cots.errors import EvaluationError
from cots.evaluation.bootstrap import Difference, Queries, differences

Document = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    first, second: the files.
    models: of the two, each with its fingerprint.
    directions: the differences of every figure, second minus first.
    rsum: that of RSum.
    notes: in what the two differ besides their models.
    """

    first: str
    second: str
    models: tuple[str, str]
    directions: dict[str, dict[str, Difference]]
    rsum: Difference
    notes: tuple[str, ...]

    def to_json(self) -> Document:
        """The document that `cots evaluate --compare A B --json` writes."""
        sides = {way: {name: asdict(one) for name, one in side.items()} for way, side in self.directions.items()}
        files = {"first": self.first, "second": self.second, "models": list(self.models)}
        return {**files, **sides, "RSum": asdict(self.rsum), "notes": list(self.notes)}


def compare(first: str | Path, second: str | Path) -> Comparison:
    """Paired bootstrap of the second result minus the first: every figure of both directions, and RSum.

    Args:
        first, second: JSON documents that `cots evaluate --json` wrote.

    Raises:
        EvaluationError: a file is no such document, or the two are not about the same captions and items.
    """
    (before, before_ranks), (after, after_ranks) = _read(first), _read(second)
    if before["queries"]["digest"] != after["queries"]["digest"] or not _are_paired(before_ranks, after_ranks):
        raise EvaluationError(
            f"{first} ({before['protocol']}) and {second} ({after['protocol']}) are not about the same captions, so "
            "their ranks cannot be compared query by query."
        )
    directions, rsum = differences(before_ranks, after_ranks)
    models = (_model(before), _model(after))
    return Comparison(str(first), str(second), models, directions, rsum, tuple(_notes(before, after)))


def _read(path: str | Path) -> tuple[Document, dict[str, Queries]]:
    """A result, and the queries of each of its directions."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"The result {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise EvaluationError(f"The result {path} is not JSON ({error}).") from error
    if not isinstance(document, dict) or not isinstance(document.get("queries"), dict):
        raise EvaluationError(f"{path} is no result that `cots evaluate --json` wrote: it has no ranks of its queries.")
    lacking = [key for key in ("protocol", "model", "fingerprint", "decode_failures") if key not in document]
    try:
        sides = {way: _queries(side) for way, side in document["queries"].items() if way != "digest"}
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"The ranks of {path} are damaged ({type(error).__name__}: {error}).") from error
    if lacking or not sides or "digest" not in document["queries"]:
        raise EvaluationError(f"{path} is a part of a result: it has no {', '.join(lacking) or 'digest or no ranks'}.")
    try:
        _lost(document)
        _model(document)
    except (TypeError, KeyError) as error:
        raise EvaluationError(f"The model or the failures of {path} are damaged ({error}).") from error
    return document, sides


def _queries(side: dict[str, Any]) -> Queries:
    """The queries of a direction; a result may lack the precision of each, and then mAP@10 is not compared."""
    ranks, units = (np.array(side[key], dtype=np.int64) for key in ("ranks", "units"))
    precision = np.array(side["precision"], dtype=np.float64) if "precision" in side else None
    if ranks.ndim != 1 or not len(ranks) or ranks.min() < 1 or units.shape != ranks.shape or units.min() < 0:
        raise ValueError("not a rank from 1 and a unit from 0 of every query")
    if len(np.unique(units)) <= units.max():
        raise ValueError("a unit without a query")
    if precision is not None and precision.shape != ranks.shape:
        raise ValueError("not a precision of every query")
    return Queries(ranks, units, precision)


def _are_paired(first: dict[str, Queries], second: dict[str, Queries]) -> bool:
    """Whether query by query two results are about the same units."""
    return first.keys() == second.keys() and all(
        np.array_equal(side.units, second[way].units) for way, side in first.items()
    )


def _model(document: Document) -> str:
    return f"{document['model']} ({document['fingerprint'][:12]})"


def _lost(document: Document) -> set[str]:
    """The items that could not be read."""
    return {failure["path"] for failure in document["decode_failures"]}


def _notes(before: Document, after: Document) -> list[str]:
    """What else than the model could have made the difference."""
    notes = []
    inputs = {"frames": "frames of each video", "until": "seconds of each video", "image_size": "pixels a side"}
    for key, words in inputs.items():
        if before.get(key) != after.get(key):
            notes.append(f"{words}: {before.get(key)} in the first, {after.get(key)} in the second")
    lost = _lost(before), _lost(after)
    if lost[0] != lost[1]:
        notes.append(f"items that could not be read: {len(lost[0])} in the first, {len(lost[1])} in the second")
    if before["fingerprint"] == after["fingerprint"]:
        notes.append("both results are of one model")
    return notes
