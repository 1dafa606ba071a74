"""Where the answers are right, and whether they know it: countries and regions, town and country, confidence.

Country, admin-1 and admin-2 are looked up for both places, that of the query and that of the answer, in the same
geography (`hedwig.geocells.Geography.lookup`). "Urban" here means: within 10 km of a place of at least 50,000
inhabitants. That is a rule of thumb on GeoNames' populations, which belong to municipalities, and not the Degree of
Urbanisation, which needs a population grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from hedwig.geo import km_to_chord, unit_vectors
from hedwig.geocells import AdminTable
from hedwig.metrics import admin_accuracy, by_group, calibration_error, cell_nll, radius_coverage

__all__ = ["Lookup", "calibration", "is_urban", "places_answered"]

Floats = NDArray[np.float64]
Lookup = Callable[[Floats, Floats], AdminTable]

LEVELS = ("country", "admin1", "admin2")
URBAN_POPULATION, URBAN_WITHIN_KM = 50_000, 10.0


def is_urban(
    lat: ArrayLike,
    lon: ArrayLike,
    places: pd.DataFrame,
    *,
    min_population: float = URBAN_POPULATION,
    within_km: float = URBAN_WITHIN_KM,
) -> NDArray[np.bool_]:
    """Whether each point lies within some km of a place of some size.

    Args:
        lat: (N,) degrees.
        lon: (N,) degrees.
        places: ``lat, lon, population``, such as `hedwig.geocells.Geography.places`.
        min_population: inhabitants of a place that counts.
        within_km: how near it must be.

    Returns:
        (N,) bool.
    """
    towns = places[places["population"] >= min_population]
    if towns.empty:
        return np.zeros(np.shape(lat), dtype=bool)
    reach = float(km_to_chord(within_km))
    chord, _ = cKDTree(unit_vectors(towns["lat"], towns["lon"])).query(
        unit_vectors(lat, lon), distance_upper_bound=np.nextafter(reach, np.inf)
    )
    return np.asarray(np.isfinite(chord))


def places_answered(
    joined: pd.DataFrame, lookup: Lookup, places: pd.DataFrame | None = None
) -> tuple[dict[str, Any], AdminTable, AdminTable]:
    """Accuracy by administrative level, and the errors in town and country.

    Args:
        joined: what `join_predictions` returns.
        lookup: the geography, see `Lookup`.
        places: inhabited places, see `is_urban`; None leaves the slices out.

    Returns:
        ``{"admin": ..., "urban": ...}``: `admin_accuracy`, and {"urban": row, "rural": row} of `by_group`, None without
        `places`; and the hierarchies of the (Q,) queries and of their answers.
    """
    lat, lon = joined["lat"].to_numpy(np.float64), joined["lon"].to_numpy(np.float64)
    own = lookup(lat, lon)
    given = lookup(joined["pred_lat"].to_numpy(np.float64), joined["pred_lon"].to_numpy(np.float64))
    labels = [{level: getattr(table, level) for level in LEVELS} for table in (own, given)]
    found: dict[str, Any] = {"admin": admin_accuracy(*labels), "urban": None}
    if places is not None:
        group = np.where(is_urban(lat, lon, places), "urban", "rural")
        found["urban"] = {row.pop("group"): row for row in by_group(joined["error_km"], group)}
    return found, own, given


def calibration(
    joined: pd.DataFrame,
    cells: NDArray[np.int64],
    true_cell: NDArray[np.int64],
    num_cells: int,
    *,
    confidence_km: float | None = None,
) -> dict[str, Any]:
    """Confidence against outcome, radii against errors, and the likelihood of the true cell; what is not there is None.

    Args:
        joined: what `join_predictions` returns; ``confidence`` and ``cell_probs`` are used where they are,
            ``radius_50_km`` and ``localisable`` too.
        cells: (Q, K) cells considered, -1 behind the shorter lists.
        true_cell: (Q,) the true ones, -1 outside of all.
        num_cells: C.
        confidence_km: a confidence says that the answer is within so many km; None for "in the true cell".

    Returns:
        ``confidence`` (`hedwig.metrics.calibration_error`), ``radius_50`` and ``radius_90`` (`radius_coverage`),
        ``cell_nll`` (`cell_nll`), and ``localisable``: the ``num_queries, share`` and ``median_km`` of the answers
        that were not flagged as unsure.
    """
    found: dict[str, Any] = dict.fromkeys(("confidence", "radius_50", "radius_90", "cell_nll", "localisable"))
    for name, column, nominal in (("radius_50", "radius_50_km", 0.5), ("radius_90", "radius_km", 0.9)):
        told = joined[joined[column].notna()] if column in joined else joined[:0]
        if len(told):
            found[name] = radius_coverage(told["error_km"], told[column].astype(np.float64), nominal)
    if "localisable" in joined:
        kept = joined[joined["localisable"].astype(bool)]
        median = float(kept["error_km"].median()) if len(kept) else None
        found["localisable"] = {"num_queries": len(kept), "share": len(kept) / len(joined), "median_km": median}
    probs = None
    if "cell_probs" in joined:
        probs = np.zeros(cells.shape)
        for i, row in enumerate(joined["cell_probs"]):
            probs[i, : len(row)] = row
        found["cell_nll"] = cell_nll(cells, probs, true_cell, num_cells)
    if "confidence" not in joined:
        return found
    confidence = joined["confidence"].to_numpy(np.float64)
    if confidence_km is not None:
        found["confidence"] = calibration_error(confidence, joined["error_km"].to_numpy() <= confidence_km)
    elif probs is not None:
        # A confidence that is a posterior belongs to the cell of the answer, which the row does not name.
        distance = np.where(cells >= 0, np.abs(probs - confidence[:, None]), np.inf)
        own = cells[np.arange(len(cells)), distance.argmin(axis=1)]
        found["confidence"] = calibration_error(confidence, (own == true_cell) & (true_cell >= 0))
    return found
