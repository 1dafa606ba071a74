"""What /openapi.json says beyond the models: bodies that are no JSON, and an example of every refusal.

The examples are the texts of `REFUSALS`, grouped by status, so that a refusal which is added there is documented by
naming it at its route.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from hedwig.serving.limits import IMAGE_TYPES, REFUSALS
from hedwig.serving.messages import BatchBody, CellsAnswer, ErrorAnswer, NeighboursBody, PlaceBody

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI
    from pydantic import BaseModel

__all__ = [
    "BODY_MODELS",
    "BODY_REFUSALS",
    "EVERYWHERE",
    "IMAGE_REFUSALS",
    "body_of",
    "describe",
    "image_content",
    "query_of",
    "refused",
    "shown",
]

BODY_MODELS = (PlaceBody, BatchBody, NeighboursBody, CellsAnswer)
_REFERENCE = "#/components/schemas/{model}"

EVERYWHERE = ("bad_host", "no_key", "bad_key", "expired_key", "missing_scope", "rate_limited", "internal", "overloaded")
BODY_REFUSALS = (
    "bad_parameter", "bad_body", "body_incomplete", "empty_body", "body_timeout", "body_too_large", "unsupported_type",
    "too_slow", "not_ready",
)  # fmt: skip
IMAGE_REFUSALS = ("too_many_pixels", "not_an_image", "bad_image")
_PHRASES = {
    400: "The request is wrong",
    401: "A key is needed",
    403: "This key may not do that",
    404: "There is no such thing here",
    408: "The body arrived too slowly",
    413: "Too large",
    415: "Not of a kind that is accepted",
    422: "The image is cut short or damaged",
    429: "Asked too often; see Retry-After",
    500: "The service failed",
    503: "Overloaded or not ready; see Retry-After",
}


def refused(*codes: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these refusals and those of every route, each with its example."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in dict.fromkeys((*EVERYWHERE, *codes)):
        status, advice = REFUSALS[code]
        if status not in found:
            content: dict[str, Any] = {"application/json": {"examples": {}}}
            found[status] = {"model": ErrorAnswer, "description": _PHRASES[status], "content": content}
            if status in (429, 503):
                seconds = {"schema": {"type": "integer"}, "description": "seconds to wait"}
                found[status]["headers"] = {"Retry-After": seconds}
        example = {"error": {"code": code, "message": "What was wrong, with the value seen.", "next": advice}}
        found[status]["content"]["application/json"]["examples"][code] = {"value": example}
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def shown(
    model: type[BaseModel], description: str, other: Mapping[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The response 200: a model as JSON, and other media types by their examples."""
    found: dict[str, Any] = {"model": model, "description": description}
    if other:
        found["content"] = {name: {"example": example} for name, example in other.items()}
    return {200: found}


def image_content() -> dict[str, Any]:
    """The request body as an image file."""
    return {name: {"schema": {"type": "string", "format": "binary"}} for name in IMAGE_TYPES}


def body_of(description: str, content: Mapping[str, Any], model: type[BaseModel] | None = None) -> dict[str, Any]:
    """`openapi_extra` with a request body; `model` is its JSON, one of `BODY_MODELS`."""
    described = dict(content)
    if model is not None:
        described["application/json"] = {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}}
    return {"requestBody": {"required": True, "description": description, "content": described}}


def query_of(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` with the query parameters of a model, as FastAPI describes those that it reads."""
    fields = model.model_json_schema()["properties"]
    return {"parameters": [{"name": n, "in": "query", "required": False, "schema": fields[n]} for n in fields]}


def describe(app: FastAPI) -> dict[str, Any]:
    """The document of an application, with the models of bodies that FastAPI does not read."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        _, schemas = models_json_schema([(m, "validation") for m in BODY_MODELS], ref_template=_REFERENCE)
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        app.openapi_schema = document
    return app.openapi_schema
