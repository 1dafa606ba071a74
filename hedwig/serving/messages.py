"""What the service is asked and what it answers, as pydantic models: the contract that /openapi.json publishes.

Questions are checked by these models. Answers are not converted by them: the server sends what the locator gave, the
client and the tests parse it. A number that is not known (an uncalibrated radius) is null, because JSON has no NaN.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AreaAnswer",
    "BatchAnswer",
    "BatchBody",
    "BatchQuery",
    "CellsAnswer",
    "CellsQuery",
    "EmbedAnswer",
    "EmbedQuery",
    "ErrorAnswer",
    "ErrorDetail",
    "FrameAnswer",
    "InfoAnswer",
    "LocateAnswer",
    "LocateQuery",
    "Located",
    "NeighboursAnswer",
    "NeighboursBody",
    "NeighboursQuery",
    "PlaceBody",
    "PosteriorAnswer",
    "StateAnswer",
]

_Heading = Annotated[float, Field(ge=-360.0, le=360.0, allow_inf_nan=False)]
_HEADING = "degrees clockwise from true north of the image's centre column; leave out when not known"
_STRICT = ConfigDict(extra="forbid")


class BatchQuery(BaseModel):
    """Query parameters of ``POST /v1/locate:batch``; any other one is refused."""

    model_config = _STRICT

    top_k: int = Field(default=5, ge=1, le=50, description="how many geocells and how many neighbours to return")
    explain: bool = Field(default=False, description="weigh every frame; takes about as long again as the answer")
    posterior: bool = Field(default=False, description="list the probability of every geocell above 0.0001")
    precision_km: float = Field(
        default=0.0, ge=0.0, le=5000.0, allow_inf_nan=False, description="answer in squares of this side; never finer"
    )
    format: Literal["json", "geojson", "csv"] = "json"


class LocateQuery(BatchQuery):
    """Query parameters of ``POST /v1/locate``; any other one is refused."""

    heading: _Heading | None = Field(default=None, description=_HEADING + "; of a JSON body it is part")


class EmbedQuery(BaseModel):
    """Query parameters of ``POST /v1/embed``; any other one is refused."""

    model_config = _STRICT

    heading: _Heading | None = Field(default=None, description=_HEADING)


class NeighboursQuery(EmbedQuery):
    """Query parameters of ``POST /v1/neighbours``; any other one is refused."""

    top_k: int = Field(default=5, ge=1, le=100, description="how many neighbours to return for each embedding")


class CellsQuery(BaseModel):
    """Query parameters of ``GET /v1/cells``; any other one is refused."""

    model_config = _STRICT

    tolerance_deg: float = Field(
        default=0.05, ge=0.0, le=1.0, allow_inf_nan=False, description="how far a simplified border may stray"
    )


class PlaceBody(BaseModel):
    """One place: ``image`` (and perhaps ``heading``), or ``images`` (and perhaps ``headings_deg``)."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"example": {"images": ["/9j/4AAQ…", "/9j/4AAQ…"], "headings_deg": [0.0, 180.0]}},
    )

    image: str | None = Field(default=None, description="one panorama: the file in base64")
    heading: _Heading | None = Field(default=None, description=_HEADING)
    images: list[str] | None = Field(default=None, min_length=1, description="several photographs, each in base64")
    headings_deg: list[_Heading] | None = Field(
        default=None, description="heading of each photograph's centre; null: evenly spaced, clockwise from the first"
    )


