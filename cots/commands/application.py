"""All commands under one name. Each imports what it needs when it runs, so that `cots --help` is quick."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cots import __version__
from cots.commands import index
from cots.commands.embed import embed
from cots.commands.evaluate import evaluate
from cots.commands.options import GalleryOption
from cots.commands.search import search


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
app.command()(search)
app.add_typer(index.app, name="index")
app.command()(embed)
app.command()(evaluate)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cots {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What holds for all commands."""


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/cots_mini.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Settings to change.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only look at the sources, take one step, and say what the run will need.")
    ] = False,
) -> None:
    """Train a model on your own pairs.

    In one process; for several GPUs: torchrun --nproc-per-node N -m pretrain CONFIG ...
    """
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
