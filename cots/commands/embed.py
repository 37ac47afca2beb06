"""`cots embed`."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cots.commands.options import BatchSize, ModelOption, Sources
from cots.commands.terminal import counted, progress_bar
from cots.errors import CotsError, MediaError

if TYPE_CHECKING:
    from cots.embed import Embedded


def embed(
    sources: Sources,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The Parquet file to write.")],
    model: ModelOption = "embedded",
    batch_size: BatchSize = None,
) -> None:
    """Embed images and videos into a Parquet file, for use elsewhere."""
    if out.is_dir():
        raise CotsError(f"The vectors cannot be written to {out}: it is a folder.")
    from cots.data.samples import iter_samples
    from cots.embed import embed as embed_samples
    from cots.embed import write_parquet
    from cots.model.pretrained import load_model

    failed = 0

    def count(error: MediaError) -> None:
        nonlocal failed
        failed += 1
        complain(error)

    def not_nothing(embedded: Iterator["Embedded"]) -> Iterator["Embedded"]:
        readable = False
        for item in embedded:
            readable = True
            yield item
        if failed and not readable:
            raise CotsError(f"No file could be read ({failed} tried), so {out} is not written.")

    with progress_bar("embedding") as (progress, complain):
        encoder = load_model(model, bulk=True)
        samples = list(iter_samples(sources, count))
        embedded = embed_samples(
            samples, encoder, on_error=count, batch_size=batch_size, total=len(samples), progress=progress
        )
        try:
            rows = write_parquet(out, not_nothing(embedded), encoder)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise CotsError(f"The vectors cannot be written to {out}: {reason}.") from error
    typer.echo(f"{counted(rows, 'vector')} of {encoder.dimension} dimensions written to {out}.")
