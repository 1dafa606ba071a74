"""Which score finds the best neighbour: T and the weight of score = cosine / T + weight x log p(cell), by grid.

Whoever wins under this score is decided by T x weight alone, so that product is what the grid varies; T itself only
sharpens or flattens the mean of neighbours and is varied for it alone. The whole table is kept, because one number
without its neighbours cannot be judged. Tune on other rows than those that calibrate: a radius fitted where the score
was chosen is too narrow.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedwig.geo import haversine_km
from hedwig.metrics import geoscore
from hedwig.retrieve.retriever import Retriever

__all__ = ["PRODUCTS", "TEMPERATURES", "tune_score"]

PRODUCTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # T x weight, in cosines; 0 is the paper
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)

Floats = NDArray[np.float64]


def tune_score(
    retriever: Retriever,
    queries: NDArray[np.float32],
    logits: NDArray[np.float32],
    lat: ArrayLike,
    lon: ArrayLike,
    *,
    tune_for: Literal["geoscore", "median"] = "geoscore",
    score_temperature: float | None = None,
    log_prob_weight: float | None = None,
) -> tuple[Retriever, list[dict[str, Any]]]:
    """The retriever with the best score on rows whose places are known, and the table it was chosen from.

    Args:
        retriever: the others of its settings count as they are.
        queries: (B, D) or (B, V, D).
        logits: (B, C).
        lat: (B,) degrees, the truth.
        lon: (B,) degrees.
        tune_for: the largest mean GeoScore or the smallest median error; of equals the first, that is the one nearest
            to the paper's.
        score_temperature: a value that is settled already.
        log_prob_weight: a value that is settled already.

    Returns:
        The retriever, and rows of ``score_temperature, log_prob_weight, geoscore, median_km``; none where the answer
        does not depend on the score.

    Raises:
        ValueError: another aim than these two, or no rows.
    """
    if tune_for not in ("geoscore", "median"):
        raise ValueError(f"tune_for={tune_for!r} is unknown; use geoscore or median.")
    if len(logits) == 0:
        raise ValueError("There are no rows to tune on; turn index.tune off.")
    if retriever.refine in ("cell", "prototype"):
        return retriever, []
    temperatures = (1.0,) if retriever.refine != "mean" else TEMPERATURES
    if score_temperature is not None:
        temperatures = (score_temperature,)
    # T = 1 first: of equals the first wins.
    pairs = [
        (temperature, product / temperature if log_prob_weight is None else log_prob_weight)
        for product in (PRODUCTS if log_prob_weight is None else (0.0,))
        for temperature in sorted(temperatures, key=lambda t: abs(np.log(t)))
    ]
    table: list[dict[str, Any]] = []
    best, chosen = -np.inf, retriever
    for temperature, weight in pairs:
        candidate = retriever.rescored(temperature, weight)
        found = candidate.evidence(queries, logits)
        error_km = haversine_km(lat, lon, found.lat, found.lon)
        score, median_km = float(geoscore(error_km).mean()), float(np.median(error_km))
        table.append(
            {
                "score_temperature": float(temperature),
                "log_prob_weight": float(weight),
                "geoscore": score,
                "median_km": median_km,
            }
        )
        value = score if tune_for == "geoscore" else -median_km
        if value > best:
            best, chosen = value, candidate
    return chosen, table
