"""The routes that say where an image was taken: ``/v1/locate`` for one place, ``/v1/locate:batch`` for several.

A place is one panorama or several photographs of it. A batch is encoded and searched as one, keeps the order of its
items and gives each its own answer or error; only what concerns all of them (overload, a body that is no JSON) fails
the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hedwig.serving.access import caller_of, charge
from hedwig.serving.answers import (
    CSV_COLUMNS,
    CSV_TYPE,
    GEOJSON_TYPE,
    csv_text,
    error_body,
    geojson,
    json_response,
)
from hedwig.serving.audited import note
from hedwig.serving.bodies import read_batch, read_place
from hedwig.serving.messages import BatchAnswer, BatchBody, BatchQuery, LocateAnswer, LocateQuery, PlaceBody
from hedwig.serving.openapi import BODY_REFUSALS, IMAGE_REFUSALS, body_of, image_content, refused, shown
from hedwig.serving.service import Service, Timings

__all__ = ["locate_routes"]

_log = logging.getLogger(__name__)

_EXPORTS = {
    GEOJSON_TYPE: {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "geometry": {"type": "Point", "coordinates": [5.3221, 60.3913]},
                "properties": {"role": "answer", "radius_km": 38.0, "confidence": 0.61},
            }
        ],
    },
    "text/csv": ",".join(CSV_COLUMNS) + "\r\n0,5f2b7c0e,answer,1,,60.3913,5.3221,0.61,38.0\r\n",
}
_ONE = body_of(
    "One place: the image file itself, or JSON with one image or several photographs in base64. No multipart.",
    image_content(),
    PlaceBody,
)
_MANY = body_of("Several places; the byte limit of /v1/info counts the whole body.", {}, BatchBody)


def locate_routes(service: Service) -> APIRouter:
    """The two routes, over one service."""
    router, limits = APIRouter(tags=["locate"]), service.limits

    @router.post(
        "/v1/locate",
        response_model=None,
        responses=shown(LocateAnswer, "The place, and the evidence for it", _EXPORTS)
        | refused(*BODY_REFUSALS, *IMAGE_REFUSALS),
        openapi_extra=_ONE,
    )
    async def locate(request: Request, query: Annotated[LocateQuery, Query()]) -> Response:
        """Locate one place: a panorama, or several photographs."""
        timings, release = Timings(), service.release
        async with service.place(timings):
            with timings.stage("read"):
                place = await read_place(request, limits, query.heading)
            found = (await service.locate(release, [place], timings, **_wanted(request, query)))[0]
        note(request, [place.photographs], [found], max(query.precision_km, service.min_precision_km))
        if isinstance(found, HTTPException):
            raise found
        service.metrics.batch("/v1/locate", 1)
        made_by = service.finish(release, timings)
        size = sum(map(len, place.photographs))
        _log.info(
            "located %d bytes, %d images, in %.1f ms", size, len(place.photographs), made_by["timings_ms"]["total"]
        )
        return _exported([found], query.format) or json_response({**found, **made_by})

    @router.post(
        "/v1/locate:batch",
        response_model=None,
        responses=shown(BatchAnswer, "For each item its place or its error, in order", _EXPORTS)
        | refused(*BODY_REFUSALS),
        openapi_extra=_MANY,
    )
    async def locate_batch(request: Request, query: Annotated[BatchQuery, Query()]) -> Response:
        """Locate several places at once."""
        timings, release = Timings(), service.release
        async with service.place(timings):
            with timings.stage("read"):
                places = await read_batch(request, limits)
            await charge(request, len(places) - 1)
            found = await service.locate(release, places, timings, **_wanted(request, query))
        photographs = [place.photographs for place in places]
        note(request, photographs, found, max(query.precision_km, service.min_precision_km))
        results = [error_body(one) if isinstance(one, HTTPException) else one for one in found]
        num_failed = sum("error" in one for one in results)
        service.metrics.batch("/v1/locate:batch", len(places))
        made_by = service.finish(release, timings)
        _log.info("located %d of %d places", len(places) - num_failed, len(places))
        answer = {"results": results, "num_failed": num_failed, **made_by}
        return _exported(results, query.format, batch=True) or json_response(answer)

    return router


def _wanted(request: Request, query: BatchQuery) -> dict[str, Any]:
    return {
        "top_k": query.top_k,
        "explain": query.explain,
        "posterior": query.posterior,
        "precision_km": query.precision_km,
        "neighbours": "neighbours" in caller_of(request).scopes,
    }


def _exported(results: Sequence[dict[str, Any]], format: str, *, batch: bool = False) -> Response | None:
    if format == "geojson":
        return json_response(geojson(results, batch=batch), media_type=GEOJSON_TYPE)
    if format == "csv":
        return Response(csv_text(results), media_type=CSV_TYPE)
    return None
