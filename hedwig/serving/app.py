"""The HTTP application: the routes over one service, and what is true of every request.

It is plain FastAPI around anything that can locate: `hedwig.serving.deployment` runs it on Ray Serve, a test runs it in
memory. A body is an image as it is, or JSON: no multipart parser, and a page on another site can send neither without
a preflight. Bytes go to the locator unchanged, so the answer is the one that `hedwig.Hedwig` gives. The routes are in
the modules `routes_*`, the work is in `hedwig.serving.service`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hedwig import __version__
from hedwig.serving.access import Access, check_routes
from hedwig.serving.answers import error_response
from hedwig.serving.audit import AuditLog
from hedwig.serving.audited import Audited
from hedwig.serving.direct import Direct
from hedwig.serving.headers import SafeAnswers, allow_origins
from hedwig.serving.keys import KeyRing
from hedwig.serving.limits import LOOPBACK_NAMES, Gate, Limits, refusal
from hedwig.serving.metrics import CountRequests, Metrics
from hedwig.serving.openapi import describe
from hedwig.serving.rates import LeasedRates
from hedwig.serving.releases import Locator
from hedwig.serving.routes_cells import cell_routes
from hedwig.serving.routes_locate import locate_routes
from hedwig.serving.routes_page import page_routes
from hedwig.serving.routes_state import state_routes
from hedwig.serving.routes_vectors import vector_routes
from hedwig.serving.service import Service

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["create_app"]


def create_app(
    locator: Locator | Callable[[], Locator],
    *,
    limits: Limits | None = None,
    allowed_hosts: Collection[str] = LOOPBACK_NAMES,
    info: Mapping[str, Any] | None = None,
    cells: str | None = None,
    gate: Gate | None = None,
    decode: Callable[[bytes, bool], NDArray[np.uint8]] | None = None,
    min_precision_km: float = 0.0,
    metrics: Metrics | None = None,
    keys: KeyRing | None = None,
    rates: LeasedRates | None = None,
    cors_origins: Collection[str] = (),
    audit: AuditLog | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        locator: Ready to use, or a function that loads one: it is then called in a thread when the application
            starts, and ``/readyz`` answers 503 until it has returned.
        limits: What a request may cost.
        allowed_hosts: Names accepted in the Host header; ``("*",)`` accepts all.
        info: What ``/v1/info`` says about the model and the index; some of it is part of every answer.
        cells: The folder of the run's geocells, for ``/v1/cells``.
        gate: Given by whoever wants to watch the work in progress; made from `limits` otherwise.
        decode: See `Service`.
        min_precision_km: See `Service`.
        metrics: Where requests are counted; made when None.
        keys: Who is let in; None lets everybody in.
        rates: How often a caller may ask; None does not count.
        cors_origins: Origins whose pages may use the API from a browser.
        audit: Where every answer leaves a line; None keeps none.

    Returns:
        The application, which holds no lock and no thread before its first request; its `state.service` is the
        `Service`, whose `release` may be replaced at any time.
    """
    limits = limits or Limits()
    service = Service(
        locator,
        limits=limits,
        info=info,
        cells=cells,
        gate=gate,
        decode=decode,
        min_precision_km=min_precision_km,
        metrics=metrics,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.load())
        yield
        loading.cancel()
        service.gate.close()
        if audit is not None:
            audit.close()

    app = FastAPI(
        title="hedwig",
        summary="Where on Earth was this panorama taken?",
        version=__version__,
        docs_url=None,  # both pages load scripts from a CDN
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    on_error = {HTTPException: _on_http_exception, RequestValidationError: _on_bad_parameter}
    vectors = vector_routes(service)
    # The last one added sees a request first.
    app.add_middleware(Direct, route=_route(vectors, "/v1/neighbours"), on_error=on_error)
    app.add_middleware(Access, keys=keys, rates=rates)
    if audit is not None:
        app.add_middleware(Audited, log=audit)
    allow_origins(app, cors_origins)
    app.add_middleware(SafeAnswers, allowed_hosts=allowed_hosts)
    app.add_middleware(CountRequests, metrics=service.metrics, clock=time.perf_counter)
    for kind, answer in on_error.items():
        app.add_exception_handler(kind, answer)
    for router in (vectors, locate_routes(service), cell_routes(service), state_routes(service), page_routes()):
        app.include_router(router)
    check_routes(app)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    return app


def _route(router: APIRouter, path: str) -> APIRoute:
    return next(route for route in router.routes if isinstance(route, APIRoute) and route.path == path)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    refused = cast("HTTPException", error)
    own: Any = refused.detail
    if not isinstance(own, dict) and refused.status_code in (404, 405):
        refused.detail = f"There is no {request.method} {request.url.path[:200]}"
    return error_response(refused)


async def _on_bad_parameter(_: Request, error: Exception) -> Response:
    first = cast("RequestValidationError", error).errors()[0]
    name = str(first["loc"][-1])[:80]
    seen = "" if first["type"] == "missing" else f", got {str(first.get('input'))[:80]!r}"
    return error_response(refusal("bad_parameter", f"Query parameter {name!r}: {first['msg']}{seen}."))
