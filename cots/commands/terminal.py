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
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task(verb, total=None, rate="")
    last_line = 0.0

    def show(progress: "Progress") -> None:
        nonlocal last_line
        seen, rate = progress.done + progress.failed, per_second(progress.rate)
        bar.update(task, completed=seen, total=progress.total, rate=rate)
        if not console.is_terminal and progress.seconds - last_line >= 5:
            last_line = progress.seconds
            eta = f", {progress.eta:.0f} s left" if progress.eta is not None else ""
            print(f"{verb}: {seen} of {progress.total or '?'}, {rate}{eta}", file=sys.stderr)

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


def per_second(rate: float) -> str:
    """Also of slow work, such as films on a laptop, more than a zero."""
    return f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s"


def counted(number: int, noun: str) -> str:
    """1 item, 2,000 items."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}:{rest:04.1f}"
