"""The short way to one route: the same answers as the framework's, and everything else left to it."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.testclient import TestClient

from hedwig.serving.direct import Direct


def make(short: bool) -> tuple[TestClient, list[Any]]:
    app, routes = FastAPI(), []

    @app.post("/short")
    async def answer(request: Request) -> Response:
        what = (await request.body()).decode()
        if what == "teapot":
            raise HTTPException(418, "no coffee")
        if what == "parameter":
            raise RequestValidationError([])
        if what == "fault":
            raise RuntimeError("not for callers")
        return JSONResponse({"body": what, "q": request.query_params.get("q")})

    async def refused(_: Request, error: Exception) -> Response:
        return JSONResponse({"refused": str(error.detail)}, error.status_code)  # type: ignore[attr-defined]

    async def bad(request: Request, _: Exception) -> Response:
        return JSONResponse({"bad": request.url.path}, 400)

    on_error = {HTTPException: refused, RequestValidationError: bad}
    for kind, handler in on_error.items():
        app.add_exception_handler(kind, handler)
    if short:
        route = next(r for r in app.routes if isinstance(r, APIRoute))
        app.add_middleware(Direct, route=route, on_error=on_error)

    class Seen:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await self._inner(scope, receive, send)
            finally:
                routes.append(getattr(scope.get("route"), "path", None))

    app.add_middleware(Seen)
    return TestClient(app, raise_server_exceptions=False), routes


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/short?q=7", "hello"), ("POST", "/short", ""), ("POST", "/short", "teapot"),
        ("POST", "/short", "parameter"), ("POST", "/short", "fault"), ("GET", "/short", ""), ("POST", "/short/", "x"),
        ("DELETE", "/short", ""), ("POST", "/other", ""), ("GET", "/docs", ""),
    ],
)  # fmt: skip
def test_answers_are_those_of_the_framework(method: str, path: str, body: str) -> None:
    seen = []
    for short in (True, False):
        client, routes = make(short)
        with client:
            answer = client.request(method, path, content=body, follow_redirects=False)
        headers = {name: value for name, value in answer.headers.items() if name != "date"}
        seen.append((answer.status_code, answer.content, headers, [r for r in routes if path.startswith("/short")]))
    assert seen[0] == seen[1]
