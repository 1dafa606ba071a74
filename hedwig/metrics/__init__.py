"""How far off were the answers, how sure were they, and is one method better than another: numbers from arrays.

Errors come in as kilometres (from `hedwig.geo.haversine_km`) and places as labels, so nothing here knows about
positions, files or models. `errors` has the numbers of one method, `paired` compares two on the same queries,
`shares` counts hits with their intervals, overall and by group, and `calibration` asks whether confidences and radii
mean what they say.
"""

from __future__ import annotations

from hedwig.metrics.calibration import calibration_error, cell_nll, radius_coverage
from hedwig.metrics.errors import (
    GEOSCORE_SCALE_KM,
    THRESHOLDS_KM,
    accuracy_at_km,
    cell_recall_at_k,
    geoscore,
    summarise,
)
from hedwig.metrics.paired import paired_difference_ci
from hedwig.metrics.shares import admin_accuracy, by_group, wilson_interval

__all__ = [
    "GEOSCORE_SCALE_KM",
    "THRESHOLDS_KM",
    "accuracy_at_km",
    "admin_accuracy",
    "by_group",
    "calibration_error",
    "cell_nll",
    "cell_recall_at_k",
    "geoscore",
    "paired_difference_ci",
    "radius_coverage",
    "summarise",
    "wilson_interval",
]
