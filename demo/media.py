"""The page's own routes: media and thumbnails by row id, and the pictures that visitors search by.

A file is named by the id of its row alone: nothing but what the gallery records can be asked for, and no route takes a
path.
"""

import os
import re

from fastapi import APIRouter, HTTPException, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from cots.errors import CotsError, MediaError
from demo.engine import Engine
from demo.thumbnails import Size, Thumbnails, to_webp

MAX_UPLOAD = 64 * 2**20
_HEADERS = {
    "Cache-Control": "private, max-age=86400",
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; media-src 'self'; sandbox",
    "Content-Disposition": "inline",
}


def media_routes(engine: Engine) -> APIRouter:
    """`/media/{id}`, `/thumb/{id}` and `/query-picture`.

    Those that decode are plain functions, which FastAPI runs in threads: they block no other request.
    """
    router = APIRouter(include_in_schema=False)
    thumbnails = Thumbnails()

    @router.api_route("/media/{id}", methods=["GET", "HEAD"])
    def media(id: int, request: Request) -> Response:
        try:
            content, mime = engine.shelf.searcher.gallery.media(id)
        except CotsError as error:
            raise HTTPException(404, str(error)) from error
        if not mime.startswith(("image/", "video/")) or mime.endswith(("*", "svg+xml")):
            mime = "application/octet-stream"
        if isinstance(content, bytes):
            return part_of(content, mime, request.headers.get("range"))
        try:
            status = os.stat(content)
        except OSError as error:
            raise HTTPException(404, f"{content} is no longer there.") from error
        return FileResponse(content, media_type=mime, headers=_HEADERS, stat_result=status)

    @router.api_route("/thumb/{id}", methods=["GET", "HEAD"])
    def thumb(id: int, size: Size = "tile") -> Response:
        try:
            shelf = engine.shelf
            content = thumbnails.get(shelf.searcher.gallery, shelf.mark, id, size)
        except CotsError as error:
            raise HTTPException(404, str(error)) from error
        return Response(content, media_type="image/webp", headers=_HEADERS)

    @router.post("/query-picture")
    async def keep(request: Request) -> dict[str, str]:
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_UPLOAD:
                raise HTTPException(413, f"the file is larger than {MAX_UPLOAD // 2**20} MB; send a smaller picture.")
        try:
            return {"token": await run_in_threadpool(engine.keep_picture, bytes(content))}
        except MediaError as error:
            raise HTTPException(415, f"{error.reason}; choose another picture.") from error

    @router.get("/query-picture/{token}")
    def show(token: str) -> Response:
        try:
            picture = engine.picture(token).copy()
        except CotsError as error:
            raise HTTPException(404, str(error)) from error
        picture.thumbnail((96, 96))
        return Response(to_webp(picture), media_type="image/webp", headers=_HEADERS)

    return router


def part_of(content: bytes, mime: str, range_header: str | None) -> Response:
    """Bytes in memory, or the one range of them that a player asks for (RFC 9110, section 14).

    Who asks for several ranges gets the whole, which the RFC allows.
    """
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", (range_header or "").strip())
    headers = {**_HEADERS, "Accept-Ranges": "bytes"}
    if asked is None or asked.groups() == ("", ""):
        return Response(content, media_type=mime, headers=headers)
    first, last = asked.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= stop:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    return Response(content[start:stop], status_code=206, media_type=mime, headers=headers)
