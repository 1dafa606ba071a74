"""The expected error of a guess that looks at nothing, by Monte Carlo: on a rectangle, and among real places.

The paper (section 4) sets its Tables 3 and 4 against two uniform points in a rectangle as large as the contiguous
United States, 4,500 by 2,500 km: 1,863 km. Streets are not uniform, so the same is asked of a query and a training
place drawn at random. The standard error is that of the simulation; it says nothing about another sample of queries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedwig.evaluate.floors import checked_positions, take
from hedwig.geo import haversine_km
from hedwig.metrics import accuracy_at_km

__all__ = ["expected_error", "expected_error_on_rectangle"]

Floats = NDArray[np.float64]

NUM_PAIRS = 1_000_000


def expected_error(
    lat: ArrayLike,
    lon: ArrayLike,
    query_lat: ArrayLike | None = None,
    query_lon: ArrayLike | None = None,
    *,
    num_pairs: int = NUM_PAIRS,
    seed: int = 0,
) -> dict[str, Any]:
    """Distance from a random query to a random training place.

    Args:
        lat: (N,) degrees of the training places.
        lon: (N,) degrees.
        query_lat: (Q,) degrees of the queries; without them two different training places are drawn.
        query_lon: (Q,) degrees.
        num_pairs: how many to draw, with replacement.
        seed: of the draw.

    Returns:
        ``mean_km, standard_error_km`` (of that mean), ``median_km, std_km, accuracy_at_km`` {"25": share, ...},
        ``num_pairs``.

    Raises:
        ValueError: no places, one place alone without queries, positions that are missing, or fewer than 2 pairs.
    """
    places = checked_positions(lat, lon, "training places")
    rng = np.random.default_rng(seed)
    _check_pairs(num_pairs)
    guess = rng.integers(len(places[0]), size=num_pairs)
    if query_lat is None or query_lon is None:
        if len(places[0]) < 2:
            raise ValueError("The expected error among places needs at least 2 of them; got 1.")
        asked = take(places, (guess + rng.integers(1, len(places[0]), size=num_pairs)) % len(places[0]))
    else:
        queries = checked_positions(query_lat, query_lon, "queries")
        asked = take(queries, rng.integers(len(queries[0]), size=num_pairs))
    return _summary(haversine_km(*asked, *take(places, guess)))


def expected_error_on_rectangle(
    width_km: float, height_km: float, *, num_pairs: int = NUM_PAIRS, seed: int = 0
) -> dict[str, Any]:
    """Distance between two uniform points in a flat rectangle; see `expected_error` for what is returned.

    Args:
        width_km: one side.
        height_km: the other.
        num_pairs: how many to draw.
        seed: of the draw.

    Raises:
        ValueError: a side that is not a positive number, or fewer than 2 pairs.
    """
    if not (0 < width_km < np.inf and 0 < height_km < np.inf):
        raise ValueError(f"A rectangle needs two positive sides in km; got {width_km} by {height_km}.")
    _check_pairs(num_pairs)
    one, other = np.random.default_rng(seed).random((2, num_pairs, 2)) * (width_km, height_km)
    return _summary(np.hypot(*(one - other).T))


def _check_pairs(num_pairs: int) -> None:
    if num_pairs < 2:
        raise ValueError(f"A standard error needs at least 2 pairs; got num_pairs={num_pairs}.")


def _summary(km: Floats) -> dict[str, Any]:
    std = float(km.std(ddof=1))
    return {
        "mean_km": float(km.mean()),
        "standard_error_km": std / float(np.sqrt(len(km))),
        "median_km": float(np.median(km)),
        "std_km": std,
        "accuracy_at_km": accuracy_at_km(km),
        "num_pairs": len(km),
    }
