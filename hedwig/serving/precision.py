"""The precision floor: an answer made so coarse that it cannot be used to stand in front of somebody's house.

The Earth is cut into squares with a side of the floor. The answer becomes the centre of its square, the posterior the
sum over the squares that hold the geocells' centroids, and radius, regions and confidence are computed again from
those sums alone; neighbours are withheld. So the coarse answer is a function of the square and of the coarse
posterior and of nothing else: two images with the same of both get the same answer to the last bit. Fields are chosen,
not struck out: what a later version adds to a prediction is withheld until somebody decides otherwise here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedwig.geo import EARTH_RADIUS_KM, haversine_km

__all__ = ["coarse_geojson", "coarsen", "square_centres", "whole", "withhold_neighbours"]

_Place = tuple[float, ...]  # lat and lon in degrees, and km from there to the corner of the square
_NEIGHBOURS = ("neighbour_ids", "neighbour_scores", "neighbour_lat", "neighbour_lon")
_SIDES = np.array([-0.5, 0.0, 0.5])
_SHARES = (0.5, 0.9)
_DIGITS = 4  # of probabilities: the rest is rounding of sums


def square_centres(lat: ArrayLike, lon: ArrayLike, floor_km: float) -> NDArray[np.float64]:
    """(N, 3): centre, lat and lon in degrees, of the squares that hold these points, and centre to corner in km.

    Bands of latitude of equal height, each cut into a whole number of equal parts, so that no square has a side below
    `floor_km` and none crosses the antimeridian.

    Args:
        lat: (N,) degrees.
        lon: (N,) degrees.
        floor_km: Least side.
    """
    circumference_km = 2 * math.pi * EARTH_RADIUS_KM
    num_bands = max(1, int(circumference_km / 2 / floor_km))
    height = 180.0 / num_bands
    band = np.clip(np.floor((np.asarray(lat, np.float64) + 90.0) / height), 0, num_bands - 1)
    centre_lat = -90.0 + (band + 0.5) * height
    # A square is measured where its band is narrowest.
    edge = np.minimum(np.abs(centre_lat) + height / 2, 90.0)
    num_parts = np.maximum(1, np.floor(circumference_km * np.cos(np.radians(edge)) / floor_km))
    width = 360.0 / num_parts
    wrapped = (np.asarray(lon, np.float64) + 180.0) % 360.0
    part = np.clip(np.floor(wrapped / width), 0, num_parts - 1)
    centre_lon = -180.0 + (part + 0.5) * width
    sides = [haversine_km(centre_lat, centre_lon, centre_lat + h, centre_lon + width / 2) for h in _SIDES * height]
    corner_km = np.max(sides, axis=0)
    return np.stack([np.round(centre_lat, 6), np.round(centre_lon, 6), corner_km], axis=-1)


def coarsen(
    answer: Mapping[str, Any],
    cell_lat: Sequence[float] | NDArray[np.float64],
    cell_lon: Sequence[float] | NDArray[np.float64],
    floor_km: float,
    *,
    top_k: int = 5,
) -> dict[str, Any]:
    """The answer at the precision of `floor_km`, fit to be shown to anybody.

    Args:
        answer: The fields of a prediction, with ``cell_ids`` and ``cell_probs`` of as many cells as there are: what is
            not listed is missing from the sums, and a list that was cut short tells something about what is in it.
        cell_lat: (C,) degrees, centroids of the geocells.
        cell_lon: (C,) degrees.
        floor_km: Side of the squares.
        top_k: Areas to list.

    Returns:
        ``lat, lon, radius_km, radius_50_km, confidence, precision_km, areas`` (each with lat, lon and prob, the
        likeliest first), and the fields of a prediction that are withheld, empty.

    Raises:
        ValueError: `floor_km` is not positive.
    """
    if not floor_km > 0 or not math.isfinite(floor_km):
        raise ValueError(f"floor_km is {floor_km:g}; it must be a positive number of kilometres.")
    lat, lon, corner_km = (float(v) for v in square_centres([answer["lat"]], [answer["lon"]], floor_km)[0])
    cells = np.asarray(answer["cell_ids"], dtype=np.int64)
    centres = square_centres(np.asarray(cell_lat)[cells], np.asarray(cell_lon)[cells], floor_km)
    sums: dict[_Place, list[float]] = defaultdict(list)
    for place, prob in zip(map(tuple, centres.tolist()), answer["cell_probs"], strict=True):
        sums[place].append(float(prob))
    # fsum: the order and the split of the summands must not show in the last digit.
    rounded = ((round(math.fsum(probs), _DIGITS), place) for place, probs in sums.items())
    areas = sorted((area for area in rounded if area[0] > 0), key=_rank)
    radii = _radii(areas, (lat, lon, corner_km), floor_km)
    here = next((prob for prob, place in areas if place[:2] == (lat, lon)), 0.0)
    return {
        "pano_id": "",
        "lat": lat,
        "lon": lon,
        "cell_ids": [],
        "cell_probs": [],
        **{name: [] for name in _NEIGHBOURS},
        "radius_km": radii[0.9],
        "radius_50_km": radii[0.5],
        "confidence": here,
        "precision_km": float(floor_km),
        "areas": [{"lat": a, "lon": o, "prob": prob} for prob, (a, o, _) in areas[:top_k]],
    }


def whole(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer with all the cells of its ``posterior`` in place of the first few, as `coarsen` takes it."""
    posterior = answer["posterior"]
    return {**answer, "cell_ids": posterior["cell_ids"], "cell_probs": posterior["probs"], "posterior": None}


def withhold_neighbours(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer without the ids and the places of training panoramas, for who may not see them."""
    return {**answer, **{name: [] for name in _NEIGHBOURS}}


def coarse_geojson(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A FeatureCollection (RFC 7946, so [lon, lat]) of what `coarsen` returned: the answer, then its areas."""
    told = {name: answer[name] for name in ("radius_km", "radius_50_km", "confidence", "precision_km")}
    features = [_point(answer["lat"], answer["lon"], {"role": "answer", **told})]
    for rank, area in enumerate(answer["areas"], start=1):
        features.append(_point(area["lat"], area["lon"], {"role": "area", "rank": rank, "prob": area["prob"]}))
    return {"type": "FeatureCollection", "features": features}


def _rank(area: tuple[float, _Place]) -> tuple[float, _Place]:
    return -area[0], area[1]


def _radii(areas: Sequence[tuple[float, _Place]], answer: _Place, floor_km: float) -> dict[float, float]:
    """The distances from the answer that cover half and nine tenths of what the areas hold, in whole floors."""
    places = np.array([place for _, place in areas] or [answer])
    reach_km = haversine_km(answer[0], answer[1], places[:, 0], places[:, 1]) + places[:, 2]
    order = np.argsort(reach_km, kind="stable")
    mass = np.cumsum(np.array([prob for prob, _ in areas] or [1.0])[order])
    return {
        share: floor_km * math.ceil(reach_km[order][np.searchsorted(mass, share * mass[-1] - 1e-9)] / floor_km)
        for share in _SHARES
    }


def _point(lat: float, lon: float, properties: Mapping[str, Any]) -> dict[str, Any]:
    geometry = {"type": "Point", "coordinates": [lon, lat]}
    return {"type": "Feature", "geometry": geometry, "properties": dict(properties)}
