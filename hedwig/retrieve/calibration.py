"""What validation rows teach a retriever: how wide its radii and regions must be, and what its confidence is worth.

Radii and regions are split conformal: a quantile with the finite-sample correction of a measure of the row itself, so
that new rows drawn alike are covered as often as promised, whatever the model is worth (Papadopoulos et al. 2002; for
sets of classes Romano, Sesia & Candès 2020, without their coin toss). Confidence is a logistic regression on three
numbers of the evidence (Platt 1999, with his targets, which keep it finite when all answers are good). All of it is a
dozen numbers in ``calibration.json``; a file of before they existed is read as well. Rows that are not drawn alike,
such as another country's, are promised nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "CALIBRATION_FILE",
    "LEAST_CONFIDENCE_ROWS",
    "Calibration",
    "conformal_quantile",
    "fit_confidence",
    "fit_radius_scale",
    "mass_before",
    "region_cells",
]

Floats = NDArray[np.float64]
CALIBRATION_FILE = "calibration.json"  # beside the index it was measured with
LEAST_CONFIDENCE_ROWS = 20  # fewer say nothing about a probability
_RIDGE = 1.0  # on slopes of standardised features
_ROUNDING = 1e-12  # of a cumulated posterior


@dataclass(frozen=True)
class Calibration:
    """The numbers of a calibration; the defaults calibrate nothing.

    Attributes:
        radius_scale: what a spread is multiplied by, for 90 % of the truths to lie within the radius.
        radius_50_scale: the same for 50 %; None where it was not measured.
        region_90_level: a cell belongs to the 90 % region while the posterior mass of the cells before it is no more
            than this; None where it was not measured.
        region_50_level: the same for 50 %.
        confidence_km: X of "the answer is within X km".
        confidence_weights: intercept and the slopes of the three numbers of `Evidence.features`; None where
            confidence is the posterior probability of the answer's cell.
        score_temperature: T of score = cosine / T + log_prob_weight x log p(cell), where the settings leave it open.
        log_prob_weight: of the same formula.
    """

    radius_scale: float = 1.0
    radius_50_scale: float | None = None
    region_90_level: float | None = None
    region_50_level: float | None = None
    confidence_km: float = 200.0
    confidence_weights: tuple[float, ...] | None = None
    score_temperature: float = 1.0
    log_prob_weight: float = 0.0

    def __post_init__(self) -> None:
        weights = self.confidence_weights
        if weights is not None:
            object.__setattr__(self, "confidence_weights", tuple(float(w) for w in weights))
        positive = [self.radius_scale, self.confidence_km, self.score_temperature]
        positive += [] if self.radius_50_scale is None else [self.radius_50_scale]
        other = [self.log_prob_weight, *(weights or ())]
        other += [level for level in (self.region_50_level, self.region_90_level) if level is not None]
        if not (all(value > 0 for value in positive) and all(map(math.isfinite, [*positive, *other]))):
            raise ValueError(
                f"A calibration's scales must be positive and all its numbers finite, got {self}; "
                "run `hedwig index` again."
            )
        if weights is not None and len(weights) != 4:
            raise ValueError(f"confidence_weights has {len(weights)} numbers instead of 4; run `hedwig index` again.")

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read ``calibration.json``, also one with fewer or other keys.

        Raises:
            ValueError: it is not a calibration.
        """
        try:
            found = json.loads(path.read_text("utf-8"))
            return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a calibration ({error}); run `hedwig index` again.") from error

    def save(self, path: Path, more: Mapping[str, Any]) -> None:
        """Write it, with `more` about how it came to be, as JSON."""
        path.write_text(json.dumps({**asdict(self), **more}, indent=1) + "\n", encoding="utf-8")

    def confidence(self, features: Floats) -> Floats:
        """(B,) probability that the answer is within `confidence_km`, of (B, 3) features."""
        if self.confidence_weights is None:
            raise ValueError("This calibration has no confidence_weights; run `hedwig index` again.")
        intercept, *slopes = self.confidence_weights
        z = intercept + (features * np.array(slopes)).sum(axis=1)
        return np.asarray(1 / (1 + np.exp(-np.clip(z, -50, 50))))


