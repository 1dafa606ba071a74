"""One answer with its evidence.

A prediction holds no truth, so it can be written, served and drawn as it is; only `hedwig.evaluate` joins it with one.
What an index did not measure (an old one, or one without validation rows) is None or empty, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Frame", "Posterior", "Prediction"]


@dataclass(frozen=True)
class Frame:
    """One frame that the model saw.

    Attributes:
        heading_deg: of its centre, clockwise from true north where the image's heading is known, else from the image's
            centre column; None where the image says nothing of angles.
        fov_deg: horizontal field of view, or None.
        x0: left edge as a fraction of the image's width, in [0, 1).
        x1: right edge; above 1 where the frame goes around the right edge.
        weight: its share in the answer's cell, 1 over all frames; None unless explained.
        probability: of the answer's cell by this frame alone; None unless explained.
    """

    heading_deg: float | None
    fov_deg: float | None
    x0: float
    x1: float
    weight: float | None = None
    probability: float | None = None


@dataclass(frozen=True)
class Posterior:
    """The cells above a least probability, most probable first: ids (L,) and probabilities (L,)."""

    cell_ids: tuple[int, ...]
    probs: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """One answer and the evidence for it.

    Attributes:
        pano_id: of the query.
        lat: degrees, the answer.
        lon: degrees.
        cell_ids: (K,) geocells, most probable first; as a table row, those that were searched.
        cell_probs: (K,) their calibrated posterior probabilities; they need not add up to 1.
        neighbour_ids: (M,) pano_id of the most similar references in the searched cells, best first; may be empty.
        neighbour_scores: (M,) cosine / score_temperature + log_prob_weight x log p(cell).
        neighbour_lat: (M,) degrees.
        neighbour_lon: (M,) degrees.
        radius_km: the truth lies within it as often as the calibration asked for (90 %).
        confidence: calibrated probability that the answer is within the calibration's distance (200 km) of the truth;
            without such a calibration the posterior probability of the cell that the answer comes from.
        radius_50_km: the truth lies within it half of the time; None where that was not measured.
        localisable: False where confidence is below the settings' `abstain_below`; the answer stands, flagged.
        region_50: geocells that hold the truth half of the time, most probable first; empty unless asked for.
        region_90: the same for 90 %.
        cell_lat: (K,) degrees, centroids of `cell_ids`; empty where the cells have none.
        cell_lon: (K,) degrees.
        entropy_bits: of the posterior over all cells; None where it was not computed.
        frames: what the model saw, in its order; empty for an embedding.
        posterior: of all cells that matter; None unless asked for.
        cell_id: the geocell that the answer comes from, that of its best neighbour; often, not always, the first of
            `cell_ids`. None in predictions written before it was told.
    """

    pano_id: str
    lat: float
    lon: float
    cell_ids: tuple[int, ...]
    cell_probs: tuple[float, ...]
    neighbour_ids: tuple[str, ...]
    neighbour_scores: tuple[float, ...]
    neighbour_lat: tuple[float, ...]
    neighbour_lon: tuple[float, ...]
    radius_km: float
    confidence: float
    radius_50_km: float | None = None
    localisable: bool = True
    region_50: tuple[int, ...] = ()
    region_90: tuple[int, ...] = ()
    cell_lat: tuple[float, ...] = ()
    cell_lon: tuple[float, ...] = ()
    entropy_bits: float | None = None
    frames: tuple[Frame, ...] = ()
    posterior: Posterior | None = None
    cell_id: int | None = None

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Prediction:
        """What `to_dict` gave, also after a trip through JSON; keys of others are ignored."""
        values = {field.name: found[field.name] for field in fields(cls) if field.name in found}
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        values["frames"] = tuple(Frame(**frame) for frame in values.get("frames", ()))
        if (posterior := values.get("posterior")) is not None:
            values["posterior"] = Posterior(tuple(posterior["cell_ids"]), tuple(posterior["probs"]))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        found: dict[str, Any] = _lists(asdict(self))
        return found

    def to_geojson(self, polygons: Mapping[int, Any] | None = None) -> dict[str, Any]:
        """A FeatureCollection (RFC 7946, so [lon, lat]): the answer, neighbours and cells by rank, then the regions.

        Args:
            polygons: shapely geometry (x = lon) by cell_id, to draw the regions' cells; None lists their ids only.
        """
        answer: dict[str, Any] = {
            "role": "answer",
            "pano_id": self.pano_id,
            "radius_km": self.radius_km,
            "confidence": self.confidence,
            "cell_ids": list(self.cell_ids),
            "cell_probs": list(self.cell_probs),
        }
        if self.cell_id is not None:
            answer["cell_id"] = self.cell_id
        if self.radius_50_km is not None:
            answer["radius_50_km"] = self.radius_50_km
        if not self.localisable:
            answer["localisable"] = False
        regions = ((50, self.region_50), (90, self.region_90))
        if polygons is None:
            answer |= {f"region_{percent}": list(cells) for percent, cells in regions if cells}
        features = [_point(self.lat, self.lon, answer)]
        columns = (self.neighbour_ids, self.neighbour_scores, self.neighbour_lat, self.neighbour_lon)
        for rank, (name, score, lat, lon) in enumerate(zip(*columns, strict=True), start=1):
            features.append(_point(lat, lon, {"role": "neighbour", "rank": rank, "pano_id": name, "score": score}))
        cells = zip(self.cell_ids, self.cell_probs, self.cell_lat, self.cell_lon, strict=False)
        for rank, (cell, probability, lat, lon) in enumerate(cells, start=1):
            about = {"role": "cell", "rank": rank, "cell_id": cell, "probability": probability}
            features.append(_point(lat, lon, about))
        if polygons is not None:
            features += [_region(percent / 100, cells, polygons) for percent, cells in regions if cells]
        return {"type": "FeatureCollection", "features": features}


def _lists(value: Any) -> Any:
    """The same with lists for tuples."""
    if isinstance(value, dict):
        return {name: _lists(item) for name, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _point(lat: float | None, lon: float | None, properties: Mapping[str, Any]) -> dict[str, Any]:
    known = lat is not None and lon is not None and math.isfinite(lat) and math.isfinite(lon)
    geometry = {"type": "Point", "coordinates": [lon, lat]} if known else None
    return {"type": "Feature", "geometry": geometry, "properties": dict(properties)}


def _region(share: float, cells: tuple[int, ...], polygons: Mapping[int, Any]) -> dict[str, Any]:
    parts = [polygons[cell].__geo_interface__ for cell in cells]
    properties = {"role": "region", "share": share, "cell_ids": list(cells)}
    return {
        "type": "Feature",
        "geometry": {"type": "GeometryCollection", "geometries": parts},
        "properties": properties,
    }
