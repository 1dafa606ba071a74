"""One route answered before the framework looks for it, because its work takes less than the way there.

From the middleware to the function of a route and back FastAPI matches routers inside routers, opens two exit stacks
and solves dependencies; a search of a stored embedding has none. The route stays where it was, with its
documentation, and answers what does not come by here, such as another method.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Direct"]

OnError = Callable[[Request, Exception], Awaitable[Response]]


class Direct:
    """ASGI middleware, the innermost: requests of one route go to its function.

    Args:
        app: The application inside.
        route: Of a function that takes the request alone and returns a response.
        on_error: What answers an exception, by its class, as the application inside does.
    """

    def __init__(self, app: ASGIApp, route: APIRoute, on_error: Mapping[type[Exception], OnError]) -> None:
        self._app, self._route, self._on_error = app, route, on_error
        self._methods, self._classes = frozenset(route.methods or ()), tuple(on_error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        route = self._route
        if scope["type"] != "http" or scope["path"] != route.path or scope["method"] not in self._methods:
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # as a router would leave it, for whoever counts and logs
        request = Request(scope, receive, send)
        try:
            response = await route.endpoint(request)
        except self._classes as error:
            kind = next(each for each in type(error).__mro__ if each in self._on_error)
            response = await self._on_error[kind](request, error)
        await response(scope, receive, send)
