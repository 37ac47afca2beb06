"""`cots evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cots.commands.options import BatchSize, ModelOption
from cots.commands.terminal import counted, print_json, progress_bar, write_json

if TYPE_CHECKING:
    from cots.evaluation.evaluation_set import EvaluationSet
    from cots.evaluation.protocols import Protocol


def evaluate(
    protocol: Annotated[
        str | None,
        typer.Argument(
            metavar="PROTOCOL|FILE.jsonl", help="A protocol of --list, or a file of captioned images or videos."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="The folder with a protocol's captions and media.")
    ] = None,
    model: ModelOption = "embedded",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write the result there too; - for stdout only.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write an HTML page, Markdown and JSON there.")
    ] = None,
    list_all: Annotated[
        bool, typer.Option("--list", help="Show the protocols, or the one named, and what others reported.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.json B.json", help="Instead: is result B better than A? A paired bootstrap."),
    ] = None,
    max_failures: Annotated[
        float, typer.Option(min=0, max=1, help="Share of items that may be unreadable; they count as never found.")
    ] = 0.01,
    batch_size: BatchSize = None,
) -> None:
    """Measure retrieval by a protocol, or over your own items.

    R@1, R@5, R@10, median and mean rank, from texts to items and back, with intervals.
    """
    from cots.evaluation import tables
    from cots.evaluation.protocols import find_protocol

    if list_all:
        _refuse("--list", {"--compare": compare, "--data": data, "--json": json_file, "--report": report})
        typer.echo(tables.list_protocols(*([find_protocol(protocol).name] if protocol else [])))
    elif compare is not None:
        _refuse("--compare", {protocol: protocol, "--data": data, "--report": report})
        _compare(*compare, json_file)
    elif protocol is None:
        raise typer.BadParameter("name a protocol or a file, or give --list or --compare")
    else:
        _evaluate(protocol, data, model, json_file, report, max_failures, batch_size)


def _refuse(option: str, others: dict[str | None, object]) -> None:
    """An option beside one that leaves it without effect is a misunderstanding."""
    if given := [str(name) for name, value in others.items() if value is not None]:
        raise typer.BadParameter(f"{option} does not go with {' and '.join(given)}; leave out one or the other")


def _evaluate(
    protocol: str,
    data: Path | None,
    model: str,
    json_file: Path | None,
    report: Path | None,
    max_failures: float,
    batch_size: int | None,
) -> None:
    from cots.evaluation.evaluate import measure
    from cots.evaluation.evaluation_set import read_evaluation_set
    from cots.evaluation.protocols import PROTOCOLS, find_protocol, is_file_name, open_protocol
    from cots.evaluation.report import write_report
    from cots.evaluation.tables import as_text
    from cots.model.pretrained import load_model

    is_file = is_file_name(protocol) and (data is None or protocol not in PROTOCOLS)
    if is_file and data is not None:
        raise typer.BadParameter(f"--data is for a protocol; paths in a file such as {protocol} are relative to it")
    chosen = None if is_file else find_protocol(protocol)
    if chosen and chosen.is_training and (json_file is not None or report is not None):
        raise typer.BadParameter(
            f"{protocol} is a training list, which is verified only: leave out --json and --report"
        )
    _prepare_outputs(json_file, report)
    if chosen and data is None:
        raise typer.BadParameter(f"{protocol} is a protocol: give --data DIR, the folder with its captions and media")
    test_set = open_protocol(chosen, data) if chosen and data else read_evaluation_set(protocol)
    for warning in test_set.warnings:
        typer.echo(f"note: {warning}", err=True)
    if chosen and chosen.is_training:
        _tell_what_is_there(chosen, test_set, max_failures)
        return
    with progress_bar("evaluating") as (progress, _):
        result = measure(
            test_set, load_model(model), max_bad_share=max_failures, batch_size=batch_size, progress=progress
        )
    document = result.to_json()
    for name, reason in result.failures.items():
        typer.echo(f"unreadable, counted as never found: {name}: {reason}", err=True)
    page = write_report(result, document, report) if report else None
    if json_file is not None and str(json_file) == "-":
        print_json(document)
        return
    if json_file is not None:
        write_json(json_file, document)
    typer.echo(as_text(document))
    if page:
        typer.echo(f"report: {page}")


def _tell_what_is_there(protocol: "Protocol", test_set: "EvaluationSet", max_failures: float) -> None:
    from cots.errors import EvaluationError

    unreadable = [item for item in test_set.items if item.sample is None]
    for item in unreadable:
        typer.echo(f"unreadable: {item.name}: {item.problem}", err=True)
    if len(unreadable) > max_failures * len(test_set.items):
        raise EvaluationError(
            f"{len(unreadable)} of {counted(len(test_set.items), protocol.kind)} of {protocol.name} cannot be opened, "
            f"more than {100 * max_failures:.3g}%. Mend them, or allow more with --max-failures."
        )
    rest = f"; {len(unreadable):,} of the videos cannot be opened." if unreadable else ", all there."
    held = f"{counted(len(test_set.items), protocol.kind)} and {counted(len(test_set.captions), 'caption')}"
    typer.echo(f"{protocol.title}: {held}{rest}")


def _prepare_outputs(json_file: Path | None, report: Path | None) -> None:
    """Refuse before the evaluation what could not be written after it: that takes minutes."""
    from cots.errors import EvaluationError

    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        reason = "it is a folder" if json_file.is_dir() else f"there is no folder {json_file.parent}"
        raise EvaluationError(f"The result cannot be written to {json_file}: {reason}.")
    if report is not None:
        try:
            report.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(f"The report cannot be written to {report}: {error.strerror}.") from error


def _compare(first: Path, second: Path, json_file: Path | None) -> None:
    from cots.evaluation.comparison import compare
    from cots.evaluation.tables import comparison_text

    comparison = compare(first, second)
    document = comparison.to_json()
    if json_file is not None and str(json_file) == "-":
        print_json(document)
        return
    if json_file is not None:
        write_json(json_file, document)
    typer.echo(comparison_text(comparison))
