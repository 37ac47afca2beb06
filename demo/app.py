"""`cots demo`: the search page and its API, served from this machine to this machine.

launch(gallery=None, host="127.0.0.1", port=7860)
"""

import errno
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cots.embedded import EMBEDDED_GALLERY
from cots.errors import CotsError, GalleryError, MissingDependency

# Read by Gradio when it is imported: no usage reports, no look at its package index for a newer version.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from demo.engine import Engine

# Gradio's routes that read a file or an address that the caller names. The page needs none of them.
_CLOSED = ("/gradio_api/file", "/gradio_api/proxy", "/file", "/proxy")
# The browser itself refuses what would leave the machine. Gradio starts from inline scripts and compiles its templates.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'"
)


def launch(gallery: str | None = None, host: str = "127.0.0.1", port: int = 7860, model: str | None = None) -> None:
    """Serve the page until Ctrl-C.

    Args:
        gallery: directory of the gallery; None: the one inside the package. If there is none, the page says so, and
            opens it once it exists.
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        model: as for `cots.load_model`; None: the one that built the gallery.

    Raises:
        CotsError: the port is in use, the host is not an address of this machine, the model cannot be loaded.
        MissingDependency: Gradio is not installed.
    """
    listener = listen(host, port)
    with listener:
        started = time.perf_counter()
        engine = open_engine(gallery, model)
        try:
            import uvicorn

            app = build_app(engine)
        except ImportError as error:
            raise MissingDependency("gradio", "pip install 'cots[demo]'") from error
        try:
            print(f"{engine.shelf.items:,} items and the model {engine.model.name} are ready", end="")
        except GalleryError as error:
            print(error, file=sys.stderr)
            print(f"The model {engine.model.name} is ready", end="")
        engine.warm_up()
        print(f" after {time.perf_counter() - started:.1f} s.")
        print(f"COTS is at {_address(listener)} (Ctrl-C ends it).", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            print()


def listen(host: str, port: int) -> socket.socket:
    """Take the port before anything slow is done.

    Raises:
        CotsError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise CotsError(
            f"{host}:{port} is not an address to listen on ({error}); try --host 127.0.0.1 --port 7860."
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise CotsError(f"{host} is not an address of this machine; try --host 127.0.0.1.") from error
        reason = (
            "is in use"
            if error.errno == errno.EADDRINUSE
            else f"cannot be used ({(error.strerror or str(error)).lower()})"
        )
        other = port + 1 if port < 65535 else port - 1
        raise CotsError(f"Port {port} on {host} {reason}; choose another, for example: --port {other}") from error
    return listener


def open_engine(gallery: str | None, model: str | None) -> "Engine":
    """Load the model: the one asked for, or the gallery's own, or the embedded one if there is no gallery yet."""
    from cots.model.pretrained import load_model
    from demo.engine import Engine
    from index.gallery import open_gallery

    directory = EMBEDDED_GALLERY if gallery is None else Path(gallery).expanduser().absolute()
    if model is None:
        try:
            model = open_gallery(directory).manifest.model
        except GalleryError:
            model = "embedded"
    return Engine(directory, load_model(model))


def build_app(engine: "Engine") -> "FastAPI":
    """The whole application: own routes for media, the page's static files, and Gradio at the root."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.staticfiles import StaticFiles

    from demo.media import media_routes
    from demo.page import HEAD, STATIC, build_page

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Enclosure)
    app.include_router(media_routes(engine))
    app.mount("/page", StaticFiles(directory=STATIC))
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
        body_background_fill="#fbfbf9", body_background_fill_dark="#121314", body_text_color="#17191b"
    )
    blocks = build_page(engine)
    app = gr.mount_gradio_app(
        app, blocks, path="/", head=HEAD, theme=theme, footer_links=[], run_history=False, ssr_mode=False,
        favicon_path=str(STATIC / "favicon.png"), max_file_size="64mb",
    )  # fmt: skip
    # Without this Gradio takes any file of the server for an upload: it checks only apps that it launched itself.
    blocks.has_launched = True
    # Under the default, sse_v3, gradio_client takes every dict with a "path" for a file of the server, downloads it and
    # puts the copy's name in its place: a hit would lose its score. Under sse_v2.1 only files marked as such are files.
    blocks.config["protocol"] = "sse_v2.1"
    return app


class Enclosure:
    """ASGI middleware: closes routes that take a path or an address; has the browser fetch from this server only."""

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"].startswith(_CLOSED):
            from starlette.responses import JSONResponse

            closed = JSONResponse({"detail": "Files are served by their id in the gallery only."}, 404)
            return await closed(scope, receive, send)

        async def send_enclosed(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                if not any(name.lower() == b"content-security-policy" for name, _ in headers):
                    headers.append((b"content-security-policy", _POLICY.encode()))
                headers += [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
            await send(message)

        await self.app(scope, receive, send_enclosed)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    name = "localhost" if host in ("0.0.0.0", "::") else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
