"""The HTTP routes, as a plain FastAPI application around anything that can locate an image.

The body is the raw image: no multipart parser, and a page on another site cannot send it without a preflight. Bytes
go to the locator unchanged, in a thread, so the answer is the one that `Hedwig.load(run).locate(data)` gives and the
probes stay alive. No Ray here: `hedwig.serving.deployment` runs this on Ray Serve, a test runs it in memory. Of an
image only its sizes are logged, and nothing is written to disk. There is no authentication yet: serve on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import logging
import math
import time
import traceback
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast, runtime_checkable

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from hedwig import __version__
from hedwig.serving.limits import (
    LOOPBACK_NAMES,
    REFUSALS,
    Gate,
    Limits,
    check_image,
    check_type,
    read_body,
    refusal,
)
from hedwig.serving.messages import ErrorAnswer, InfoAnswer, LocateAnswer, LocateQuery, StateAnswer

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Locator", "create_app"]

_log = logging.getLogger(__name__)

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_STATUS_CODES = {404: "not_found", 405: "wrong_method"}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>hedwig</title></head><body>
<h1>hedwig {version}</h1>
<p>Where on Earth was this panorama taken? Send a JPEG, PNG or WebP file:</p>
<pre>curl --data-binary @panorama.jpg -H 'Content-Type: image/jpeg' '{base}v1/locate?top_k=5'</pre>
<p><a href="openapi.json">openapi.json</a> · <a href="v1/info">v1/info</a> · <a href="readyz">readyz</a></p>
</body></html>
"""


class _Located(Protocol):
    """What a locator returns: `hedwig.Prediction`, or a fake of it."""

    def to_dict(self) -> dict[str, Any]: ...


@runtime_checkable
class Locator(Protocol):
    """What the application needs of `hedwig.Hedwig`."""

    def locate(self, image: bytes, top_k: int = 5, heading: float = math.nan) -> _Located:
        """Locate one encoded image; ValueError when it cannot be decoded."""
        ...


class SafeAnswers:
    """ASGI middleware: known host names only, security headers on everything, and never a traceback in a body.

    Args:
        app: The application inside.
        allowed_hosts: Names accepted in the Host header; ``*`` accepts all. Checking them keeps a web page from
            reaching a service on loopback by rebinding its own name to 127.0.0.1.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Collection[str]) -> None:
        self._app = app
        self._allowed = frozenset(name.lower().strip("[]") for name in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_safely(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        host = _host_name(Headers(scope=scope).get("host", ""))
        if "*" not in self._allowed and host not in self._allowed:
            error = refusal("bad_host", f"The Host header names {host[:80]!r}, which is not a name of this service.")
            await _error_response(error)(scope, receive, send_safely)
            return
        try:
            await self._app(scope, receive, send_safely)
        except Exception as error:
            # Without the message: it may quote what was sent.
            trace = "".join(traceback.format_tb(error.__traceback__))
            _log.error("%s while answering %s %s\n%s", type(error).__name__, scope["method"], scope["path"], trace)
            if started:
                raise
            error = refusal("internal", "The service failed while answering; the cause is in its log.")
            await _error_response(error)(scope, receive, send_safely)


def create_app(
    locator: Locator | Callable[[], Locator],
    *,
    limits: Limits | None = None,
    allowed_hosts: Collection[str] = LOOPBACK_NAMES,
    info: Mapping[str, Any] | None = None,
    gate: Gate | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        locator: Ready to use, or a function that loads one: it is then called in a thread when the application
            starts, and ``/readyz`` answers 503 until it has returned.
        limits: What a request may cost.
        allowed_hosts: Names accepted in the Host header; ``("*",)`` accepts all.
        info: What ``/v1/info`` says about the model and the index; its ``model`` is also part of every answer.
        gate: Given by whoever wants to watch the work in progress; made from `limits` otherwise.

    Returns:
        The application; it holds no lock and no thread before its first request.
    """
    limits = limits or Limits()
    gate = gate or Gate(limits)
    described = dict(info or {})
    loaded = _Loaded(locator)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(loaded.load())
        yield
        loading.cancel()
        gate.close()

    app = FastAPI(
        title="hedwig",
        summary="Where on Earth was this panorama taken?",
        version=__version__,
        docs_url=None,  # both pages load scripts from a CDN
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.add_middleware(SafeAnswers, allowed_hosts=allowed_hosts)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_bad_parameter)

    @app.post("/v1/locate", response_model=None, responses=_LOCATE_RESPONSES, openapi_extra=_LOCATE_BODY)
    async def locate(request: Request, query: Annotated[LocateQuery, Query()]) -> JSONResponse:
        """Locate the panorama in the request body."""
        began = time.perf_counter()
        check_type(request.headers.get("content-type"))
        ready = loaded.get()
        async with gate.place():
            waited = time.perf_counter()
            data = await read_body(request, limits.max_body_bytes, limits.body_timeout_s)
            width, height = check_image(data, limits)
            read = time.perf_counter()

            def work() -> dict[str, Any]:
                heading = math.nan if query.heading is None else query.heading
                return ready.locate(data, top_k=query.top_k, heading=heading).to_dict()

            try:
                found = await gate.run(work)
            except ValueError as error:
                # The locator's contract: ValueError is about the image, anything else is our fault.
                _log.info("could not locate %d bytes, %dx%d px", len(data), width, height)
                raise refusal("bad_image", str(error)[:500]) from None
        ended = time.perf_counter()
        milliseconds = {"wait": waited - began, "read": read - waited, "locate": ended - read, "total": ended - began}
        timings = {name: round(1000 * seconds, 3) for name, seconds in milliseconds.items()}
        _log.info("located %d bytes, %dx%d px, in %.1f ms", len(data), width, height, timings["total"])
        extra = {"timings_ms": timings, "model": described.get("model"), "version": __version__}
        return JSONResponse(_without_nan({**found, **extra}))

    @app.get("/healthz", response_model=StateAnswer)
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "alive"}

    @app.get("/readyz", response_model=StateAnswer, responses={503: {"model": ErrorAnswer}})
    async def readyz() -> dict[str, str]:
        """Model and index are loaded."""
        loaded.get()
        return {"status": "ready"}

    @app.get("/v1/info", response_model=None, responses={200: {"model": InfoAnswer}})
    async def get_info() -> JSONResponse:
        """What is being served."""
        return JSONResponse(_without_nan({**described, "version": __version__, "limits": vars(limits)}))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(request: Request) -> str:
        return _PAGE.format(version=__version__, base=html.escape(str(request.base_url)))

    return app


