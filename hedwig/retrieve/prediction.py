"""One answer with its evidence.

A prediction holds no truth, so it can be written, served and drawn as it is; only `hedwig.evaluate` joins it with one.
What an index did not measure (an old one, or one without validation rows) is None or empty, never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Prediction"]


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

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def to_geojson(self, polygons: Mapping[int, Any] | None = None) -> dict[str, Any]:
        """A FeatureCollection (RFC 7946, so [lon, lat]): the answer first, the neighbours by rank, then the regions.

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
        if polygons is not None:
            features += [_region(percent / 100, cells, polygons) for percent, cells in regions if cells]
        return {"type": "FeatureCollection", "features": features}


def _point(lat: float, lon: float, properties: Mapping[str, Any]) -> dict[str, Any]:
    geometry = {"type": "Point", "coordinates": [lon, lat]}
    return {"type": "Feature", "geometry": geometry, "properties": dict(properties)}


def _region(share: float, cells: tuple[int, ...], polygons: Mapping[int, Any]) -> dict[str, Any]:
    parts = [polygons[cell].__geo_interface__ for cell in cells]
    properties = {"role": "region", "share": share, "cell_ids": list(cells)}
    return {
        "type": "Feature",
        "geometry": {"type": "GeometryCollection", "geometries": parts},
        "properties": properties,
    }
