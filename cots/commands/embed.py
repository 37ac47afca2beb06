"""`cots embed`."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cots.commands.options import BatchSize, MaxFailures, ModelOption, Sources
from cots.commands.terminal import counted, progress_bar
from cots.errors import CotsError

if TYPE_CHECKING:
    from cots.embed import Embedded


def embed(
    sources: Sources,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The Parquet file to write.")],
    model: ModelOption = "embedded",
    batch_size: BatchSize = None,
    max_failures: MaxFailures = 1.0,
) -> None:
    """Embed images and videos into a Parquet file, for use elsewhere."""
    if out.is_dir():
        raise CotsError(f"The vectors cannot be written to {out}: it is a folder.")
    from cots.bad_files import BadFiles
    from cots.data.samples import iter_samples
    from cots.embed import embed as embed_samples
    from cots.embed import write_parquet
    from cots.model.pretrained import load_model

    def not_nothing(embedded: Iterator["Embedded"]) -> Iterator["Embedded"]:
        readable = False
        for item in embedded:
            readable = True
            yield item
        if failed.errors and not readable:
            raise CotsError(f"No file could be read ({len(failed.errors)} tried), so {out} is not written.")

    with progress_bar("embedding") as (progress, complain):
        encoder = load_model(model, bulk=True)
        advice = f"{out} is not written: mend the files, or allow more (--max-failures)"
        failed = BadFiles(max_failures, complain, advice)
        samples = list(iter_samples(sources, failed))
        failed.of(len(samples) + len(failed.errors))
        embedded = embed_samples(
            samples, encoder, on_error=failed, batch_size=batch_size, total=len(samples), progress=progress
        )
        try:
            rows = write_parquet(out, not_nothing(embedded), encoder)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise CotsError(f"The vectors cannot be written to {out}: {reason}.") from error
    left_out = f"; {counted(len(failed.errors), 'file')} could not be read" if failed.errors else ""
    typer.echo(f"{counted(rows, 'vector')} of {encoder.dimension} dimensions written to {out}{left_out}.")