class BatchBody(BaseModel):
    """Several places; the answer keeps their order."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"example": {"items": [{"image": "/9j/4AAQ…", "heading": 12.5}, {"image": "iVBORw0KGgo…"}]}},
    )

    items: list[PlaceBody] = Field(min_length=1)


class NeighboursBody(BaseModel):
    """Embeddings as ``/v1/embed`` gives them, one or several; the plural fields have one entry for each.

    Several embeddings may also be one base64 text of little-endian float32 numbers, row after row, which is far faster.
    """

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"example": {"embedding": [0.6, 0.8], "cells": [412, 409]}},
    )

    embedding: list[float] | None = Field(default=None, description="of one panorama")
    embeddings: list[list[float]] | str | None = Field(default=None, description="of several")
    text_embedding: list[float] | None = None
    text_embeddings: list[list[float]] | str | None = None
    frame_embeddings: list[list[float]] | list[list[list[float]]] | None = Field(
        default=None, description="of each frame, where /v1/embed gave them; for several embeddings a list of such"
    )
    cells: list[int] | list[list[int]] | None = Field(
        default=None, description="search these geocells and not those that the run finds likely; -1 is none"
    )


class FrameAnswer(BaseModel):
    """One frame that the model saw."""

    heading_deg: float | None = Field(
        description="of its centre, 0 to 360, from true north if a heading was given, else from the image's centre"
    )
    fov_deg: float | None = Field(description="horizontal field of view")
    x0: float = Field(description="left edge, as a fraction of the image's width")
    x1: float = Field(description="right edge; above 1 where the frame goes around the right edge")
    weight: float | None = Field(default=None, description="share in the likeliest cell, 1 over all frames; explain")
    probability: float | None = Field(default=None, description="of the likeliest cell by this frame alone; explain")


class PosteriorAnswer(BaseModel):
    """The geocells that matter, the likeliest first."""

    cell_ids: list[int]
    probs: list[float]


class AreaAnswer(BaseModel):
    """One square of an answer that was made coarse."""

    lat: float = Field(description="of its centre")
    lon: float
    prob: float


LOCATED: dict[str, Any] = {
    "pano_id": "5f2b7c0e9a4d4c1fb0c2f1a7d9e8b3c4",
    "lat": 60.3913,
    "lon": 5.3221,
    "cell_id": 412,
    "cell_ids": [412, 409],
    "cell_probs": [0.61, 0.17],
    "cell_lat": [60.41, 60.12],
    "cell_lon": [5.31, 5.62],
    "neighbour_ids": ["no-bergen-00017", "no-bergen-00203"],
    "neighbour_scores": [0.83, 0.79],
    "neighbour_lat": [60.3920, 60.3801],
    "neighbour_lon": [5.3240, 5.3312],
    "radius_km": 38.0,
    "radius_50_km": 12.0,
    "confidence": 0.61,
    "localisable": True,
    "entropy_bits": 2.13,
    "region_50": [412],
    "region_90": [412, 409, 377],
    "frames": [{"heading_deg": 236.2, "fov_deg": 112.5, "x0": 0.0, "x1": 0.3125, "weight": None, "probability": None}],
    "posterior": None,
}
_MADE_BY: dict[str, Any] = {"model": "viclip-l14@0a1b2c3d4e5f", "version": "0.1.0", "run_digest": "9f86d081…"}
_TIMINGS = {"wait": 0.1, "read": 3.2, "decode": 21.4, "encode": 388.1, "search": 1.2, "total": 414.0}


def _example(**fields: Any) -> ConfigDict:
    return ConfigDict(extra="allow", json_schema_extra={"example": fields})


class MadeBy(BaseModel):
    """What made an answer: equal in everything that belongs together."""

    timings_ms: dict[str, float] = Field(
        description="wait: for a place and a thread; read: the body; decode, encode, search, explain; total"
    )
    model: str | None = None
    version: str
    run_digest: str | None = Field(default=None, description="of the run's index, which names its inputs")


class Located(BaseModel):
    """Where an image was taken, and the evidence: the fields of a prediction."""

    model_config = _example(**LOCATED)

    pano_id: str
    lat: float | None = Field(description="degrees north, WGS 84")
    lon: float | None = Field(description="degrees east, WGS 84")
    cell_id: int | None = Field(default=None, description="the geocell that the answer comes from")
    cell_ids: list[int] = Field(description="geocells, the likeliest first")
    cell_probs: list[float | None] = Field(description="calibrated probability of each of `cell_ids`")
    cell_lat: list[float | None] = Field(default=[], description="centroids of `cell_ids`")
    cell_lon: list[float | None] = []
    neighbour_ids: list[str] = Field(description="reference panoramas, the best first")
    neighbour_scores: list[float | None]
    neighbour_lat: list[float | None] = []
    neighbour_lon: list[float | None] = []
    radius_km: float | None = Field(default=None, description="the true place is within it nine times out of ten")
    radius_50_km: float | None = Field(default=None, description="the true place is within it every second time")
    confidence: float | None = Field(default=None, description="probability that the answer is good")
    localisable: bool = Field(default=True, description="false: too little is seen to tell; the answer is a guess")
    entropy_bits: float | None = Field(default=None, description="of the posterior over all geocells; 0 is certainty")
    region_50: list[int] = Field(default=[], description="geocells that hold the truth every second time")
    region_90: list[int] = Field(default=[], description="geocells that hold the truth nine times out of ten")
    frames: list[FrameAnswer] = Field(default=[], description="what the model saw, clockwise")
    posterior: PosteriorAnswer | None = Field(default=None, description="only where it was asked for")
    precision_km: float | None = Field(default=None, description="side of the squares of an answer made coarse")
    areas: list[AreaAnswer] = Field(default=[], description="of an answer made coarse, the likeliest squares first")


class LocateAnswer(Located, MadeBy):
    """The answer of ``POST /v1/locate``."""

    model_config = _example(**LOCATED, timings_ms=_TIMINGS, **_MADE_BY)


class ErrorDetail(BaseModel):
    """One refusal: what was wrong and what to do."""

    code: str = Field(description="stable name, for programs")
    message: str = Field(description="what was wrong, with the value seen")
    next: str = Field(description="what to do about it")


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a success."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "error": {
                    "code": "empty_body",
                    "message": "The request body is empty (0 bytes).",
                    "next": "Send the file itself: curl --data-binary @panorama.jpg -H 'Content-Type: image/jpeg'.",
                }
            }
        }
    )

    error: ErrorDetail


_ONE_BAD = {"error": {"code": "bad_image", "message": "The JPEG is cut short.", "next": "Download it again."}}


class BatchAnswer(MadeBy):
    """The answer of ``POST /v1/locate:batch``: for each item its place or its error, in the order of the items."""

    model_config = _example(results=[LOCATED, _ONE_BAD], num_failed=1, timings_ms=_TIMINGS, **_MADE_BY)

    results: list[Located | ErrorAnswer]
    num_failed: int


class EmbedAnswer(MadeBy):
    """The answer of ``POST /v1/embed``."""

    model_config = _example(
        pano_id=LOCATED["pano_id"],
        embedding=[0.6, 0.8],
        text_embedding=None,
        frame_embeddings=None,
        dim=2,
        timings_ms={name: _TIMINGS[name] for name in ("wait", "read", "decode", "encode", "total")},
        **_MADE_BY,
    )

    pano_id: str
    embedding: list[float] = Field(description="of unit norm; what the references' image_embedding is")
    text_embedding: list[float] | None = Field(default=None, description="of the caption, where the run makes one")
    frame_embeddings: list[list[float]] | None = Field(default=None, description="where the run compares frames")
    dim: int = Field(description="length of `embedding`")


class NeighboursAnswer(MadeBy):
    """The answer of ``POST /v1/neighbours``: a row for each embedding, shorter where there is nothing more."""

    model_config = _example(
        cell_ids=[[412, 409]],
        neighbour_ids=[["no-bergen-00017", "no-bergen-00203"]],
        neighbour_scores=[[0.83, 0.79]],
        neighbour_lat=[[60.3920, 60.3801]],
        neighbour_lon=[[5.3240, 5.3312]],
        timings_ms={"wait": 0.0, "read": 0.1, "search": 0.2, "total": 0.3},
        **_MADE_BY,
    )

    cell_ids: list[list[int]] = Field(description="the geocells that were searched, -1 for none")
    neighbour_ids: list[list[str]]
    neighbour_scores: list[list[float]]
    neighbour_lat: list[list[float]]
    neighbour_lon: list[list[float]]


class CellsAnswer(BaseModel):
    """The answer of ``GET /v1/cells``: GeoJSON, RFC 7946."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {
                "type": "FeatureCollection",
                "features": [
                    {
                        "type": "Feature",
                        "id": 412,
                        "geometry": {"type": "Polygon", "coordinates": [[[5, 60], [6, 60], [6, 61], [5, 60]]]},
                        "properties": {
                            "cell_id": 412,
                            "country": "NO",
                            "admin1": "Vestland",
                            "num_panoramas": 118,
                            "radius_km": 41.0,
                            "lat": 60.41,
                            "lon": 5.31,
                        },
                    }
                ],
            }
        },
    )

    type: Literal["FeatureCollection"]
    features: list[dict[str, Any]]


