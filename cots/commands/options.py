"""Arguments and options that several commands take."""

from typing import Annotated

import typer

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
MaxFailures = Annotated[
    float,
    typer.Option(
        "--max-failures",
        min=0,
        max=1,
        metavar="SHARE",
        help="Stop when more than this share of the files cannot be read; by default it goes on without them.",
        show_default=False,
    ),
]
Sources = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE", help="Files, folders, globs, .tar shards, or .jsonl/.csv/.parquet tables."),
]


def gallery_or_embedded(name: str | None) -> str:
    """The gallery that a command was given, or the one that comes with COTS."""
    if name is not None:
        return name
    from cots.embedded import EMBEDDED_GALLERY

    return str(EMBEDDED_GALLERY)
