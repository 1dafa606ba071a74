"""How far off were the answers: every number of a report, from the great-circle errors alone.

Errors come in as kilometres (from `hedwig.geo.haversine_km`), so nothing here knows about positions. Choices:
accuracy counts ``error < threshold`` as PIGEON and OSV-5M do (GeoCLIP counts ``<=``; for real errors the two agree);
the GeoScore is not rounded (OSV-5M, PLONK; PIGEON rounds each answer); the trimmed mean drops 10 % at each end;
intervals are 95 % percentile bootstrap over queries, equal for equal seeds. This is no model comparison by itself:
`paired_difference_ci` is, because it resamples the queries of both methods together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "GEOSCORE_SCALE_KM",
    "THRESHOLDS_KM",
    "accuracy_at_km",
    "cell_recall_at_k",
    "geoscore",
    "paired_difference_ci",
    "summarise",
    "wilson_interval",
]

Floats = NDArray[np.float64]

GEOSCORE_SCALE_KM = 1492.7
THRESHOLDS_KM = (1, 10, 25, 100, 200, 500, 750, 1000, 2500, 5000, 10000)
TRIMMED_SHARE = 0.1
_CHUNK_ELEMENTS = 1 << 20  # one resampling matrix of 8 MiB stays in the cache while ten statistics read it
_Z95 = 1.959963984540054


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
    ordered = np.sort(_checked(error_km))
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


def wilson_interval(num_hits: int, num_queries: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927): never leaves 0..1 and is not empty at 0 or all hits."""
    if not 0 <= num_hits <= num_queries or num_queries == 0:
        raise ValueError(f"{num_hits} hits of {num_queries} queries is not a share; pass 0 <= hits <= queries > 0.")
    share, n = num_hits / num_queries, num_queries
    centre = (share + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 / (1 + _Z95**2 / n) * np.sqrt(share * (1 - share) / n + _Z95**2 / (4 * n * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


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
    errors = np.sort(_checked(error_km))  # sorted, so that thresholds become positions and row order is irrelevant
    scores = geoscore(errors)
    num_cut = int(TRIMMED_SHARE * len(errors))
    below = np.searchsorted(errors, THRESHOLDS_KM, side="left")
    q1, median, q3 = np.quantile(errors, [0.25, 0.5, 0.75])

    def statistics(counts: Floats) -> Floats:
        cumulative = np.cumsum(counts, axis=1)
        shares = np.concatenate([np.zeros((len(counts), 1)), cumulative], axis=1)[:, below] / len(errors)
        medians = _resampled_median(errors, cumulative)
        return np.column_stack([counts @ errors / len(errors), medians, counts @ scores / len(errors), shares])

    low, high = _percentile_interval(statistics, len(errors), num_bootstrap, seed)
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


def paired_difference_ci(
    error_a: ArrayLike, error_b: ArrayLike, *, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Is a better than b on the same queries? Differences a - b, resampling queries, not methods.

    Args:
        error_a: (N,) errors in km of one method.
        error_b: (N,) errors in km of the other, row for row the same queries.
        num_bootstrap: resamplings.
        seed: of the resampling.

    Returns:
        ``{"median_km": {"difference", "ci": [low, high]}, "geoscore": {...}}``. A median interval wholly below 0, or
        a geoscore interval wholly above 0, says that a is better.
    """
    a, b = _checked(error_a), _checked(error_b)
    if a.shape != b.shape:
        raise ValueError(f"A paired comparison needs the same queries: got {len(a)} and {len(b)} errors.")
    score_difference = geoscore(a) - geoscore(b)

    order_a, order_b = np.argsort(a, kind="stable"), np.argsort(b, kind="stable")

    def statistics(counts: Floats) -> Floats:
        medians = [
            _resampled_median(errors[order], np.cumsum(counts[:, order], axis=1))
            for errors, order in ((a, order_a), (b, order_b))
        ]
        return np.column_stack([medians[0] - medians[1], counts @ score_difference / len(a)])

    low, high = _percentile_interval(statistics, len(a), num_bootstrap, seed)
    values = (float(np.median(a) - np.median(b)), float(score_difference.mean()))
    return {
        name: {"difference": values[i], "ci": [float(low[i]), float(high[i])]}
        for i, name in enumerate(("median_km", "geoscore"))
    }


def _checked(error_km: ArrayLike) -> Floats:
    errors = np.asarray(error_km, dtype=np.float64)
    if errors.ndim != 1 or len(errors) == 0:
        raise ValueError(f"Errors must be a list of at least one distance in km; got shape {errors.shape}.")
    if num_bad := int((~np.isfinite(errors) | (errors < 0)).sum()):
        raise ValueError(
            f"{num_bad} of {len(errors)} errors are NaN, infinite or negative; "
            "take rows without a known position out first."
        )
    return errors


def _resampled_median(ordered: Floats, cumulative: Floats) -> Floats:
    """(R,) medians of R resamplings of (N,) ascending errors, given the (R, N) cumulative counts of each row."""
    num_rows = len(ordered)
    middle = [ordered[(cumulative <= position).sum(axis=1)] for position in ((num_rows - 1) // 2, num_rows // 2)]
    return np.asarray((middle[0] + middle[1]) / 2)


def _percentile_interval(
    statistics: Callable[[Floats], Floats], num_rows: int, num_bootstrap: int, seed: int
) -> tuple[Floats, Floats]:
    """2.5 and 97.5 percentiles, (S,) each, of `statistics`: (R, N) counts of how often a row was drawn -> (R, S)."""
    if num_bootstrap < 1:
        raise ValueError(f"num_bootstrap must be at least 1, got {num_bootstrap}.")
    resampled = np.concatenate([statistics(counts) for counts in _resamplings(num_rows, num_bootstrap, seed)])
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return low, high


def _resamplings(num_rows: int, num_bootstrap: int, seed: int) -> Iterator[Floats]:
    """Chunks (R, N) of counts; counts instead of drawn rows turn every mean into a GEMM and the median into a scan."""
    rng = np.random.default_rng(seed)
    per_chunk = max(1, _CHUNK_ELEMENTS // num_rows)
    for start in range(0, num_bootstrap, per_chunk):
        num_drawn = min(per_chunk, num_bootstrap - start)
        rows = rng.integers(0, num_rows, size=(num_drawn, num_rows))
        rows += np.arange(num_drawn)[:, None] * num_rows
        counts = np.bincount(rows.ravel(), minlength=num_drawn * num_rows)
        yield counts.reshape(num_drawn, num_rows).astype(np.float64)
