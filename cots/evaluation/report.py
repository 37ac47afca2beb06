"""A result as files: report.json, report.md and index.html, a page that stands alone."""

import json
from pathlib import Path
from typing import Any

from cots.errors import EvaluationError
from cots.evaluation.evaluate import EvaluationResult
from cots.evaluation.examples import Example, pick_examples, thumbnail
from cots.evaluation.page import render
from cots.evaluation.tables import as_markdown

PAGE = "index.html"


def write_report(result: EvaluationResult, document: dict[str, Any], folder: str | Path) -> Path:
    """Write the report of a result.

    The page holds small pictures of the items that it shows: mind their licence before you publish it.

    Args:
        result: what was measured.
        document: its `to_json`.
        folder: is made if it does not exist; files of the same names are replaced.

    Returns:
        The page.

    Raises:
        EvaluationError: the files cannot be written.
    """
    folder = Path(folder)
    examples = {direction: pick_examples(result, direction) for direction in result.rankings}
    shown = {item for worst, best in examples.values() for one in (*worst, *best) for item in _items(one)}
    samples = {item: result.test_set.items[item].sample for item in sorted(shown)}
    pictures = {item: thumbnail(sample) if sample else None for item, sample in samples.items()}
    page = render(document, examples, pictures, [item.name for item in result.test_set.items])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(as_markdown(document), encoding="utf-8")
        (folder / PAGE).write_text(page, encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"The report cannot be written to {folder}: {error.strerror}.") from error
    return folder / PAGE


def _items(example: Example) -> list[int]:
    return [example.item, example.wanted.item, *(answer.item for answer in example.returned)]
