"""From the references found to one place: the mean of the best mode, or the nearest member of the nearest prototype.

An average of all candidates lands in the sea between two guesses, so only those near the best one are averaged, and
the mean is that of unit vectors, which knows no antimeridian. Rows are worked on side by side and none sees another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hedwig.geo import haversine_km, lat_lon, unit_vectors
from hedwig.index import References
from hedwig.retrieve.prototypes import Prototypes

__all__ = ["MEAN_SCORE_SCALE", "PROTOTYPE_WITHIN_KM", "mean_places", "prototype_rows"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MEAN_SCORE_SCALE = 0.1  # a neighbour whose score is 0.1 lower than the best one's counts e times less
PROTOTYPE_WITHIN_KM = 1000.0  # PIGEON's guard


def mean_places(lat: Floats, lon: Floats, scores: Floats, within_km: float) -> tuple[Floats, Floats]:
    """Weighted spherical means (B,) of candidates (B, M) near the first of each row, which is its best.

    Args:
        lat: (B, M) degrees.
        lon: (B, M) degrees.
        scores: (B, M), -inf for no candidate; weights are exp((score - best) / 0.1).
        within_km: candidates farther from the best are left out.
    """
    near = haversine_km(lat[:, :1], lon[:, :1], lat, lon) <= within_km
    weights = np.where(near, np.exp((scores - scores[:, :1]) / MEAN_SCORE_SCALE), 0.0)
    return lat_lon((weights[:, :, None] * unit_vectors(lat, lon)).sum(axis=1))


def prototype_rows(
    prototypes: Prototypes,
    index: References,
    queries: NDArray[np.float32],
    cells: Ints,
    log_probs: Floats,
    centres: tuple[Floats, Floats],
    temperature: float,
) -> Ints:
    """The reference (B,) that answers each query, as its row in the index; -1 where no cell has a prototype.

    Args:
        prototypes: of this index.
        index: the references.
        queries: (B, D), or (B, V, D) several vectors of each query, whose mean is compared with the prototypes.
        cells: (B, K) searched, most probable first; -1 is no cell.
        log_probs: (B, K) of these cells.
        centres: latitudes and longitudes (C,) of the cells' centroids.
        temperature: of the softmax over distances. Its normaliser is the same for all cells of a query, so
            log p(cell) - distance / temperature decides.
    """
    answers = np.full(len(cells), -1, dtype=np.int64)
    means = queries.mean(axis=1) if queries.ndim == 3 else queries
    for b in range(len(cells)):
        best, distance_km = prototypes.nearest(means[b], cells[b])
        if (best < 0).all():
            continue
        winner = int(np.argmax(np.where(best >= 0, log_probs[b] - distance_km / temperature, -np.inf)))
        row = _nearest_member(prototypes, index, queries[b], int(cells[b, winner]), int(best[winner]))
        first = int(cells[b, 0])
        away = haversine_km(centres[0][first], centres[1][first], index.lat[row], index.lon[row])
        if winner and best[0] >= 0 and away > PROTOTYPE_WITHIN_KM:
            row = _nearest_member(prototypes, index, queries[b], first, int(best[0]))
        answers[b] = row
    return answers


def _nearest_member(
    prototypes: Prototypes, index: References, query: NDArray[np.float32], cell: int, prototype: int
) -> int:
    """Of unit vectors the one of largest cosine is the nearest."""
    start, stop = np.searchsorted(index.cell_ids, [cell, cell + 1])
    ranked = index.search_rows(query[None], [[cell]], int(stop - start))[0][0]
    return int(ranked[prototypes.clusters[ranked] == prototype][0])
