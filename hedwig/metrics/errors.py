"""How far off were the answers of one method: every number from its great-circle errors alone.

Errors come in as kilometres (from `hedwig.geo.haversine_km`), so nothing here knows about positions. Choices:
accuracy counts ``error < threshold`` as PIGEON and OSV-5M do (GeoCLIP counts ``<=``; for real errors the two agree);
the GeoScore is not rounded (OSV-5M, PLONK; PIGEON rounds each answer); the trimmed mean drops 10 % at each end;
intervals are 95 % percentile bootstrap over queries, equal for equal seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedwig.metrics.bootstrap import percentile_interval, resampled_median

__all__ = [
    "GEOSCORE_SCALE_KM",
    "THRESHOLDS_KM",
    "accuracy_at_km",
    "cell_recall_at_k",
    "checked_errors",
    "geoscore",
    "summarise",
]

Floats = NDArray[np.float64]

GEOSCORE_SCALE_KM = 1492.7
THRESHOLDS_KM = (1, 10, 25, 100, 200, 500, 750, 1000, 2500, 5000, 10000)
TRIMMED_SHARE = 0.1


def geoscore(error_km: ArrayLike) -> Floats:
    """GeoGuessr's score of each answer, ``5000 exp(-d / 1492.7 km)`` (OSV-5M, Astruc et al. 2024), unrounded.

    Args:
        error_km: (...) great-circle errors in km.

    Returns:
        (...) float64 scores in 0..5000.
    """
    return np.asarray(5000.0 * np.exp(-np.asarray(error_km, dtype=np.float64) / GEOSCORE_SCALE_KM))


def accuracy_at_km(error_km: ArrayLike, thresholds: Sequence[float] = THRESHOLDS_KM) -> dict[str, float]:
    """Share of (N,) errors strictly below each threshold in km; keys like ``"25"``, values in 0..1."""
    ordered = np.sort(checked_errors(error_km))
    return {f"{t:g}": float(np.searchsorted(ordered, t, side="left") / len(ordered)) for t in thresholds}


def cell_recall_at_k(cell_ids: ArrayLike, true_cell: ArrayLike, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Share of queries whose true geocell is among the first k considered ones.

    Args:
        cell_ids: (N, K) int, most probable first; -1 where fewer than K were considered.
        true_cell: (N,) int; -1 for a position outside every geocell, which counts as missed.
        ks: how many of the K to look at, each in 1..K.

    Raises:
        ValueError: shapes that do not fit, or a k above K.
    """
    cells, true = np.asarray(cell_ids), np.asarray(true_cell)
    if cells.ndim != 2 or true.shape != cells.shape[:1] or len(true) == 0:
        raise ValueError(f"cell_ids must be (N, K) and true_cell (N,) with N > 0; got {cells.shape} and {true.shape}.")
    if bad := [k for k in ks if not 1 <= k <= cells.shape[1]]:
        raise ValueError(f"Recall at {bad} needs that many cells per query, there are {cells.shape[1]}; lower k.")
    hits = (cells == true[:, None]) & (true[:, None] >= 0)
    return {str(k): float(hits[:, :k].any(axis=1).mean()) for k in ks}


def summarise(error_km: ArrayLike, *, num_bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """All numbers of one method's errors, with 95 % percentile bootstrap intervals.

    Args:
        error_km: (N,) great-circle errors in km, finite and not negative, N > 0.
        num_bootstrap: resamplings of the N queries with replacement.
        seed: of the resampling.

    Returns:
        ``num_queries``, ``mean_km``, ``trimmed_mean_km`` (the middle 80 %), ``std_km`` (population, ddof 0),
        ``q1_km``, ``median_km``, ``q3_km`` (linear interpolation), ``geoscore``, ``accuracy_at_km`` {"1": share, ...}
        and the intervals ``mean_km_ci``, ``median_km_ci``, ``geoscore_ci`` [low, high], ``accuracy_ci``
        {"1": [low, high], ...}. Plain Python numbers, ready for JSON.

    Raises:
        ValueError: no errors, or errors that are NaN, infinite or negative.
    """
    errors = np.sort(
        checked_errors(error_km)
    )  # sorted, so that thresholds become positions and row order is irrelevant
    scores = geoscore(errors)
    num_cut = int(TRIMMED_SHARE * len(errors))
    below = np.searchsorted(errors, THRESHOLDS_KM, side="left")
    q1, median, q3 = np.quantile(errors, [0.25, 0.5, 0.75])

    def statistics(counts: Floats) -> Floats:
        cumulative = np.cumsum(counts, axis=1)
        shares = np.concatenate([np.zeros((len(counts), 1)), cumulative], axis=1)[:, below] / len(errors)
        medians = resampled_median(errors, cumulative)
        return np.column_stack([counts @ errors / len(errors), medians, counts @ scores / len(errors), shares])

    low, high = percentile_interval(statistics, len(errors), num_bootstrap, seed)
    pairs = [[float(a), float(b)] for a, b in zip(low, high, strict=True)]
    return {
        "num_queries": len(errors),
        "mean_km": float(errors.mean()),
        "mean_km_ci": pairs[0],
        "trimmed_mean_km": float(errors[num_cut : len(errors) - num_cut].mean()),
        "std_km": float(errors.std()),
        "q1_km": float(q1),
        "median_km": float(median),
        "median_km_ci": pairs[1],
        "q3_km": float(q3),
        "geoscore": float(scores.mean()),
        "geoscore_ci": pairs[2],
        "accuracy_at_km": accuracy_at_km(errors),
        "accuracy_ci": {f"{t:g}": pair for t, pair in zip(THRESHOLDS_KM, pairs[3:], strict=True)},
    }


def checked_errors(error_km: ArrayLike) -> Floats:
    """(N,) float64 of one or more errors in km; ValueError where one is no distance."""
    errors = np.asarray(error_km, dtype=np.float64)
    if errors.ndim != 1 or len(errors) == 0:
        raise ValueError(f"Errors must be a list of at least one distance in km; got shape {errors.shape}.")
    if num_bad := int((~np.isfinite(errors) | (errors < 0)).sum()):
        raise ValueError(
            f"{num_bad} of {len(errors)} errors are NaN, infinite or negative; "
            "take rows without a known position out first."
        )
    return errors
