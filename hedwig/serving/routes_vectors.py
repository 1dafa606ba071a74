"""The routes of embeddings: ``/v1/embed`` makes one of an image, ``/v1/neighbours`` searches with one or with many.

The search is the retrieval path on stored embeddings, kept thin: parameters and JSON are parsed by hand, and a few
embeddings are searched without a thread. Many embeddings travel fastest as plain float32 numbers
(``application/octet-stream``), with base64 in JSON next.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hedwig.serving.access import charge
from hedwig.serving.answers import json_response
from hedwig.serving.audited import note
from hedwig.serving.bodies import FLOATS_TYPE, JSON_TYPE, Asked, read_embeddings, read_place, read_query
from hedwig.serving.limits import check_type
from hedwig.serving.messages import (
    EmbedAnswer,
    EmbedQuery,
    NeighboursAnswer,
    NeighboursBody,
    NeighboursQuery,
    PlaceBody,
)
from hedwig.serving.openapi import BODY_REFUSALS, IMAGE_REFUSALS, body_of, image_content, query_of, refused, shown
from hedwig.serving.service import Service, Timings

__all__ = ["vector_routes"]

_IMAGES = {name: content for name, content in image_content().items() if name != FLOATS_TYPE}
_FLOATS = {FLOATS_TYPE: {"schema": {"type": "string", "format": "binary"}}}


def vector_routes(service: Service) -> APIRouter:
    """The two routes, over one service."""
    router, limits = APIRouter(tags=["embeddings"]), service.limits

    @router.post(
        "/v1/neighbours",
        response_model=None,
        responses=shown(NeighboursAnswer, "The most similar references in the likely geocells, for each embedding")
        | refused(*BODY_REFUSALS, *IMAGE_REFUSALS, "withheld"),
        openapi_extra=body_of(
            "Embeddings as JSON or as rows of little-endian float32 numbers, or an image.",
            _IMAGES | _FLOATS,
            NeighboursBody,
        )
        | query_of(NeighboursQuery),
    )
    async def neighbours(request: Request) -> Response:
        """The references most similar to embeddings, or to an image."""
        timings, release = Timings(), service.release
        query = read_query(request, NeighboursQuery)
        service.refuse_withheld()
        media_type = check_type(request.headers.get("content-type"), (JSON_TYPE, FLOATS_TYPE, *_IMAGES))
        async with service.place(timings):
            with timings.stage("read"):
                if media_type in _IMAGES:
                    place = await read_place(request, limits, query.heading, json=False)
                else:
                    asked = await read_embeddings(request, limits, release.locator.dim)
            if media_type in _IMAGES:
                found = await service.embed(release, place, timings)
                note(request, [place.photographs], [found])
                if isinstance(found, HTTPException):
                    raise found
                text, frames = found.get("text_embedding"), found.get("frame_embeddings")
                asked = Asked(
                    found["image_embedding"][None],
                    None if text is None else text[None],
                    None if frames is None else frames[None],
                )
            await charge(request, len(asked.image) - 1)
            answer = await service.neighbours(release, asked, timings, top_k=query.top_k)
        return json_response({**answer, **service.finish(release, timings)})

    @router.post(
        "/v1/embed",
        response_model=None,
        responses=shown(EmbedAnswer, "The embedding") | refused(*BODY_REFUSALS, *IMAGE_REFUSALS, "withheld"),
        openapi_extra=body_of("One place, as for /v1/locate.", image_content(), PlaceBody),
    )
    async def embed(request: Request, query: Annotated[EmbedQuery, Query()]) -> Response:
        """The embedding of one place, as the references have it."""
        timings, release = Timings(), service.release
        service.refuse_withheld()
        async with service.place(timings):
            with timings.stage("read"):
                place = await read_place(request, limits, query.heading)
            found = await service.embed(release, place, timings)
        note(request, [place.photographs], [found])
        if isinstance(found, HTTPException):
            raise found
        return json_response({**_told(found), **service.finish(release, timings)})

    return router


def _told(found: dict[str, Any]) -> dict[str, Any]:
    """The columns of one embedding as they are told: a caption's only where there is one."""
    image, text, frames = found["image_embedding"], found.get("text_embedding"), found.get("frame_embeddings")
    return {
        "pano_id": found["pano_id"],
        "embedding": image.tolist(),
        "text_embedding": text.tolist() if text is not None and text.any() else None,
        "frame_embeddings": None if frames is None else frames.reshape(-1, len(image)).tolist(),
        "dim": len(image),
    }
