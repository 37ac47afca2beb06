"""The `cots` command. Each command imports what it needs when it runs, so that `cots --help` is quick."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cots.errors import CotsError

if TYPE_CHECKING:
    from PIL import Image

    from cots.embed import Progress
    from cots.errors import MediaError


class _Command(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """As typer's own, which ends silently on Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Command,
    help="Find images and moments of video by meaning.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
index_app = typer.Typer(help="Build and look after a gallery.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(index_app, name="index")

GalleryOption = Annotated[
    str | None, typer.Option("--gallery", metavar="DIR", help="The gallery; by default the embedded one.")
]
GalleryDirectory = Annotated[str, typer.Option("--gallery", metavar="DIR", help="The gallery's directory.")]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model", metavar="MODEL", help="`embedded`, a directory that training wrote, or open_clip:ARCH/TAG."
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Pictures encoded at once; by default what suits the device.")
]
ENGINES = "auto, exact, hnsw, ivf or ivfpq"
RecallTarget = Annotated[
    float | None,
    typer.Option(
        "--recall", metavar="SHARE", help="Of the ten best hits, how many an approximate engine is to find; first 0.95."
    ),
]
Sources = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE...", help="Files, folders, globs, .tar shards, or .jsonl/.csv/.parquet tables."),
]


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 a user's error (one sentence on stderr), 2 wrong usage, 130 interrupted.
    """
    try:
        app()
    except CotsError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def search(
    query: Annotated[str | None, typer.Argument(help="What to look for, in words.")] = None,
    gallery: GalleryOption = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of hits.")] = 10,
    image: Annotated[Path | None, typer.Option(help="Look for pictures like this one; with words: for both.")] = None,
    without: Annotated[str | None, typer.Option(help="What the hits should not show.")] = None,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help="Only rows that meet a condition, such as \"source = 'holiday'\".")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="image or video.")] = None,
    mode: Annotated[
        str, typer.Option(help="vector: by what is shown; text: by words of captions; hybrid: by both.")
    ] = "vector",
    json_output: JsonFlag = False,
) -> None:
    """Search a gallery by words, by a picture, or by both."""
    if query is None and image is None:
        raise typer.BadParameter("give words to look for, --image FILE, or both")
    if kind not in (None, "image", "video"):
        raise typer.BadParameter(f"--kind is image or video, not {kind!r}")
    if mode not in ("vector", "text", "hybrid"):
        raise typer.BadParameter(f"--mode is vector, text or hybrid, not {mode!r}")
    picture = _open_picture(image) if image else None
    from index.gallery import open_gallery

    result = open_gallery(_gallery(gallery)).search(
        query, image=picture, without=without, where=where, kind=kind, k=k, mode=mode
    )
    if json_output:
        _print_json(result.to_json())
        return
    for hit in result.hits:
        moment = f"  {_clock(hit.start)}-{_clock(hit.end)}" if hit.start is not None and hit.end is not None else ""
        typer.echo(f"{hit.rank:3d}  {hit.score:.3f}  {hit.path}{moment}")
        if hit.caption:
            typer.echo(f"            {hit.caption}")
    if not result.hits:
        typer.echo("Nothing in the gallery meets these conditions.", err=True)
    took = result.took_ms
    typer.echo(
        f"encode {took['encode']:.0f} ms, search {took['search']:.1f} ms, fetch {took['fetch']:.0f} ms", err=True
    )


@index_app.command("build")
def index_build(
    sources: Sources,
    gallery: GalleryDirectory,
    model: ModelOption = "embedded",
    prune: Annotated[bool, typer.Option("--prune", help="Remove items whose files are gone.")] = False,
    batch_size: BatchSize = None,
    engine: Annotated[
        str | None, typer.Option(metavar="ENGINE", help=f"{ENGINES}; by default what the gallery has, at first auto.")
    ] = None,
    recall: RecallTarget = None,
) -> None:
    """Create a gallery, or bring it up to date: only new and changed files are embedded."""
    _require_engine(engine)
    from cots.model.pretrained import load_model
    from index.build import build

    with _progress("embedding") as (progress, complain):
        report = build(
            sources,
            gallery,
            load_model(model),
            prune=prune,
            batch_size=batch_size,
            engine=engine,
            recall_target=recall,
            on_error=complain,
            progress=progress,
        )
    changes = {
        "added": report.added,
        "updated": report.updated,
        "unchanged": report.unchanged,
        "moved": report.moved,
        "relabelled": report.relabelled,
        "removed": report.pruned,
        "unreadable": len(report.failed),
    }
    done = ", ".join(f"{count} {change}" for change, count in changes.items() if count) or "nothing to do"
    rate = f" ({report.rate:.0f} items/s)" if report.rate else ""
    typer.echo(
        f"{gallery}: {done} in {report.seconds:.1f} s{rate}; it holds {report.items} items, {report.vectors} vectors."
    )
    if report.failed and not report.items:
        raise CotsError(f"None of the {len(report.failed)} files could be read, so the gallery {gallery} is empty.")
    if report.missing:
        typer.echo(f"{len(report.missing)} items' files are gone; --prune removes them from the gallery.", err=True)


@index_app.command("remove")
def index_remove(
    gallery: GalleryDirectory, where: Annotated[str, typer.Option(metavar="SQL", help="Which items to remove.")]
) -> None:
    """Remove items from a gallery; the files themselves stay."""
    from index.build import remove

    typer.echo(f"{remove(gallery, where)} items removed.")


@index_app.command("info")
def index_info(gallery: GalleryOption = None, json_output: JsonFlag = False) -> None:
    """What a gallery holds and which model built it."""
    from index.build import info

    document = info(_gallery(gallery))
    if json_output:
        _print_json(document)
        return
    for name, value in document.items():
        typer.echo(f"{name:18} {_on_one_line(value)}")


@index_app.command("engine")
def index_engine(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help=f"{ENGINES}.")],
    gallery: GalleryDirectory,
    recall: RecallTarget = None,
) -> None:
    """Change what answers queries, and measure it; nothing is embedded again."""
    _require_engine(engine)
    from cots.model.pretrained import load_model
    from index.engine import set_engine
    from index.gallery import open_gallery

    model = load_model(open_gallery(gallery).manifest.model)
    for name, value in set_engine(gallery, engine, recall_target=recall, model=model).items():
        typer.echo(f"{name:18} {_on_one_line(value)}")


@index_app.command("compact")
def index_compact(gallery: GalleryDirectory) -> None:
    """Merge the table's fragments, drop removed rows and old versions, and index new captions."""
    from index.compaction import compact

    report = compact(gallery)
    typer.echo(
        f"{gallery}: {report.bytes_before / 1e6:.1f} MB became {report.bytes_after / 1e6:.1f} MB, "
        f"{report.fragments_before} fragments {report.fragments_after}."
    )


