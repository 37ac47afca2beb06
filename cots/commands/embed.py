"""`cots embed`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from cots.commands.options import BatchSize, ModelOption, Sources
from cots.commands.terminal import counted, progress_bar
from cots.errors import CotsError


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

    with progress_bar("embedding") as (progress, complain):
        encoder = load_model(model, bulk=True)
        samples = list(iter_samples(sources, complain))
        embedded = embed_samples(
            samples, encoder, on_error=complain, batch_size=batch_size, total=len(samples), progress=progress
        )
        try:
            rows = write_parquet(out, embedded, encoder)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise CotsError(f"The vectors cannot be written to {out}: {reason}.") from error
    typer.echo(f"{counted(rows, 'vector')} of {encoder.dimension} dimensions written to {out}.")
