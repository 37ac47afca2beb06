"""The page as a Gradio app: one `gr.HTML` that holds it, and the same search as the API endpoint `/search`."""

import logging
from collections.abc import Sequence
from html import escape
from pathlib import Path, PurePath
from string import Template
from typing import Any, Literal

import gradio as gr
from gradio_client.utils import is_http_url_like
from pydantic import BaseModel, Field, ValidationError

from cots.data.image_io import open_image
from cots.embedded import EMBEDDED_GALLERY
from cots.errors import CotsError, GalleryError
from demo.cards import cards
from demo.engine import PICTURE_SIDE, Engine, Shelf
from index.search import SearchResult

STATIC = Path(__file__).parent / "static"
STEP = 30
MOST = 20 * STEP
# Searches to begin with: of the gallery inside the package, and of anybody's folders.
EXAMPLES = (
    "a castle by the water",
    "birds on the water",
    "something sweet to eat",
    "a musical instrument",
    "a galaxy in space",
    "a wild animal in the grass",
)
EVERYDAY_EXAMPLES = (
    "two dogs on a beach",
    "people around a table",
    "mountains in the snow",
    "a child on a bicycle",
    "a street at night",
    "somebody making music",
)
# Linked from the head rather than given to Gradio as css: fonts are addressed relative to the stylesheet.
HEAD = (
    '<link rel="stylesheet" href="page/page.css"><link rel="stylesheet" href="page/results.css">'
    '<meta name="color-scheme" content="light dark">'
)
log = logging.getLogger(__name__)


class Ask(BaseModel):
    """What the page asks for; an empty value means "any".

    Attributes:
        picture: token of a picture that `Engine.keep_picture` holds.
        like: id of a row.
        mode: as of `Searcher.search`; without words to find in captions everything is compared as vectors.
        skip, k: the hits from `skip` on, up to the k-th.
    """

    text: str = Field("", max_length=1000)
    without: str = Field("", max_length=500)
    kind: Literal["", "image", "video"] = ""
    source: str = ""
    picture: str = ""
    like: int | Literal[""] = ""
    mode: Literal["", "vector", "text", "hybrid"] = ""
    skip: int = Field(0, ge=0, le=MOST)
    k: int = Field(STEP, ge=1, le=MOST)

    @property
    def searches(self) -> bool:
        return bool(self.text.strip() or self.picture or self.like != "")

    @property
    def ranking(self) -> str:
        return (self.text.strip() and self.mode) or "vector"


def upload_only(component: gr.File) -> gr.File:
    """Have a component take only files that came with the request: Gradio also fetches from addresses that it names.

    Set on the object, because Gradio writes a stub file beside the source of every class derived from a component.
    """
    keep = component.async_move_resource_to_block_cache

    async def keep_upload(url_or_file_path: str | Path | None) -> str | None:
        if is_http_url_like(str(url_or_file_path)):
            raise gr.Error("Upload the picture: nothing is fetched from other machines.", print_exception=False)
        return await keep(url_or_file_path)

    component.async_move_resource_to_block_cache = keep_upload  # type: ignore[method-assign]
    return component


def build_page(engine: Engine) -> gr.Blocks:
    """The page and its API over an engine."""

    def find(ask: dict[str, Any]) -> dict[str, Any]:
        try:
            return answer(engine, Ask.model_validate(ask))
        except CotsError as error:
            return {"message": str(error)}
        except ValidationError as error:
            return {"message": misunderstood(error)}
        except Exception:
            log.exception("The search %r failed", ask)
            return {"message": "The search failed; the terminal that runs cots demo says why."}

    def search(
        text: str = "", image: bytes | None = None, without: str = "", kind: str = "", source: str = "", k: int = 10
    ) -> dict[str, Any]:
        """Search the gallery by a text, a picture or both; returns the document that `cots search --json` prints."""
        try:
            picture = open_image(image, target_size=PICTURE_SIDE) if image else None
            return engine.search(text or "", picture, without or "", kind or "", source or "", k=int(k)).to_json()
        except CotsError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def search_captions(
        text: str = "", mode: str = "hybrid", kind: str = "", source: str = "", k: int = 10
    ) -> dict[str, Any]:
        """Search by words of captions (mode "text"), or by these and by what is shown ("hybrid"); replies as `search`.

        An endpoint of its own, because a request that names no parameters must give a value for each.
        """
        try:
            return engine.search(text or "", kind=kind or "", source=source or "", k=int(k), mode=mode).to_json()
        except CotsError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(analytics_enabled=False, title="COTS: image and video search", fill_width=True) as blocks:
        gr.HTML(
            value=_markup(EXAMPLES if engine.gallery == EMBEDDED_GALLERY else EVERYDAY_EXAMPLES),
            apply_default_css=False,
            js_on_load="\n".join((STATIC / name).read_text(encoding="utf-8") for name in ("viewer.js", "page.js")),
            server_functions=[find],
        )
        with gr.Row(visible=False):
            parameters = [
                gr.Textbox(label="text", value=""),
                upload_only(gr.File(label="image", type="binary")),
                gr.Textbox(label="without", value=""),
                gr.Textbox(label="kind: image, video or empty", value=""),
                gr.Textbox(label="source: a source of the gallery or empty", value=""),
                gr.Number(label="k", value=10, precision=0),
            ]
            result = gr.JSON(label="result")
            gr.Button().click(search, parameters, result, api_name="search", concurrency_limit=None)
            mode = gr.Textbox(label="mode: text or hybrid", value="hybrid")
            words = [parameters[0], mode, *parameters[3:]]
            gr.Button().click(search_captions, words, result, api_name="search_captions", concurrency_limit=None)
    return blocks


