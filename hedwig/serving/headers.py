"""What is true of every answer, whoever gives it: known host names, security headers, no traceback, CORS when asked.

The content security policy has no `unsafe-*` anywhere. The API's own answers need nothing at all; the page and its
files may load scripts, styles and images from this origin and nothing from any other. CORS is off: a page of another
origin can neither send an image (its type needs a preflight) nor read an answer; origins are listed one by one, never
`*`, because keys travel in a header that a wildcard would let any page send.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from hedwig.serving.limits import refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["SafeAnswers", "allow_origins", "headers_of"]

_log = logging.getLogger(__name__)

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "X-Frame-Options": "DENY",
}
_API_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_PAGE_PREFIX = "/page/"


def headers_of(path: str) -> Mapping[str, str]:
    """The security headers of an answer to `path`."""
    return {**_HEADERS, "Content-Security-Policy": _PAGE_POLICY if _is_page(path) else _API_POLICY}


def _is_page(path: str) -> bool:
    return path == "/" or path.startswith(_PAGE_PREFIX)


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """As ASGI has them."""
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


_RAW = {page: _raw(headers_of("/" if page else "/v1")) for page in (False, True)}
_NAMES = {name for name, _ in _RAW[False]}
_NO_STORE = (b"cache-control", b"no-store")


def _safely(headers: Iterable[tuple[bytes, bytes]], path: str) -> list[tuple[bytes, bytes]]:
    """The headers of an answer and the security headers, which win; what says nothing of caching is not stored."""
    kept = [(name, value) for name, value in headers if name.lower() not in _NAMES]
    stored = () if any(name.lower() == b"cache-control" for name, _ in kept) else (_NO_STORE,)
    return [*kept, *stored, *_RAW[_is_page(path)]]


def allow_origins(app: Any, origins: Collection[str]) -> None:
    """Let pages of these origins use the API; nothing is added when there are none.

    Args:
        app: A Starlette application that is being built.
        origins: Such as ``https://maps.example.org``.

    Raises:
        ValueError: a wildcard, or something that is no origin.
    """
    for origin in origins:
        parts = urlsplit(origin)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or "*" in origin
            or origin != f"{parts.scheme}://{parts.netloc}"
        ):
            raise ValueError(
                f"cors_origins holds {origin!r}, which is no origin; write scheme://host[:port] without a slash at the "
                "end. A wildcard is not accepted: any page could then use a visitor's key."
            )
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After", "ETag", "X-Request-Id"],
            max_age=600,
        )


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
                message["headers"] = _safely(message.get("headers", ()), scope["path"])
            await send(message)

        host = _host_name(next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), ""))
        if "*" not in self._allowed and host not in self._allowed:
            error = refusal("bad_host", f"The Host header names {host[:80]!r}, which is not a name of this service.")
            await _response(error)(scope, receive, send_safely)
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
            await _response(error)(scope, receive, send_safely)


def _response(error: Any) -> JSONResponse:
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def _host_name(header: str) -> str:
    """The name in a Host header, lower case, without port and without the brackets of an IPv6 address."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
