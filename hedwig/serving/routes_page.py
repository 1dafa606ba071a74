"""The page: ``/`` and its files under ``/page/``.

The files are our own, from this package, and Leaflet's, from the installed `xstatic-leaflet` wheel; the country
outlines are written by `hedwig.serving.land`. Names are looked up in a table that is made once, so no request can reach
another file. Everything has a tag of its content and is asked for again each time: an upgrade shows at once, and what
is the same costs 200 bytes. No template, no build step, no address of anybody else.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hedwig.serving.answers import GEOJSON_TYPE
from hedwig.serving.land import land_geojson
from hedwig.serving.limits import refusal
from hedwig.serving.tagged import Tagged

__all__ = ["page_routes"]

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_INDEX, _LAND = "index.html", "land.json"
_LEAFLET = {"leaflet.js", "leaflet.css"}  # its pictures belong to controls that the page does not use


def page_routes() -> APIRouter:
    """``/`` and the mount ``/page``, which need no service: they are the same for every run."""
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"], response_model=None)
    async def index(request: Request) -> Response:
        return await _answered(request, _INDEX)

    router.mount("/page", _files)
    return router


async def _files(scope: Scope, receive: Receive, send: Send) -> None:
    """ASGI: one file below ``/page/``."""
    if scope["type"] != "http":
        raise HTTPException(404)
    if scope["method"] not in ("GET", "HEAD"):
        raise HTTPException(405, headers={"Allow": "GET, HEAD"})
    # Starlette leaves the whole path and says in root_path where the mount ends.
    name = str(scope["path"]).removeprefix(str(scope.get("root_path", ""))).removeprefix("/")
    await (await _answered(Request(scope), name))(scope, receive, send)


async def _answered(request: Request, name: str) -> Response:
    if name not in _sources():
        raise refusal("not_found", f"The page has no file {name[:80]!r}.")
    # In a thread: reading is quick, but the outlines take seconds the first time.
    file = await asyncio.to_thread(_kept, name)
    return file.answer(request, "no-cache")


@functools.cache
def _kept(name: str) -> Tagged:
    return Tagged.of(_sources()[name](), _TYPES.get(Path(name).suffix, GEOJSON_TYPE))


@functools.cache
def _sources() -> dict[str, Callable[[], bytes]]:
    """What there is: the name below ``/page/``, and how to get its bytes."""
    own = Path(__file__).parent / "page"
    found: dict[str, Callable[[], bytes]] = {p.name: p.read_bytes for p in own.iterdir() if p.suffix in _TYPES}
    leaflet = importlib.util.find_spec("xstatic.pkg.leaflet")
    if leaflet is None or leaflet.origin is None:
        raise FileNotFoundError("The page needs the package xstatic-leaflet, which is not installed here.")
    data = Path(leaflet.origin).parent / "data"
    found |= {f"leaflet/{name}": (data / name).read_bytes for name in _LEAFLET}
    return found | {_LAND: land_geojson}