@index_app.command("duplicates")
def index_duplicates(
    gallery: GalleryOption = None,
    threshold: Annotated[float, typer.Option(metavar="COSINE", help="The least similarity of near-duplicates.")] = 0.95,
    json_output: JsonFlag = False,
) -> None:
    """List files that a gallery holds more than once: the same bytes, or nearly the same picture."""
    from index.duplicates import find_duplicates

    found = find_duplicates(_gallery(gallery), threshold)
    if json_output:
        _print_json(found.to_json())
        return
    for title, groups in (("the same bytes", found.exact), (f"similar to {threshold:g} or more", found.near)):
        for group in groups:
            typer.echo(f"{title} ({group.similarity:.3f})" if group.similarity < 1 else title)
            for copy in group.copies:
                typer.echo(f"  {copy.id:8d}  {copy.path}")
    copies = sum(len(group.copies) - 1 for group in found.exact)
    typer.echo(f"{copies} superfluous copies in {len(found.exact)} groups; {len(found.near)} groups of similar items.")


@index_app.command("check")
def index_check(gallery: GalleryOption = None) -> None:
    """Verify a gallery: table, manifest, vectors and media agree. Exit code 1 if they do not."""
    from index.check import check

    problems = check(_gallery(gallery))
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo("The gallery is sound.")


@app.command()
def embed(
    sources: Sources,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The Parquet file to write.")],
    model: ModelOption = "embedded",
    batch_size: BatchSize = None,
) -> None:
    """Embed images and videos into a Parquet file, for use elsewhere."""
    from cots.data.samples import iter_samples
    from cots.embed import embed as embed_samples
    from cots.embed import write_parquet
    from cots.model.pretrained import load_model

    with _progress("embedding") as (progress, complain):
        encoder = load_model(model)
        samples = list(iter_samples(sources, complain))
        embedded = embed_samples(
            samples, encoder, on_error=complain, batch_size=batch_size, total=len(samples), progress=progress
        )
        try:
            rows = write_parquet(out, embedded, encoder)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise CotsError(f"The vectors cannot be written to {out}: {reason}.") from error
    typer.echo(f"{rows} vectors of {encoder.dimension} dimensions written to {out}.")