def conformal_quantile(values: ArrayLike, coverage: float) -> float:
    """The ceil((N + 1) coverage)-th smallest of (N,) values, or the largest where N is too small for that.

    A new value drawn alike is no larger with at least probability `coverage`, and with at most 1/(N + 1) more where
    values do not repeat.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if ordered.ndim != 1 or len(ordered) == 0 or not np.isfinite(ordered).all() or not 0 < coverage < 1:
        raise ValueError(f"Need (N,) finite values, N > 0, and coverage in (0, 1); got {ordered.shape}, {coverage}.")
    return float(ordered[min(math.ceil((len(ordered) + 1) * coverage), len(ordered)) - 1])


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
    return max(conformal_quantile(error / spread, coverage), 1e-6)


def fit_confidence(features: ArrayLike, good: ArrayLike) -> tuple[float, ...]:
    """Intercept and slopes of a logistic regression of (N,) good answers on (N, F) features, by Newton's method.

    Slopes are shrunk (ridge 1 on standardised features), targets are Platt's: (N+ + 1) / (N+ + 2) and 1 / (N- + 2).
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(good, dtype=bool)
    if x.ndim != 2 or y.shape != x.shape[:1] or len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"Need (N, F) finite features and (N,) outcomes, N > 0; got {x.shape}, {y.shape}.")
    num_good = int(y.sum())
    target = np.where(y, (num_good + 1) / (num_good + 2), 1 / (len(y) - num_good + 2))
    centre, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-9)
    design = np.column_stack([np.ones(len(x)), (x - centre) / scale])
    ridge = np.diag([0.0] + [_RIDGE] * x.shape[1])

    def loss(weights: Floats) -> float:
        z = design @ weights
        return float((np.logaddexp(0, z) - target * z).sum() + weights @ ridge @ weights / 2)

    weights = np.zeros(design.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-design @ weights))
        slope = design.T @ (p - target) + ridge @ weights
        curvature = (design * (p * (1 - p))[:, None]).T @ design + ridge + 1e-9 * np.eye(len(weights))
        step, length = np.linalg.solve(curvature, slope), 1.0
        while loss(weights - length * step) > loss(weights) and length > 1e-6:
            length /= 2  # a full step may overshoot where the curve is flat
        weights = weights - length * step
        if np.abs(length * step).max() < 1e-10:
            break
    slopes = weights[1:] / scale
    return (float(weights[0] - slopes @ centre), *slopes.tolist())


def mass_before(log_probs: ArrayLike, cells: ArrayLike) -> Floats:
    """(B,) posterior mass of the cells that rank before the given ones (B,), of (B, C); equals rank by their number."""
    values = np.asarray(log_probs, dtype=np.float64)
    wanted = np.asarray(cells, dtype=np.int64)[:, None]
    own = np.take_along_axis(values, wanted, axis=1)
    before = (values > own) | ((values == own) & (np.arange(values.shape[1]) < wanted))
    return np.asarray(np.where(before, np.exp(values), 0.0).sum(axis=1))


def region_cells(log_probs: ArrayLike, level: float) -> list[tuple[int, ...]]:
    """For each of (B, C) log posteriors the cells of the region, most probable first: never none.

    The smallest set whose mass exceeds the level: a cell is in while the mass before it is at most `level`.
    """
    values = np.asarray(log_probs, dtype=np.float64)
    order = np.argsort(-values, axis=1, kind="stable")
    probs = np.exp(np.take_along_axis(values, order, axis=1))
    sizes = (np.cumsum(probs, axis=1) - probs <= level + _ROUNDING).sum(axis=1)
    return [tuple(ranked[: max(size, 1)].tolist()) for ranked, size in zip(order, sizes.tolist(), strict=True)]
