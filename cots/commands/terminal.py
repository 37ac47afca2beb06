"""What the commands print: progress on stderr, and results for a person or as JSON on stdout."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cots.errors import CotsError

if TYPE_CHECKING:
    from cots.embed import Progress
    from cots.errors import MediaError


@contextmanager
def progress_bar(verb: str) -> Iterator[tuple[Callable[["Progress"], None], Callable[["MediaError"], None]]]:
    """A bar on stderr for a person, a line every few seconds for a log; and where to report files that cannot be
    read."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f}/s"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task(verb, total=None, rate=0.0)
    last_line = 0.0

    def show(progress: "Progress") -> None:
        nonlocal last_line
        bar.update(task, completed=progress.done + progress.failed, total=progress.total, rate=progress.rate)
        if not console.is_terminal and progress.seconds - last_line >= 5:
            last_line = progress.seconds
            eta = f", {progress.eta:.0f} s left" if progress.eta is not None else ""
            print(f"{verb}: {progress.done} of {progress.total or '?'}, {progress.rate:.0f}/s{eta}", file=sys.stderr)

    def complain(error: "MediaError") -> None:
        console.print(f"unreadable: {error}", markup=False, highlight=False, soft_wrap=True)

    with bar:
        yield show, complain


def print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, ensure_ascii=False))


def write_json(path: Path, document: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CotsError(f"The result cannot be written to {path}: {error.strerror}.") from error


def on_one_line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {part}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}:{rest:04.1f}"
