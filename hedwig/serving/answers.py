"""Answers on their way out: JSON without NaN, GeoJSON and CSV, and refusals as JSON.

JSON is written by pydantic's serialiser, which is several times faster than the standard library's and writes null for
NaN. GeoJSON is what `hedwig.Prediction.to_geojson` draws; CSV is one row for the answer, each cell and each neighbour.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hedwig.retrieve.prediction import Prediction
from hedwig.serving.limits import REFUSALS
from hedwig.serving.precision import coarse_geojson

__all__ = [
    "CSV_COLUMNS",
    "CSV_TYPE",
    "GEOJSON_TYPE",
    "csv_text",
    "error_body",
    "error_response",
    "geojson",
    "json_response",
]

GEOJSON_TYPE = "application/geo+json"
CSV_TYPE = "text/csv; charset=utf-8"
CSV_COLUMNS = ("item", "pano_id", "role", "rank", "id", "lat", "lon", "value", "radius_km")
_STATUS_CODES = {404: "not_found", 405: "wrong_method"}

Located = Sequence[Mapping[str, Any]]


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None, media_type: str = "application/json"
) -> Response:
    """JSON, with null for NaN and infinity."""
    body = to_json(content, inf_nan_mode="null")
    return Response(body, status, headers=dict(headers or {}), media_type=media_type)


def error_body(error: HTTPException) -> dict[str, Any]:
    """The body of an `ErrorAnswer`."""
    detail: Any = error.detail
    if not isinstance(detail, dict):  # raised by the framework: 404 and 405
        code = _STATUS_CODES.get(error.status_code, "bad_parameter")
        detail = {"code": code, "message": f"{detail}.", "next": REFUSALS[code][1]}
    return {"error": detail}


def error_response(error: HTTPException) -> Response:
    """A refusal as it is sent."""
    return json_response(error_body(error), error.status_code, error.headers)


def geojson(results: Located, *, batch: bool = True, items: Sequence[Any] | None = None) -> dict[str, Any]:
    """One FeatureCollection of answers and errors; in a batch every feature names its item, by number or in `items`."""
    features = []
    for item, result in zip(range(len(results)) if items is None else items, results, strict=True):
        if "error" in result:
            about = {"role": "error", **result["error"]}
            found: list[dict[str, Any]] = [{"type": "Feature", "geometry": None, "properties": about}]
        elif "areas" in result:
            found = coarse_geojson(result)["features"]
        else:
            found = Prediction.from_dict(result).to_geojson()["features"]
        for feature in found:
            if batch:
                feature["properties"]["item"] = item
            features.append(feature)
    return {"type": "FeatureCollection", "features": features}


def csv_text(results: Located, *, items: Sequence[Any] | None = None) -> str:
    """Rows of `CSV_COLUMNS`: `role` is answer, cell, neighbour, area or error; `value` the role's own number.

    That is the confidence of an answer, the probability of a cell or an area, the score of a neighbour. `item` is the
    number of the result, or what `items` calls it.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\r\n")  # RFC 4180
    writer.writerow(CSV_COLUMNS)
    for item, result in zip(range(len(results)) if items is None else items, results, strict=True):
        for row in _rows(result):
            writer.writerow([item, result.get("pano_id", ""), *["" if v is None or v != v else v for v in row]])
    return stream.getvalue()


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    if "error" in found:
        yield "error", 1, found["error"]["code"], None, None, None, None
        return
    yield "answer", 1, "", found["lat"], found["lon"], found.get("confidence"), found.get("radius_km")
    for role, ids, values, prefix in (
        ("cell", "cell_ids", "cell_probs", "cell"),
        ("neighbour", "neighbour_ids", "neighbour_scores", "neighbour"),
    ):
        names, nothing = found[ids], [None] * len(found[ids])
        lat, lon = found.get(f"{prefix}_lat") or nothing, found.get(f"{prefix}_lon") or nothing
        for rank, row in enumerate(zip(names, lat, lon, found[values], strict=True), start=1):
            yield role, rank, *row, None
    for rank, area in enumerate(found.get("areas", ()), start=1):
        yield "area", rank, "", area["lat"], area["lon"], area["prob"], None
