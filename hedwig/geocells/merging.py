"""Fuse cells that are too small with a near one: the step that trees of boxes and hexagons need and do not have.

Partners are looked for among the children of the same parent first, then of its parent, and so on to the top, at last
among all cells. A cell is never fused with one further than `REACH_KM`, nor into one above the maximum: an island of
three panoramas in the Pacific stays a small cell, because its mean with a continent would be in neither.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hedwig.geo import km_to_chord

__all__ = ["REACH_KM", "merge_small"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

REACH_KM = 1000.0


def merge_small(
    labels: Ints, vectors: Floats, weights: Ints, ancestors: Sequence[Ints], min_size: int, max_size: int
) -> Ints:
    """Labels (N,) after cells below the minimum were fused; the smallest first, each with the nearest it may have.

    Args:
        labels: cell of each place (N,), 0 to C-1, none empty.
        vectors: unit vectors of the places (N, 3).
        weights: panoramas at each place (N,).
        ancestors: for each level from the finest to the coarsest the parent (C,) of each cell, any integers.
        min_size: a cell below this is fused.
        max_size: no fusion makes a cell above this.
    """
    num_cells = int(labels.max(initial=-1)) + 1
    size = np.bincount(labels, weights=weights, minlength=num_cells).astype(np.int64)
    parts = [np.bincount(labels, weights=column, minlength=num_cells) for column in vectors.T * weights]
    total: Floats = np.stack(parts, axis=1)
    into = np.arange(num_cells)
    for parents in [*ancestors, np.zeros(num_cells, dtype=np.int64)]:
        alive = np.flatnonzero(into == np.arange(num_cells))
        alive = alive[np.argsort(parents[alive], kind="stable")]
        groups = np.split(alive, np.flatnonzero(np.diff(parents[alive])) + 1)
        for cells in groups:
            if len(cells) > 1 and (size[cells] < min_size).any():
                _merge_group(cells, size, total, into, min_size, max_size)
    while (into[into] != into).any():
        into = into[into]
    return np.unique(into[labels], return_inverse=True)[1].astype(np.int64)


def _merge_group(cells: Ints, size: Ints, total: Floats, into: Ints, min_size: int, max_size: int) -> None:
    """Fuse among `cells`, in place: `size`, `total` and, of a cell that is gone, the one it went `into`."""
    middle = total[cells] / np.maximum(np.linalg.norm(total[cells], axis=1, keepdims=True), 1e-300)
    own = size[cells].copy()
    reach_sq = float(km_to_chord(REACH_KM)) ** 2
    small = [(int(n), row) for row, n in enumerate(own) if n < min_size]
    heapq.heapify(small)
    while small:
        now, row = heapq.heappop(small)
        if own[row] != now:
            continue
        chord_sq = ((middle - middle[row]) ** 2).sum(axis=1)
        chord_sq[(own < 0) | (own + now > max_size)] = np.inf
        chord_sq[row] = np.inf
        partner = int(np.argmin(chord_sq))
        if chord_sq[partner] > reach_sq:
            continue
        keep, gone = min(row, partner), max(row, partner)
        into[cells[gone]] = cells[keep]
        total[cells[keep]] += total[cells[gone]]
        own[keep] += own[gone]
        own[gone] = -1
        size[cells[keep]] = own[keep]
        middle[keep] = total[cells[keep]] / max(float(np.linalg.norm(total[cells[keep]])), 1e-300)
        if own[keep] < min_size:
            heapq.heappush(small, (int(own[keep]), keep))
