"""Is one method better than another on the same queries: differences, not overlaps of two intervals.

Most of what makes two methods' numbers uncertain is which queries were drawn, and they share that. So queries are
resampled, each with the errors of both methods. The share ``p`` is read off the same resamplings: twice the smaller
tail beyond "no difference", with one added above and below so that it is never 0 (Davison and Hinkley, "Bootstrap
Methods and their Application", 1997, section 4.2). It is no test of its own, and not corrected for many comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedwig.metrics.bootstrap import resample, resampled_median
from hedwig.metrics.errors import checked_errors, geoscore

__all__ = ["paired_difference_ci"]

Floats = NDArray[np.float64]


def paired_difference_ci(
    error_a: ArrayLike,
    error_b: ArrayLike,
    *,
    thresholds_km: Sequence[float] = (),
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Differences a - b of the median error, the GeoScore and, if asked for, of accuracies.

    Args:
        error_a: (N,) errors in km of one method.
        error_b: (N,) errors in km of the other, row for row the same queries.
        thresholds_km: distances whose accuracies are compared too, ``error < threshold``.
        num_bootstrap: resamplings.
        seed: of the resampling.

    Returns:
        ``{"median_km": {"difference", "ci": [low, high], "p"}, "geoscore": {...}}``, and with thresholds
        ``"accuracy_at_km": {"25": {...}, ...}``. A median interval wholly below 0, or a geoscore interval wholly
        above 0, says that a is better.

    Raises:
        ValueError: numbers of errors that differ, none at all, or errors that are not distances.
    """
    a, b = checked_errors(error_a), checked_errors(error_b)
    if a.shape != b.shape:
        raise ValueError(f"A paired comparison needs the same queries: got {len(a)} and {len(b)} errors.")
    levels = np.asarray(thresholds_km, dtype=np.float64)
    below = (a[:, None] < levels).astype(np.float64) - (b[:, None] < levels)
    means = np.column_stack([geoscore(a) - geoscore(b), below])
    order_a, order_b = np.argsort(a, kind="stable"), np.argsort(b, kind="stable")

    def statistics(counts: Floats) -> Floats:
        medians = [
            resampled_median(errors[order], np.cumsum(counts[:, order], axis=1))
            for errors, order in ((a, order_a), (b, order_b))
        ]
        return np.column_stack([medians[0] - medians[1], counts @ means / len(a)])

    resampled = resample(statistics, len(a), num_bootstrap, seed)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    values = [float(np.median(a) - np.median(b)), *means.mean(axis=0).tolist()]
    found = [
        {"difference": value, "ci": [float(low[i]), float(high[i])], "p": _share_beyond_zero(resampled[:, i])}
        for i, value in enumerate(values)
    ]
    compared: dict[str, dict[str, Any]] = {"median_km": found[0], "geoscore": found[1]}
    if len(levels):
        compared["accuracy_at_km"] = {f"{t:g}": row for t, row in zip(levels, found[2:], strict=True)}
    return compared


def _share_beyond_zero(differences: Floats) -> float:
    # A resampled share may miss 0 by rounding alone where both methods hit the same queries.
    tolerance = 1e-12
    fewer = min(int((differences <= tolerance).sum()), int((differences >= -tolerance).sum()))
    return min(1.0, 2 * (fewer + 1) / (len(differences) + 1))
