"""Who may use which route, and how often: decided from the headers alone, before a byte of the body is read.

A path without a row in `ROUTE_SCOPES` does not exist: it never reaches the router, whose patterns are looser than
equality, and `check_routes` refuses to build an application that has such a route, so one that is added without a
thought is not open but an error. Without keys (a service on loopback) every caller has every scope. With keys only the
probes and the page's own files are open, and a path that does not exist looks, without a key, like one that does. CORS
and host names are decided further outside, in `hedwig.serving.headers`.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from hedwig.serving.keys import SCOPES, KeyRing
from hedwig.serving.limits import refusal
from hedwig.serving.rates import LeasedRates

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["ROUTE_SCOPES", "Access", "Caller", "caller_of", "charge", "check_routes", "route_paths"]

_PAGE = "/page"  # and all below it
ROUTE_SCOPES: dict[str, str | None] = {
    "/": None,
    _PAGE: None,
    "/healthz": None,
    "/readyz": None,
    "/openapi.json": "read",
    "/v1/info": "read",
    "/v1/cells": "read",
    "/v1/locate": "locate",
    "/v1/locate:batch": "locate",
    "/v1/embed": "locate",
    "/v1/neighbours": "neighbours",
    "/metrics": "metrics",
}
_ASK = {"WWW-Authenticate": 'Bearer realm="hedwig"'}
_MOST_CHARACTERS = 512
_STATE = "hedwig.caller"


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    Attributes:
        key_id: Of the key; None where nobody needs one.
        scopes: What it may do.
        bucket: Under which it is counted.
    """

    key_id: str | None
    scopes: frozenset[str]
    bucket: str


def caller_of(request: Request) -> Caller:
    """The caller that `Access` recognised; without that middleware, one who may do everything."""
    found = request.scope.get(_STATE)
    return found[0] if found else Caller(None, frozenset(SCOPES), "")


async def charge(request: Request, num: int) -> None:
    """Count `num` more requests against the caller's rate, for a request that carries several images.

    They are granted now, whatever is left, and make the caller wait afterwards.
    """
    caller, rates = request.scope.get(_STATE, (None, None))
    if rates is not None and num > 0:
        await rates.charge(caller.bucket, num)


def route_paths(app: Any) -> Iterator[str]:
    """The path of every route and mount of an application or router, as it was written.

    Raises:
        RuntimeError: there is a route that does not tell its path.
    """
    for route in app.routes:
        if isinstance(path := getattr(route, "path", None), str):
            yield path or "/"
        elif (inside := getattr(route, "original_router", None)) is not None:  # FastAPI keeps included routers whole
            yield from route_paths(inside)
        else:
            raise RuntimeError(f"{type(route).__name__} does not tell its path, so nobody can decide who may use it.")


def check_routes(app: Any) -> None:
    """Refuse an application with a route that nobody has decided about.

    Raises:
        RuntimeError: names the paths.
    """
    if missing := sorted({path for path in route_paths(app) if path not in ROUTE_SCOPES}):
        raise RuntimeError(f"{', '.join(missing)}: say in ROUTE_SCOPES of {__name__} which scope these routes need.")


class Access:
    """ASGI middleware: recognise the key, hold the caller to his rate, ask for the scope of the route.

    Args:
        app: The application inside.
        keys: Who is let in; None lets everybody in, with every scope.
        rates: How often; None does not count.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None = None, rates: LeasedRates | None = None) -> None:
        self._app, self._keys, self._rates = app, keys, rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] == "http":
            try:
                await self._admit(scope)
            except HTTPException as error:
                response = JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        path = _PAGE if scope["path"].startswith(f"{_PAGE}/") else scope["path"]
        needed = ROUTE_SCOPES.get(path)
        if path in ROUTE_SCOPES and needed is None:
            return
        address = f"address {_network((scope.get('client') or ('unknown', 0))[0])}"
        if self._keys is None:
            caller, refused = Caller(None, frozenset(SCOPES), address), None
        else:
            caller, refused = self._recognise(scope, address)
        scope[_STATE] = (caller, self._rates)
        if self._rates is not None and (wait_s := await self._rates.spend(caller.bucket)) > 0:
            text = f"{caller.key_id or 'This address'} has asked more often than this service grants."
            raise refusal("rate_limited", text, headers={"Retry-After": str(max(1, math.ceil(wait_s)))})
        if refused is not None:
            raise refused
        if needed is None:
            raise refusal("not_found", f"There is no {scope['method']} {path[:200]}.")
        if needed not in caller.scopes:
            held = ", ".join(s for s in SCOPES if s in caller.scopes)
            raise refusal("missing_scope", f"This needs a key with the scope {needed!r}; {caller.key_id} has {held}.")

    def _recognise(self, scope: Scope, address: str) -> tuple[Caller, HTTPException | None]:
        """The caller; where there is none, the refusal, and the address to count it under."""
        nobody = Caller(None, frozenset(), address)
        given = Headers(scope=scope).getlist("authorization")
        scheme, _, text = (given[0] if len(given) == 1 else "").strip().partition(" ")
        text = text.strip()
        if scheme.lower() != "bearer" or not text:
            return nobody, refusal("no_key", "There is no API key in this request.", headers=_ASK)
        key, expired = self._keys.recognise(text[:_MOST_CHARACTERS]) if self._keys else (None, False)
        if key is None:
            return nobody, refusal("bad_key", "This service does not know this API key.", headers=_ASK)
        if expired:
            return nobody, refusal("expired_key", f"The API key {key.id} has expired.", headers=_ASK)
        return Caller(key.id, frozenset(key.scopes), f"key {key.id}"), None


@lru_cache(maxsize=1024)
def _network(host: str) -> str:
    """The address to count by: one IPv4 address, or the /64 of an IPv6 one, which one host has to itself."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)[:100]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
