"""Do confidences and radii mean what they say, and how much probability did the true cell get.

The expected calibration error is taken over bins of equally many answers (Nguyen and O'Connor 2015; Naeini et al.
2015 use equal widths, where a handful of answers can be a bin); answers of equal confidence stay in one bin, so that
the order of rows does not matter. It is biased upwards for few answers: a calibrated method has about
sqrt(2 / pi) · mean(sqrt(p(1 - p) / n_bin)), not 0, and that number is given beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedwig.metrics.errors import checked_errors
from hedwig.metrics.shares import wilson_interval

__all__ = ["calibration_error", "cell_nll", "radius_coverage"]

_LEAST_PROB = 1e-12  # a cell that was given nothing costs 27.6 nats, not infinitely many


def calibration_error(confidence: ArrayLike, correct: ArrayLike, *, num_bins: int = 10) -> dict[str, Any]:
    """Expected calibration error: mean distance between how sure answers are and how often they are right.

    Args:
        confidence: (N,) stated probabilities of being right, in 0..1.
        correct: (N,) bool.
        num_bins: bins of about N / num_bins answers; fewer where confidences are equal.

    Returns:
        ``ece``, ``ece_if_calibrated`` (expected of a calibrated method with these bins), ``num_queries``, and ``bins``
        {"num_queries", "confidence", "correct", "ci_low", "ci_high"}, each a list, the least sure first.

    Raises:
        ValueError: no answers, confidences outside 0..1, or shapes that differ.
    """
    stated, hit = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=bool)
    if stated.ndim != 1 or stated.shape != hit.shape or len(stated) == 0 or num_bins < 1:
        raise ValueError(f"Need (N,) confidences and outcomes, N > 0, num_bins > 0; got {stated.shape}, {hit.shape}.")
    if not ((stated >= 0) & (stated <= 1 + 1e-6)).all():
        raise ValueError(f"Confidences lie between {stated.min()} and {stated.max()}; they must lie in 0..1.")
    edges = np.sort(stated)[np.arange(1, num_bins) * len(stated) // num_bins]
    member = np.unique(np.searchsorted(edges, stated, side="right"), return_inverse=True)[1]
    counts = np.bincount(member)
    mean = np.bincount(member, weights=stated) / counts
    hits = np.bincount(member, weights=hit)
    share = hits / counts
    expected = np.sqrt(2 / np.pi) * np.sqrt(np.clip(mean * (1 - mean), 0, None) / counts)
    bounds = [wilson_interval(int(hit), int(count)) for hit, count in zip(hits, counts, strict=True)]
    return {
        "ece": float((counts * np.abs(mean - share)).sum() / len(stated)),
        "ece_if_calibrated": float((counts * expected).sum() / len(stated)),
        "num_queries": len(stated),
        "bins": {
            "num_queries": counts.tolist(),
            "confidence": mean.tolist(),
            "correct": share.tolist(),
            "ci_low": [low for low, _ in bounds],
            "ci_high": [high for _, high in bounds],
        },
    }


def radius_coverage(error_km: ArrayLike, radius_km: ArrayLike, nominal: float) -> dict[str, Any]:
    """How many truths lie within the radius that was promised to hold `nominal` of them.

    Args:
        error_km: (N,) errors in km.
        radius_km: (N,) stated radii in km.
        nominal: promised share, in 0..1.

    Returns:
        ``share``, ``ci`` [low, high] (Wilson), ``nominal``, ``median_radius_km``. An interval that leaves out
        `nominal` says that the radii are too small or too wide.
    """
    errors, radii = checked_errors(error_km), np.asarray(radius_km, dtype=np.float64)
    if radii.shape != errors.shape or not np.isfinite(radii).all():
        raise ValueError(f"Every error needs one finite radius: got {errors.shape} and {radii.shape}.")
    covered = int((errors <= radii).sum())
    return {
        "share": covered / len(errors),
        "ci": list(wilson_interval(covered, len(errors))),
        "nominal": nominal,
        "median_radius_km": float(np.median(radii)),
    }


def cell_nll(cell_ids: ArrayLike, cell_probs: ArrayLike, true_cell: ArrayLike, num_cells: int) -> dict[str, Any]:
    """Negative log likelihood of the true geocell, in nats; what is not listed is shared by the cells not listed.

    Args:
        cell_ids: (N, K) int, -1 where fewer than K are listed.
        cell_probs: (N, K) their probabilities; what lacks to 1 belongs to the other cells, in equal parts.
        true_cell: (N,) int; -1 for a position outside every cell, which is left out and counted.
        num_cells: C.

    Returns:
        ``mean_nats``, ``median_nats``, ``uniform_nats`` = log C (of a method that knows nothing), ``num_queries``,
        ``num_outside_cells``, ``share_listed`` (true cell among the listed). None instead of means without queries.

    Raises:
        ValueError: shapes that do not fit, or probabilities outside 0..1.
    """
    cells, probs = np.asarray(cell_ids), np.asarray(cell_probs, dtype=np.float64)
    true: NDArray[np.int64] = np.asarray(true_cell, dtype=np.int64)
    if cells.ndim != 2 or probs.shape != cells.shape or true.shape != cells.shape[:1]:
        raise ValueError(f"Need (N, K) cells and probabilities and (N,) truths: {cells.shape}, {probs.shape}.")
    probs = np.where(cells >= 0, probs, 0.0)
    if not ((probs >= 0) & (probs <= 1 + 1e-5)).all():
        raise ValueError(f"Cell probabilities lie between {probs.min()} and {probs.max()}; they must lie in 0..1.")
    inside = true >= 0
    hit = (cells == true[:, None]) & inside[:, None]
    num_other = np.maximum(num_cells - (cells >= 0).sum(axis=1), 1)
    rest = np.clip(1.0 - probs.sum(axis=1), 0.0, 1.0) / num_other
    given = np.where(hit.any(axis=1), (probs * hit).sum(axis=1), rest)[inside]
    nats = -np.log(np.clip(given, _LEAST_PROB, 1.0))
    num = int(inside.sum())
    return {
        "mean_nats": float(nats.mean()) if num else None,
        "median_nats": float(np.median(nats)) if num else None,
        "uniform_nats": float(np.log(num_cells)),
        "num_queries": num,
        "num_outside_cells": len(true) - num,
        "share_listed": float(hit.any(axis=1)[inside].mean()) if num else None,
    }
