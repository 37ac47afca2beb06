"""`cots index ...`: build a gallery and look after it."""

from typing import Annotated

import typer

from cots.commands.options import (
    BatchSize,
    GalleryDirectory,
    GalleryOption,
    JsonFlag,
    MaxFailures,
    ModelOption,
    Sources,
    gallery_or_embedded,
)
from cots.commands.terminal import counted, on_one_line, print_json, progress_bar
from cots.errors import CotsError
from index.engine_names import ENGINES, ENGINES_IN_WORDS

app = typer.Typer(help="Build and look after a gallery.", no_args_is_help=True, rich_markup_mode=None)

RecallTarget = Annotated[
    float | None,
    typer.Option(
        "--recall", metavar="SHARE", help="Of the ten best hits, how many an approximate engine is to find; first 0.95."
    ),
]


@app.command("build")
def build(
    sources: Sources,
    gallery: GalleryDirectory,
    model: ModelOption = "embedded",
    table: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URI",
            help="Where a new gallery's table is to lie: another folder, or s3://, gs:// or az://BUCKET/PREFIX.",
        ),
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove items whose files are gone.")] = False,
    batch_size: BatchSize = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="ENGINE", help=f"{ENGINES_IN_WORDS}; by default what the gallery has, at first auto."),
    ] = None,
    recall: RecallTarget = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Embed by N processes, best one a GPU; by default by this one. With --cluster: by N actors.",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS", metavar="ADDRESS", help="Embed on a Ray cluster; `auto`: the one this machine is in."
        ),
    ] = None,
    max_failures: MaxFailures = 1.0,
) -> None:
    """Create a gallery, or bring it up to date.

    Only new and changed files are embedded.
    """
    _require_engine(engine)
    from cots.model.pretrained import load_model
    from index.build import build

    with progress_bar("embedding") as (progress, complain):
        report = build(
            sources,
            gallery,
            load_model(model, bulk=True),
            table=table,
            prune=prune,
            batch_size=batch_size,
            workers=workers,
            cluster=cluster,
            max_bad_share=max_failures,
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
    rate = f" ({report.rate:.{0 if report.rate >= 10 else 1}f} items/s)" if report.rate else ""
    held = f"{counted(report.items, 'item')}, {counted(report.vectors, 'vector')}"
    typer.echo(f"{gallery}: {done} in {report.seconds:.1f} s{rate}; it holds {held}.")
    if report.failed and not report.items:
        raise CotsError(f"No file could be read ({len(report.failed)} tried), so the gallery {gallery} is empty.")
    if report.missing:
        typer.echo(f"Files that are gone: {len(report.missing)}; --prune removes their items.", err=True)


@app.command("remove")
def remove(
    gallery: GalleryDirectory, where: Annotated[str, typer.Option(metavar="SQL", help="Which items to remove.")]
) -> None:
    """Remove items; the files themselves stay."""
    from index.build import remove

    count = remove(gallery, where)
    typer.echo(f"{counted(count, 'item')} removed.")


@app.command("info")
def info(gallery: GalleryOption = None, json_output: JsonFlag = False) -> None:
    """What it holds and which model built it."""
    from index.build import info

    document = info(gallery_or_embedded(gallery))
    if json_output:
        print_json(document)
        return
    for name, value in document.items():
        typer.echo(f"{name:18} {on_one_line(value)}")


@app.command("engine")
def engine(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help=f"{ENGINES_IN_WORDS}.")],
    gallery: GalleryDirectory,
    recall: RecallTarget = None,
) -> None:
    """Change what answers queries, and measure it.

    Nothing is embedded again.
    """
    _require_engine(engine)
    from cots.model.pretrained import load_model
    from index.engine import set_engine
    from index.gallery import open_gallery

    model = load_model(open_gallery(gallery).manifest.model)
    for name, value in set_engine(gallery, engine, recall_target=recall, model=model).items():
        typer.echo(f"{name:18} {on_one_line(value)}")


@app.command("compact")
def compact(gallery: GalleryDirectory) -> None:
    """Free what removals and updates left behind.

    Merges the table's fragments, drops removed rows and old versions, and makes the index of captions again.
    """
    from index.compaction import compact

    report = compact(gallery)
    typer.echo(
        f"{gallery}: {report.bytes_before / 1e6:.2f} MB became {report.bytes_after / 1e6:.2f} MB, "
        f"{counted(report.fragments_before, 'fragment')} {report.fragments_after}."
    )


@app.command("adopt")
def adopt(gallery: GalleryDirectory) -> None:
    """Let this copy write to a table outside.

    The copy that did no longer may.
    """
    from index.gallery import adopt_table

    typer.echo(f"{gallery} writes to {adopt_table(gallery)} from now on.")


@app.command("duplicates")
def duplicates(
    gallery: GalleryOption = None,
    threshold: Annotated[float, typer.Option(metavar="COSINE", help="The least similarity of near-duplicates.")] = 0.95,
    json_output: JsonFlag = False,
) -> None:
    """List files that it holds more than once.

    The same bytes, or nearly the same picture.
    """
    from index.duplicates import find_duplicates

    found = find_duplicates(gallery_or_embedded(gallery), threshold)
    if json_output:
        print_json(found.to_json())
        return
    for title, groups in (("the same bytes", found.exact), (f"similar to {threshold:g} or more", found.near)):
        for group in groups:
            typer.echo(f"{title} ({group.similarity:.3f})" if group.similarity < 1 else title)
            for copy in group.copies:
                typer.echo(f"  {copy.id:8d}  {copy.path}")
    copies = sum(len(group.copies) - 1 for group in found.exact)
    superfluous = "1 superfluous copy" if copies == 1 else f"{copies:,} superfluous copies"
    exact, near = counted(len(found.exact), "group"), counted(len(found.near), "group")
    typer.echo(f"{superfluous} in {exact}; {near} of similar items.")


@app.command("check")
def check(gallery: GalleryOption = None) -> None:
    """Verify that all its parts agree.

    Table, manifest, vectors and media. Exit code 1 if they do not.
    """
    from index.check import check

    problems = check(gallery_or_embedded(gallery))
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo("The gallery is sound.")


def _require_engine(engine: str | None) -> None:
    if engine is not None and engine not in ENGINES:
        raise typer.BadParameter(f"the engine is {ENGINES_IN_WORDS}, not {engine!r}")
