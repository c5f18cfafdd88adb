"""The search page: one page, four questions, and nothing that comes from elsewhere.

What a visitor sends is text or the bytes of an image, bounded before it is read and never trusted; documents go by the ids of entries,
never by a path. A request that names another host (a foreign page whose name was pointed here) or comes from another origin is refused.
"""

import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from importlib.resources import files as package_files
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from moca_core.data.image_files import ImageBounds, ImageError
from moca_core.types import Content, Segment
from pipelines.searching.searcher import Searcher

MAX_TEXT_BYTES = 64 * 2**10
TOP = 24
BOUNDS = ImageBounds()

PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
SECURITY = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# What a browser shows by itself; everything else (Markdown, HTML) is shown as the text that it is.
SHOWN = {
    ".pdf": "application/pdf",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".avif": "image/avif",
}
REFUSALS = {
    "not_an_image": "This is not an image that can be read here. PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF can.",
    "image_too_many_pixels": f"This image is too large: at most {BOUNDS.max_px // 10**6} million pixels are read.",
    "image_too_many_bytes": f"This file is too large: at most {BOUNDS.max_bytes // 2**20} MiB are read.",
    "image_aspect_ratio": "This image is too long and narrow to be read.",
    "image_truncated": "This image is damaged: it cannot be read to its end.",
    "image_unsupported": "This kind of image cannot be read here. Save it as PNG or JPEG.",
    "image_missing": "This file is empty.",
    "empty": "Type something to search for.",
}


class Refused(Exception):
    """A request that is answered with an error, in words for the page."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def make_app(searcher: Searcher, is_own_host: Callable[[str], bool]) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        origin = request.headers.get("origin")
        host = request.headers.get("host", "")
        if not is_own_host(host_name(host)) or (origin is not None and urlsplit(origin).netloc != host):
            response: Response = JSONResponse({"error": "This server answers its own page only."}, 403)
        else:
            response = await answer(request)
        for name, value in SECURITY.items():
            response.headers.setdefault(name, value)
        return response

    @app.exception_handler(Refused)
    async def refuse(request: Request, refused: Refused) -> Response:
        return JSONResponse({"error": str(refused)}, refused.status)

    async def found(content: Content) -> dict:
        try:
            hits = await run_in_threadpool(searcher.search, content, TOP)
        except ImageError as error:
            raise Refused(422, REFUSALS[error.reason]) from None
        return {"hits": [asdict(hit) for hit in hits]}

    @app.get("/about")
    async def about() -> dict:
        folder = Path(searcher.manifest.folder).name
        return {"entries": len(searcher), "files": len(searcher.manifest.files), "folder": folder}

    @app.post("/search/text")
    async def search_text(request: Request) -> dict:
        try:
            asked = json.loads(await body(request, MAX_TEXT_BYTES, "This text is too long."))["text"]
            text = asked.encode().decode()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Refused(400, "This is not a question that can be read.") from None
        return await found((Segment(text=text),))

    @app.post("/search/image")
    async def search_image(request: Request) -> dict:
        image = await body(request, BOUNDS.max_bytes, REFUSALS["image_too_many_bytes"])
        return await found((Segment(image=image),))

    @app.get("/picture/{id}")
    def picture(id: str) -> Response:
        try:
            data = searcher.picture(id)
        except KeyError:
            data = None
        if data is None:
            raise Refused(404, "There is no such picture.")
        return Response(data, media_type="image/png" if data.startswith(b"\x89PNG") else "image/jpeg")

    @app.get("/document/{id}")
    def document(id: str) -> Response:
        try:
            path = searcher.document(id)
        except KeyError:
            raise Refused(404, "This document is no longer there. Index the folder again.") from None
        media = SHOWN.get(path.suffix.lower(), "text/plain; charset=utf-8")
        return Response(path.read_bytes(), media_type=media)

    for address, (name, media) in PAGE.items():
        app.get(address)(static(name, media))
    return app


def static(name: str, media: str) -> Callable[[], Response]:
    data = (package_files("pipelines.searching") / "page" / name).read_bytes()
    return lambda: Response(data, media_type=f"{media}; charset=utf-8")


async def body(request: Request, max_bytes: int, words: str) -> bytes:
    """The body of a request, of which no more is read than it may have."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > max_bytes:
            raise Refused(413, words)
    return bytes(data)


def host_name(header: str) -> str:
    """The name in a Host header, in lower case: "localhost:80" is "localhost", "[::1]:80" is "::1"; "" where there is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def own_hosts(host: str) -> Callable[[str], bool]:
    """Which names a server on `host` answers to: localhost, its own, and addresses, under which no foreign page can be served."""
    local = is_loopback(host)
    names = {"localhost", host.lower()} | (set() if local else {socket.gethostname().lower()})

    def is_own(name: str) -> bool:
        if is_address(name):
            return not local or ipaddress.ip_address(name).is_loopback
        return name in names

    return is_own


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(f"{host}:{port}: {error.strerror}; name another --port") from None
    return bound


def serve(searcher: Searcher, host: str, bound: socket.socket) -> None:
    """Serves until it is interrupted."""
    import uvicorn

    config = uvicorn.Config(
        make_app(searcher, own_hosts(host)), log_level="warning", limit_concurrency=64, timeout_graceful_shutdown=1
    )
    uvicorn.Server(config).run(sockets=[bound])