def answer(engine: Engine, ask: Ask) -> dict[str, Any]:
    """The reply to one request of the page: HTML of cards and timing line, whether there is more to show, and facts
    about the gallery, which may have changed since the page was opened. Who asks for nothing gets a sampling.

    Raises:
        CotsError: a sentence for the visitor.
    """
    shelf = engine.shelf
    if ask.ranking != "vector" and not shelf.captioned:
        raise CotsError("No item of this gallery has a caption; choose Refine, Find: What is shown.")
    if ask.ranking == "text" and (ask.without.strip() or ask.picture or ask.like != ""):
        raise CotsError(
            "“Without”, pictures and “More like this” go by what is shown, not by words of captions; choose Refine, "
            "Find: Both."
        )
    if not ask.searches:
        if ask.without.strip():
            raise CotsError("“Without” takes away from a search; type a few words, or drop in a picture, too.")
        hits = shelf.sample(ask.kind, ask.source, ask.skip, ask.k - ask.skip + 1)
        timing = sampling(engine.model.name)
    else:
        picture = engine.picture(ask.picture) if ask.picture else None
        like = None if ask.like == "" else ask.like
        if like is not None:
            require_item(shelf, like)
        result = engine.search(ask.text, picture, ask.without, ask.kind, ask.source, like, ask.k + 1, ask.ranking)
        hits = result.hits[ask.skip :]
        timing = times(result, shelf)
    if not hits:
        raise CotsError(nothing_found(ask))
    wanted = ask.k - ask.skip
    return {
        "cards": cards(hits[:wanted], shelf.mark, scored=ask.searches and ask.ranking == "vector"),
        "timing": timing,
        "more": len(hits) > wanted and ask.k < MOST,
        "introduction": f"{holdings(shelf)}, searched by what they show. Nothing leaves this machine.",
        "sources": list(shelf.sources),
        "captioned": shelf.captioned,
    }


def require_item(shelf: Shelf, like: int) -> None:
    """Refuse an address that was kept longer than the item it starts from, in words of the page.

    Raises:
        CotsError: no row has this id.
    """
    try:
        shelf.searcher.gallery.row(like)
    except GalleryError as error:
        raise CotsError(
            "What this search starts from is no longer in the gallery; remove it from the search box and look for "
            "something else."
        ) from error


def nothing_found(ask: Ask) -> str:
    kinds = {"": "Nothing", "image": "No picture", "video": "No video"}[ask.kind]
    if ask.source:
        return f"{kinds} from {ask.source} matches; choose another kind or source."
    if ask.kind:
        return f"{kinds} in this gallery matches; choose another kind."
    if ask.ranking == "text":
        return "No caption in this gallery has these words; try others, or choose Refine, Find: What is shown."
    return "Nothing in this gallery matches; ask for something else."


def misunderstood(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "string_too_long":
        return f"Ask with fewer words: a search takes {first['ctx']['max_length']:,} characters."
    return f"The search was not understood: {first['loc'][0]}: {first['msg']}."


def times(result: SearchResult, shelf: Shelf) -> str:
    """The timing line: what was searched, how long each part took, and with which model."""
    took = result.took_ms
    parts = {"encoding": _ms(took["encode"]), "search": _ms(took["search"]), "fetching": _ms(took["fetch"])}
    line = [f"<b>{shelf.items:,}</b> item{'s' * (shelf.items != 1)}"]
    line += [f"{name} <b>{duration}</b>" for name, duration in parts.items()]
    return _joined([*line, escape(PurePath(result.model).name)])


def sampling(model: str) -> str:
    return _joined(["A sampling", f"model {escape(PurePath(model).name)}"])


def holdings(shelf: Shelf) -> str:
    """What the gallery holds, in words."""
    pictures = f"{shelf.images:,} picture{'s' * (shelf.images != 1)}"
    videos = f"{shelf.videos:,} video{'s' * (shelf.videos != 1)}"
    return " and ".join(part for part, count in ((pictures, shelf.images), (videos, shelf.videos)) if count)


def _markup(examples: Sequence[str]) -> str:
    buttons = "".join(f'<li><button type="button">{escape(example)}</button></li>' for example in examples)
    page = Template((STATIC / "page.html").read_text(encoding="utf-8"))
    return page.substitute(examples=buttons, placeholder=escape(examples[0].capitalize()))


def _joined(parts: list[str]) -> str:
    """Parts of a line that may break between them, but not inside one; the style sheet puts dots between neighbours."""
    return " ".join(f"<span>{part}</span>" for part in parts)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"
