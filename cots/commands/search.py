"""`cots search`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cots.commands.options import GalleryOption, JsonFlag, gallery_or_embedded
from cots.commands.terminal import clock, print_json

if TYPE_CHECKING:
    from PIL import Image


def search(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="WORDS", help="What to look for, with or without quotes.")
    ] = None,
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
    query = " ".join(words or ())
    if not query.strip() and image is None:
        raise typer.BadParameter("give words to look for, --image FILE, or both")
    if kind not in (None, "image", "video"):
        raise typer.BadParameter(f"--kind is image or video, not {kind!r}")
    if mode not in ("vector", "text", "hybrid"):
        raise typer.BadParameter(f"--mode is vector, text or hybrid, not {mode!r}")
    picture = _open_picture(image) if image else None
    from index.gallery import open_gallery

    opened = open_gallery(gallery_or_embedded(gallery))
    result = opened.search(query, image=picture, without=without, where=where, kind=kind, k=k, mode=mode)
    if json_output:
        print_json(result.to_json())
        return
    for hit in result.hits:
        moment = f"  {clock(hit.start)}-{clock(hit.end)}" if hit.start is not None and hit.end is not None else ""
        typer.echo(f"{hit.rank:3d}  {hit.score:.3f}  {hit.path}{moment}")
        for sentence in hit.caption.splitlines():
            typer.echo(f"            {sentence}")
    if not result.hits:
        conditions = where is not None or kind is not None
        if not len(opened.snapshot):
            why = f"The gallery {opened.directory} is empty; fill it: cots index build SOURCE --gallery DIR"
        elif mode == "text" and not conditions:
            why = "Nothing in the gallery has a caption with these words; --mode vector looks at what is shown."
        else:
            why = "Nothing in the gallery meets these conditions."
        typer.echo(why, err=True)
    took = result.took_ms
    typer.echo(
        f"encode {took['encode']:.0f} ms, search {took['search']:.1f} ms, fetch {took['fetch']:.0f} ms", err=True
    )


def _open_picture(path: Path) -> "Image.Image":
    from cots.data.image_io import open_image

    return open_image(path)
