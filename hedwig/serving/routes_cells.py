"""``GET /v1/cells``: the geocells of what is being served, as GeoJSON that a browser keeps.

The map is made in a thread, once; an ETag of its content and gzip make the second request cost nothing and the first
a quarter.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from hedwig.serving.answers import GEOJSON_TYPE
from hedwig.serving.cells import CellMaps
from hedwig.serving.limits import refusal
from hedwig.serving.messages import CellsQuery
from hedwig.serving.openapi import refused
from hedwig.serving.service import Service

__all__ = ["cell_routes"]

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The geocells",
        "content": {GEOJSON_TYPE: {"schema": {"$ref": "#/components/schemas/CellsAnswer"}}},
        "headers": {"ETag": {"schema": {"type": "string"}, "description": "names this content"}},
    },
    304: {"description": "The tag in If-None-Match still names the content"},
}


def cell_routes(service: Service) -> APIRouter:
    """The route, over one service."""
    router = APIRouter(tags=["cells"])
    maps: dict[str, CellMaps] = {}

    @router.get(
        "/v1/cells",
        response_model=None,
        responses=_ANSWERS | refused("bad_parameter", "not_ready", "no_cells"),
    )
    async def cells(request: Request, query: Annotated[CellsQuery, Query()]) -> Response:
        """The geocells as GeoJSON, borders simplified by `tolerance_deg`."""
        folder = service.release.cells
        if folder is None:
            raise refusal("no_cells", "This service has no map of its geocells.")
        if folder not in maps:  # another release: what the last one had is of no more use
            maps.clear()
            maps[folder] = CellMaps(folder)
        found = await asyncio.to_thread(maps[folder].get, query.tolerance_deg)
        return found.answer(request, "private, no-cache")

    return router