class StateAnswer(BaseModel):
    """A probe that succeeded."""

    model_config = ConfigDict(json_schema_extra={"example": {"status": "ready"}})

    status: str


class InfoAnswer(BaseModel):
    """What is being served."""

    model_config = _example(
        weights="sha256 1f0c9d…",
        num_references=240_000,
        num_cells=2_000,
        dim=768,
        digests={"index": "9f86d081…", "geolocator": "60303ae2…"},
        versions={"faiss": "1.15.1", "torch": "2.12.0"},
        layout={"encoder": "together", "shards": 1},
        publication={"state": "current", "published": "versions/0002@2026-11-23T05:20:00Z", "reason": None},
        limits={"max_body_bytes": 26_214_400},
        **_MADE_BY,
    )

    model: str | None = Field(default=None, description="identifier of the image encoder")
    weights: str | None = Field(default=None, description="digest or origin of its weights")
    num_references: int | None = Field(default=None, description="panoramas in the index")
    num_cells: int | None = None
    dim: int | None = Field(default=None, description="length of an embedding")
    run_digest: str | None = Field(default=None, description="sha256 of the index manifest, which names its inputs")
    digests: dict[str, str] = Field(default={}, description="sha256 of the manifest of each artefact")
    version: str
    versions: dict[str, str] = Field(default={}, description="of the packages that compute")
    layout: dict[str, str | int] | None = Field(
        default=None, description="whether the encoder is in the replicas that answer, and pieces of the index"
    )
    publication: dict[str, str | None] | None = Field(
        default=None,
        description="what is published, and whether this replica serves it: current, loading, failed (what was served "
        "before stays) or unknown (the pointer cannot be read)",
    )
    limits: dict[str, Any]
