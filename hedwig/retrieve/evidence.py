"""What was found for a batch of queries, before any calibration: arrays, one row a query.

The answer is in it, and all that radius, regions and confidence are computed from, so that calibration and use read
the same numbers. Nothing here decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Evidence", "entropy_bits", "largest", "log_softmax"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LEAST_MASS = 1e-4  # and 1 minus it: beyond, a logit is a matter of rounding


@dataclass(frozen=True, eq=False)
class Evidence:
    """B queries, L listed cells, of which the first K may be searched, M neighbours.

    Attributes:
        log_posterior: (B, C) log p(cell).
        order: (B, L) cells, most probable first.
        log_probs: (B, L) of these cells.
        cells: (B, K) cells that were searched, most probable first; -1 for those beyond the gate.
        mass: (B, K) posterior of the searched cells, 0 for the others.
        distance_km: (B, K) from the answer to the centroids of the searched cells; means nothing for the others.
        rows: (B, M) references in the index, best first; -1 for none.
        scores: (B, M); -inf for none.
        cosine: (B,) of the best neighbour; 0 without one.
        cell: (B,) the cell that the answer comes from.
        lat: (B,) degrees, the answer.
        lon: (B,) degrees.
        spread_km: (B,) posterior mean of `distance_km`, and the radius of the answer's cell on top.
    """

    log_posterior: Floats
    order: Ints
    log_probs: Floats
    cells: Ints
    mass: Floats
    distance_km: Floats
    rows: Ints
    scores: Floats
    cosine: Floats
    cell: Ints
    lat: Floats
    lon: Floats
    spread_km: Floats

    def features(self, within_km: float) -> Floats:
        """(B, 3) what confidence is computed from.

        The logit of the posterior mass within `within_km` of the answer (its own cell always counts),
        log(spread_km / within_km), and the cosine of the best neighbour.
        """
        counts = (self.distance_km <= within_km) | (self.cells == self.cell[:, None])
        near = np.clip(np.where(counts, self.mass, 0.0).sum(axis=1), LEAST_MASS, 1 - LEAST_MASS)
        return np.stack([np.log(near / (1 - near)), np.log(self.spread_km / within_km), self.cosine], axis=1)


def entropy_bits(log_posterior: Floats) -> Floats:
    """(B,) entropy in bits of (B, C) log p: 0 is certainty, log2(C) is no idea."""
    return np.asarray(-(np.exp(log_posterior) * log_posterior).sum(axis=1) / np.log(2.0) + 0.0)


def log_softmax(logits: Floats) -> Floats:
    """(B, C) log p of (B, C) finite logits."""
    z = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))


def largest(values: Floats, num: int) -> Ints:
    """(B, num) columns of the largest of (B, C) values, descending."""
    line = np.arange(len(values))[:, None]
    top = np.sort(np.argpartition(-values, num - 1, axis=1)[:, :num], axis=1)
    rank = np.argsort(-values[line, top], axis=1, kind="stable")
    return top[line, rank].astype(np.int64)
