"""Answers to compare with: floors that never saw the picture, and the nearest reference by somebody's embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedwig.geo import chord_to_km, lat_lon, unit_vectors
from hedwig.metrics import geoscore

__all__ = ["Embedded", "best_constants", "brute_force_1nn", "checked_positions", "nearest_reference", "take"]

Floats = NDArray[np.float64]
_NUM_GRID, _NUM_SAMPLE = 2000, 5000


@dataclass(frozen=True)
class Embedded:
    """One encoder's embeddings of queries and training references, each row with its name or place.

    Attributes:
        query_ids: (Q,) pano_id of the queries, in any order.
        queries: (Q, D) embeddings.
        references: (N, D) embeddings of training panoramas.
        lat: (N,) degrees, where the references are.
        lon: (N,) degrees.
    """

    query_ids: NDArray[Any]
    queries: NDArray[np.float32]
    references: NDArray[np.float32]
    lat: Floats
    lon: Floats


def best_constants(lat: ArrayLike, lon: ArrayLike, *, seed: int = 0) -> dict[str, tuple[float, float]]:
    """The best answers that look at nothing: one point each for the median error and for the GeoScore.

    Candidates are a Fibonacci grid of the globe and training places, scored on a sample of the training places; the
    best is then refined on finer and finer grids around it. Test positions are not used.

    Args:
        lat: (N,) degrees of the training places.
        lon: (N,) degrees.
        seed: of the sample, used where N is above 5000.

    Returns:
        ``{"constant": (lat, lon), "constant_geoscore": (lat, lon)}``.
    """
    places = unit_vectors(*checked_positions(lat, lon, "training panoramas"))
    if len(places) > _NUM_SAMPLE:
        places = places[np.random.default_rng(seed).choice(len(places), _NUM_SAMPLE, replace=False)]
    # Fibonacci lattice (González 2010): equal areas, so no crowding of candidates at the poles.
    i = np.arange(_NUM_GRID) + 0.5
    grid_lat = np.degrees(np.arcsin(1 - 2 * i / _NUM_GRID))
    grid = unit_vectors(grid_lat, np.degrees(np.pi * (1 + 5**0.5) * i))
    found = {}
    for name in ("constant", "constant_geoscore"):
        candidates = np.concatenate([grid, places[:_NUM_GRID]])
        for spread_deg in (3.0, 1.0, 0.3, 0.1):
            best = candidates[np.argmax(_constant_quality(candidates, places, name))]
            best_lat, best_lon = lat_lon(best)
            steps = np.linspace(-spread_deg, spread_deg, 13)
            # Degrees of longitude shrink with the latitude; near the poles a whole turn is enough.
            stretch = min(1 / max(float(np.cos(np.radians(best_lat))), 1e-3), 60.0)
            around_lat, around_lon = np.meshgrid(np.clip(best_lat + steps, -90, 90), best_lon + steps * stretch)
            candidates = np.concatenate([best[None], unit_vectors(around_lat.ravel(), around_lon.ravel())])
        answer_lat, answer_lon = lat_lon(candidates[np.argmax(_constant_quality(candidates, places, name))])
        found[name] = (float(answer_lat), float(answer_lon))
    return found


def brute_force_1nn(query: ArrayLike, reference: ArrayLike, *, chunk_rows: int = 1024) -> NDArray[np.int64]:
    """Position of the most similar reference (cosine) of each query, over all of them.

    Args:
        query: (Q, D).
        reference: (N, D), N > 0.
        chunk_rows: queries per matrix product; bounds the memory to chunk_rows x N floats.

    Returns:
        (Q,) int64; the first among equals.
    """
    q, r = np.asarray(query, dtype=np.float32), np.asarray(reference, dtype=np.float32)
    if q.ndim != 2 or r.ndim != 2 or q.shape[1] != r.shape[1] or len(r) == 0:
        raise ValueError(f"query must be (Q, D) and reference (N, D) with N > 0; got {q.shape} and {r.shape}.")
    if not (np.isfinite(q).all() and np.isfinite(r).all()):
        raise ValueError("Embeddings that are not finite have no nearest neighbour; embed these panoramas again.")
    # The length of a query does not change who is nearest; that of a reference does.
    r = r / np.maximum(np.linalg.norm(r, axis=1, keepdims=True), 1e-12)
    best = [np.argmax(q[i : i + chunk_rows] @ r.T, axis=1) for i in range(0, len(q), chunk_rows)]
    return np.concatenate([*best, np.empty(0, dtype=np.int64)]).astype(np.int64)


def nearest_reference(name: str, embedded: Embedded, pano_ids: NDArray[Any]) -> tuple[Floats, Floats]:
    """Positions (Q,), (Q,) of the reference nearest in cosine to each of the named queries."""
    row_of = {pano_id: row for row, pano_id in enumerate(np.asarray(embedded.query_ids).tolist())}
    if missing := [p for p in pano_ids.tolist() if p not in row_of]:
        raise ValueError(f"{len(missing)} queries have no embedding for {name!r}, such as {missing[0]!r}; embed them.")
    places = checked_positions(embedded.lat, embedded.lon, f"references of {name!r}")
    if len(places[0]) != len(embedded.references):
        raise ValueError(f"{name!r}: {len(embedded.references)} reference embeddings but {len(places[0])} positions.")
    rows = [row_of[p] for p in pano_ids.tolist()]
    return take(places, brute_force_1nn(np.asarray(embedded.queries)[rows], embedded.references))


def checked_positions(lat: ArrayLike, lon: ArrayLike, what: str) -> tuple[Floats, Floats]:
    """The (N,) degrees as float64; ValueError where `what` they are is empty or not finite."""
    lats, lons = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    if lats.ndim != 1 or lats.shape != lons.shape or len(lats) == 0 or not np.isfinite(lats + lons).all():
        raise ValueError(
            f"The {what} need one finite lat and lon each, and at least one row; got {lats.shape}, {lons.shape}, "
            f"{int((~np.isfinite(lats)).sum() + (~np.isfinite(lons)).sum())} values missing."
        )
    return lats, lons


def take(places: tuple[Floats, Floats], rows: NDArray[Any]) -> tuple[Floats, Floats]:
    """The given rows of both columns."""
    return places[0][rows], places[1][rows]


def _constant_quality(candidates: Floats, places: Floats, name: str) -> Floats:
    """(K,) the higher the better: minus the median distance to (N, 3) places, or the mean GeoScore."""
    quality = []
    for start in range(0, len(candidates), 256):
        chord = np.sqrt(np.maximum(2 - 2 * candidates[start : start + 256] @ places.T, 0.0))
        if name == "constant":
            quality.append(-np.median(chord, axis=1))  # the arc grows with the chord
        else:
            quality.append(geoscore(chord_to_km(chord)).mean(axis=1))
    return np.concatenate(quality)
