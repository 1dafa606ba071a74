"""One route answered before the framework looks for it, because its work takes less than the way there.

From the middleware to the function of a route and back FastAPI matches routers inside routers, opens two exit stacks
and solves dependencies; a search of a stored embedding has none. The route stays where it was, with its
documentation, and answers what does not come by here, such as another method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.middleware.exceptions import ExceptionMiddleware

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Direct"]


class Direct:
    """ASGI middleware, the innermost: requests of one route go to its function.

    Args:
        app: The application inside.
        route: Of a function that takes the request alone and returns a response.
        on_error: The exception handlers of the application inside.
    """

    def __init__(self, app: ASGIApp, route: APIRoute, on_error: Mapping[Any, Any]) -> None:
        self._app, self._route, self._methods = app, route, frozenset(route.methods or ())
        self._answer = ExceptionMiddleware(self._asked, on_error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        route = self._route
        if scope["type"] != "http" or scope["path"] != route.path or scope["method"] not in self._methods:
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # as a router would leave it, for whoever counts and logs
        await self._answer(scope, receive, send)

    async def _asked(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._route.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