_LOCATE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The image file itself, at most 25 MiB unless /v1/info says otherwise. No multipart.",
        "content": {
            name: {"schema": {"type": "string", "format": "binary"}}
            for name in ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
        },
    }
}
_LOCATE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": LocateAnswer, "description": "The place, and the evidence for it"},
    400: {"model": ErrorAnswer, "description": "Empty body, wrong parameter or wrong Host"},
    408: {"model": ErrorAnswer, "description": "The body arrived too slowly"},
    413: {"model": ErrorAnswer, "description": "Too many bytes or too many pixels"},
    415: {"model": ErrorAnswer, "description": "Not a JPEG, PNG or WebP image"},
    422: {"model": ErrorAnswer, "description": "The image is cut short or damaged"},
    503: {"model": ErrorAnswer, "description": "Overloaded or not ready; see Retry-After"},
}


class _Loaded:
    """The locator, once there is one, or the reason why there is none."""

    def __init__(self, locator: Locator | Callable[[], Locator]) -> None:
        self._source = locator
        self._locator = locator if isinstance(locator, Locator) else None
        self._reason = "The model and the index are being loaded."

    async def load(self) -> None:
        if self._locator is not None or isinstance(self._source, Locator):
            return
        try:
            self._locator = await asyncio.to_thread(self._source)
        except Exception as error:
            _log.exception("the model and the index could not be loaded")
            self._reason = f"The model and the index could not be loaded ({type(error).__name__}); see the log."

    def get(self) -> Locator:
        if self._locator is None:
            raise refusal("not_ready", self._reason, headers={"Retry-After": "5"})
        return self._locator


def _host_name(header: str) -> str:
    """The name in a Host header, lower case, without port and without the brackets of an IPv6 address."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _without_nan(value: Any) -> Any:
    """The same, with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def _error_response(error: HTTPException) -> JSONResponse:
    detail: Any = error.detail
    if not isinstance(detail, dict):  # raised by the framework: 404 and 405
        code = _STATUS_CODES.get(error.status_code, "bad_parameter")
        detail = {"code": code, "message": f"{detail}.", "next": REFUSALS[code][1]}
    return JSONResponse({"error": detail}, error.status_code, headers=error.headers)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    refused = cast("HTTPException", error)
    if refused.status_code in _STATUS_CODES:
        refused.detail = f"There is no {request.method} {request.url.path[:200]}"
    return _error_response(refused)


async def _on_bad_parameter(_: Request, error: Exception) -> JSONResponse:
    first = cast("RequestValidationError", error).errors()[0]
    name = str(first["loc"][-1])[:80]
    seen = "" if first["type"] == "missing" else f", got {str(first.get('input'))[:80]!r}"
    return _error_response(refusal("bad_parameter", f"Query parameter {name!r}: {first['msg']}{seen}."))
