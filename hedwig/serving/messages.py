"""What the service answers, as pydantic models: the contract that /openapi.json publishes and the client parses.

The server itself sends what the locator gave, unchanged; these models describe and check it, they never convert it.
A number that is not known (an uncalibrated radius) is null, because JSON has no NaN.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ErrorAnswer", "ErrorDetail", "InfoAnswer", "LocateAnswer", "LocateQuery", "StateAnswer"]


class LocateQuery(BaseModel):
    """Query parameters of ``POST /v1/locate``; any other one is refused."""

    model_config = ConfigDict(extra="forbid")

    top_k: int = Field(default=5, ge=1, le=50, description="how many geocells and how many neighbours to return")
    heading: float | None = Field(
        default=None,
        ge=-360.0,
        le=360.0,
        allow_inf_nan=False,
        description="degrees clockwise from true north of the image's centre column; leave out when not known",
    )


class LocateAnswer(BaseModel):
    """Where the image was taken, and the evidence: the fields of a prediction, then what the service adds."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {
                "pano_id": "5f2b7c0e9a4d4c1fb0c2f1a7d9e8b3c4",
                "lat": 60.3913,
                "lon": 5.3221,
                "cell_ids": [412, 409],
                "cell_probs": [0.61, 0.17],
                "neighbour_ids": ["no-bergen-00017", "no-bergen-00203"],
                "neighbour_scores": [0.83, 0.79],
                "neighbour_lat": [60.3920, 60.3801],
                "neighbour_lon": [5.3240, 5.3312],
                "radius_km": 38.0,
                "confidence": 0.61,
                "timings_ms": {"wait": 0.1, "read": 3.2, "locate": 411.0, "total": 414.6},
                "model": "ViCLIP-L/14",
                "version": "0.1.0",
            }
        },
    )

    pano_id: str
    lat: float | None = Field(description="degrees north, WGS 84")
    lon: float | None = Field(description="degrees east, WGS 84")
    cell_ids: list[int] = Field(description="geocells, the likeliest first")
    cell_probs: list[float | None] = Field(description="probability of each of `cell_ids`")
    neighbour_ids: list[str] = Field(description="reference panoramas, the best first")
    neighbour_scores: list[float | None]
    neighbour_lat: list[float | None] = []
    neighbour_lon: list[float | None] = []
    radius_km: float | None = Field(default=None, description="the true place is expected within this distance")
    confidence: float | None = None
    timings_ms: dict[str, float] = Field(
        description="wait: for a place; read: the body; locate: decoding, encoding and searching; total"
    )
    model: str | None = None
    version: str


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


class StateAnswer(BaseModel):
    """A probe that succeeded."""

    status: str


class InfoAnswer(BaseModel):
    """What is being served."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(default=None, description="identifier of the image encoder")
    weights: str | None = Field(default=None, description="digest or origin of its weights")
    num_references: int | None = Field(default=None, description="panoramas in the index")
    num_cells: int | None = None
    run_digest: str | None = Field(default=None, description="sha256 of the index manifest, which names its inputs")
    version: str
    limits: dict[str, Any]
