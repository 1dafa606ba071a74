"""Shares of queries: right country, right region, and how each group of queries fared, with Wilson intervals.

Labels come in, not positions: who looks up the country of an answer decides where borders run. A region is right only
within the right country, because names such as "Central" or "San José" occur in many; a query whose own label is not
known is counted and left out, an answer without a label (the open sea) is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedwig.metrics.errors import checked_errors, geoscore

__all__ = ["admin_accuracy", "by_group", "wilson_interval"]

_Z95 = 1.959963984540054


def wilson_interval(num_hits: int, num_queries: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927): never leaves 0..1 and is not empty at 0 or all hits."""
    if not 0 <= num_hits <= num_queries or num_queries == 0:
        raise ValueError(f"{num_hits} hits of {num_queries} queries is not a share; pass 0 <= hits <= queries > 0.")
    low, high = _wilson(np.array([num_hits]), np.array([num_queries]))
    return float(low[0]), float(high[0])


def admin_accuracy(truth: Mapping[str, ArrayLike], answers: Mapping[str, ArrayLike]) -> dict[str, dict[str, Any]]:
    """How many answers lie in the right country, and there in the right region, and there in the right district.

    Args:
        truth: level -> (N,) names of the queries' own places, coarsest level first, such as ``country, admin1,
            admin2``; an empty string or None where it is not known.
        answers: the same levels -> (N,) names of the places answered.

    Returns:
        level -> ``share``, ``ci`` [low, high], ``num_queries`` (those whose label is known at this level and above) and
        ``num_unknown`` (the others). ``share`` and ``ci`` are None where nothing is known.

    Raises:
        ValueError: levels or lengths that differ.
    """
    if list(truth) != list(answers):
        raise ValueError(f"The levels of truth and answers differ: {list(truth)} and {list(answers)}.")
    found: dict[str, dict[str, Any]] = {}
    right = known = None
    for level in truth:
        own, given = _labels(truth[level]), _labels(answers[level])
        if own.shape != given.shape or own.ndim != 1 or (right is not None and right.shape != own.shape):
            raise ValueError(f"The labels of level {level!r} are {own.shape} and {given.shape}; pass one per query.")
        known = (own != "") if known is None else known & (own != "")
        right = (own == given) if right is None else right & (own == given)
        num, hits = int(known.sum()), int((right & known).sum())
        found[level] = {
            "share": hits / num if num else None,
            "ci": list(wilson_interval(hits, num)) if num else None,
            "num_queries": num,
            "num_unknown": len(own) - num,
        }
    return found


def by_group(
    error_km: ArrayLike, group: ArrayLike, thresholds_km: Sequence[float] = (25, 200, 750)
) -> list[dict[str, Any]]:
    """How each group of queries fared, the largest first; queries with an empty label or None belong to none.

    Args:
        error_km: (N,) errors in km.
        group: (N,) labels, such as the country of each query.
        thresholds_km: distances for accuracies, ``error < threshold``.

    Returns:
        Rows of ``group``, ``num_queries``, ``median_km``, ``geoscore``, and per threshold ``accuracy_at_25_km`` and
        ``accuracy_at_25_km_ci`` (Wilson): with few queries the interval says so.
    """
    errors, labels = checked_errors(error_km), _labels(group)
    if labels.shape != errors.shape:
        raise ValueError(f"Every error needs one label: got {errors.shape} and {labels.shape}.")
    errors, labels = errors[labels != ""], labels[labels != ""]
    if len(errors) == 0:
        return []
    names, member = np.unique(labels, return_inverse=True)
    counts = np.bincount(member)
    ordered = errors[np.lexsort((errors, member))]
    start = np.cumsum(counts) - counts
    medians = (ordered[start + (counts - 1) // 2] + ordered[start + counts // 2]) / 2
    scores = np.bincount(member, weights=geoscore(errors)) / counts
    hits = {f"{t:g}": np.bincount(member, weights=errors < t).astype(np.int64) for t in thresholds_km}
    bounds = {t: _wilson(h, counts) for t, h in hits.items()}
    rows = []
    for i in np.lexsort((names, -counts)):
        row = {
            "group": str(names[i]),
            "num_queries": int(counts[i]),
            "median_km": float(medians[i]),
            "geoscore": float(scores[i]),
        }
        for t, h in hits.items():
            row[f"accuracy_at_{t}_km"] = float(h[i] / counts[i])
            row[f"accuracy_at_{t}_km_ci"] = [float(bounds[t][0][i]), float(bounds[t][1][i])]
        rows.append(row)
    return rows


def _labels(values: ArrayLike) -> NDArray[np.str_]:
    """(N,) texts; None and NaN become the empty string."""
    array = np.asarray(values, dtype=object)
    return np.array(["" if v is None or v != v else str(v) for v in array.ravel()], dtype=np.str_).reshape(array.shape)


def _wilson(hits: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    share, n = hits / counts, counts.astype(np.float64)
    centre = (share + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 / (1 + _Z95**2 / n) * np.sqrt(share * (1 - share) / n + _Z95**2 / (4 * n * n))
    return np.maximum(0.0, centre - half), np.minimum(1.0, centre + half)