@app.command()
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
    list_all: Annotated[bool, typer.Option("--list", help="Show the protocols and what others reported.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.json B.json", help="Instead: is result B better than A? A paired bootstrap."),
    ] = None,
    max_failures: Annotated[
        float, typer.Option(min=0, max=1, help="Share of items that may be unreadable; they count as never found.")
    ] = 0.01,
    batch_size: BatchSize = None,
) -> None:
    """Measure retrieval both ways: R@1, R@5, R@10, median and mean rank, with intervals."""
    from cots.evaluation import tables

    if list_all:
        typer.echo(tables.list_protocols())
    elif compare is not None:
        _compare(*compare, json_file)
    elif protocol is None:
        raise typer.BadParameter("name a protocol or a file, or give --list or --compare")
    else:
        _evaluate(protocol, data, model, json_file, report, max_failures, batch_size)


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
    from cots.evaluation.protocols import find_protocol, is_file_name, open_protocol
    from cots.evaluation.report import write_report
    from cots.evaluation.tables import as_text
    from cots.model.pretrained import load_model

    chosen = None if is_file_name(protocol) else find_protocol(protocol)
    if chosen and data is None:
        raise typer.BadParameter(f"{protocol} is a protocol: give --data DIR, the folder with its captions and media")
    test_set = open_protocol(chosen, data) if chosen and data else read_evaluation_set(protocol)
    for warning in test_set.warnings:
        typer.echo(f"note: {warning}", err=True)
    if chosen and chosen.is_training:
        typer.echo(
            f"{chosen.title}: {len(test_set.items):,} videos and {len(test_set.captions):,} captions, all there."
        )
        return
    with _progress("evaluating") as (progress, _):
        result = measure(
            test_set, load_model(model), max_bad_share=max_failures, batch_size=batch_size, progress=progress
        )
    document = result.to_json()
    for name, reason in result.failures.items():
        typer.echo(f"unreadable, counted as never found: {name}: {reason}", err=True)
    page = write_report(result, document, report) if report else None
    if json_file is not None and str(json_file) == "-":
        _print_json(document)
        return
    if json_file is not None:
        _write_json(json_file, document)
    typer.echo(as_text(document))
    if page:
        typer.echo(f"report: {page}")


def _compare(first: Path, second: Path, json_file: Path | None) -> None:
    from cots.evaluation.comparison import as_json, compare
    from cots.evaluation.tables import comparison_text

    differences, rsum = compare(first, second)
    document = as_json(differences, rsum, first, second)
    if json_file is not None and str(json_file) == "-":
        _print_json(document)
        return
    if json_file is not None:
        _write_json(json_file, document)
    typer.echo(comparison_text(differences, rsum, str(first), str(second)))


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/cots_mini.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings to change.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only look at the sources, take one step, and say what the run will need.")
    ] = False,
) -> None:
    """Train a model in one process; for several GPUs: torchrun --nproc-per-node N -m pretrain CONFIG ..."""
    from pretrain.launch import launch

    launch(config, overrides or [], check)


@app.command()
def demo(
    gallery: GalleryOption = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="By default the model that built the gallery.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 7860,
) -> None:
    """Open the search page on a gallery."""
    from demo.app import launch

    launch(gallery, host, port, model)


def _gallery(name: str | None) -> str:
    if name is not None:
        return name
    from cots.embedded import EMBEDDED_GALLERY

    return str(EMBEDDED_GALLERY)


def _open_picture(path: Path) -> "Image.Image":
    from cots.data.image_io import open_image

    return open_image(path)


@contextmanager
def _progress(verb: str) -> Iterator[tuple[Callable[["Progress"], None], Callable[["MediaError"], None]]]:
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


def _require_engine(engine: str | None) -> None:
    if engine is not None and engine not in ("auto", "exact", "hnsw", "ivf", "ivfpq"):
        raise typer.BadParameter(f"the engine is {ENGINES}, not {engine!r}")


def _on_one_line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {part}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, ensure_ascii=False))


def _write_json(path: Path, document: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CotsError(f"The result cannot be written to {path}: {error.strerror}.") from error


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}"


if __name__ == "__main__":
    main()
