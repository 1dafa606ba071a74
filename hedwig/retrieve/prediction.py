"""One answer with its evidence, and how wide its radius must be.

A prediction holds no truth, so it can be written, served and drawn as it is; only `hedwig.evaluate` joins it with one.
The radius is a spread times one factor, and that factor is fitted here, on a validation split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Prediction", "fit_radius_scale"]


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
        neighbour_scores: (M,) cosine + log_prob_weight x log p(cell).
        neighbour_lat: (M,) degrees.
        neighbour_lon: (M,) degrees.
        radius_km: the truth lies within it as often as the calibration asked for.
        confidence: calibrated posterior probability of the cell that the answer comes from.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def to_geojson(self) -> dict[str, Any]:
        """A FeatureCollection (RFC 7946, so [lon, lat]): the answer first, then the neighbours by rank."""
        answer = {
            "role": "answer",
            "pano_id": self.pano_id,
            "radius_km": self.radius_km,
            "confidence": self.confidence,
            "cell_ids": list(self.cell_ids),
            "cell_probs": list(self.cell_probs),
        }
        features = [_point(self.lat, self.lon, answer)]
        columns = (self.neighbour_ids, self.neighbour_scores, self.neighbour_lat, self.neighbour_lon)
        for rank, (name, score, lat, lon) in enumerate(zip(*columns, strict=True), start=1):
            features.append(_point(lat, lon, {"role": "neighbour", "rank": rank, "pano_id": name, "score": score}))
        return {"type": "FeatureCollection", "features": features}


def fit_radius_scale(spread_km: ArrayLike, error_km: ArrayLike, coverage: float = 0.9) -> float:
    """The factor by which radii must grow to cover the given share of errors: split conformal prediction.

    Args:
        spread_km: (N,) ``radius_km`` of a validation split, predicted with ``radius_scale=1``.
        error_km: (N,) their great-circle errors.
        coverage: wanted share, in (0, 1).

    Returns:
        The ceil((N + 1) coverage)-th smallest ratio error / spread (Papadopoulos et al. 2002), which covers a new
        query from the same source with at least that probability; the largest one where N is too small for that.
    """
    spread, error = np.asarray(spread_km, dtype=np.float64), np.asarray(error_km, dtype=np.float64)
    if spread.ndim != 1 or spread.shape != error.shape or len(spread) == 0 or not 0 < coverage < 1:
        raise ValueError(f"Need (N,) spreads and errors, N > 0, coverage in (0, 1); got {spread.shape}, {error.shape}.")
    if not ((spread > 0) & np.isfinite(spread) & (error >= 0) & np.isfinite(error)).all():
        raise ValueError("Spreads must be positive and errors not negative, all finite; leave other rows out.")
    ratio = np.sort(error / spread)
    rank = min(math.ceil((len(ratio) + 1) * coverage), len(ratio))
    return max(float(ratio[rank - 1]), 1e-6)


def _point(lat: float, lon: float, properties: Mapping[str, Any]) -> dict[str, Any]:
    geometry = {"type": "Point", "coordinates": [lon, lat]}
    return {"type": "Feature", "geometry": geometry, "properties": dict(properties)}
