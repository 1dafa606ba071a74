"""Capacity-constrained spherical k-means: cells of bounded size without any administrative map.

k-means++ seeds, Lloyd iterations on unit vectors (Dhillon & Modha 2001: the centre is the normalised mean), and an
assignment that respects `min_size <= cell <= max_size`. Where the nearest centres already satisfy the bounds this is
plain spherical k-means. Otherwise each centre gets a price that is added to the cost 1 - cos (a power diagram, so that
cells stay compact), and the few violations left by the prices are repaired exactly by shifting points along cheapest
chains of neighbouring cells. A min-cost flow over all points would give the optimum and take minutes at 20,000 points;
this takes seconds and promises the bounds, not the optimum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

__all__ = ["spherical_kmeans"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LLOYD_STEPS = 50
BOUNDED_STEPS = 8
PRICE_STEPS = 60
NUM_CANDIDATES = 16  # nearest centres a point may go to before chains are tried through all of them


def spherical_kmeans(
    vectors: ArrayLike, num_cells: int, min_size: int, max_size: int, seed: int = 0
) -> NDArray[np.int32]:
    """Labels (N,) int32 in 0 .. num_cells-1 with min_size <= members <= max_size; equal input, equal output.

    Args:
        vectors: unit vectors (N, D).
        num_cells: C.
        min_size: fewest members of a cell.
        max_size: most members of a cell.
        seed: of the k-means++ seeding, the only random step.

    Raises:
        ValueError: num_cells * min_size > N, num_cells * max_size < N, or vectors that are not of unit length.
    """
    points = np.asarray(vectors, dtype=np.float64)
    if points.ndim != 2 or not np.allclose((points**2).sum(axis=1), 1.0, atol=1e-5):
        raise ValueError(f"spherical_kmeans needs unit vectors (N, D); it was given an array of shape {points.shape}.")
    n = len(points)
    if num_cells < 1 or not 0 <= min_size <= max_size:
        raise ValueError(
            f"Need num_cells >= 1 and 0 <= min_size <= max_size; got {num_cells=}, {min_size=}, {max_size=}."
        )
    if num_cells * min_size > n or num_cells * max_size < n:
        raise ValueError(
            f"{n} points cannot fill {num_cells} cells of {min_size} to {max_size}: that takes "
            f"{num_cells * min_size} to {num_cells * max_size} points. Change num_cells or the bounds."
        )
    centres = _seeds(points, num_cells, np.random.default_rng(seed))
    labels = np.full(n, -1, dtype=np.int64)
    for _ in range(LLOYD_STEPS):
        previous, labels = labels, np.asarray(cKDTree(centres).query(points)[1], dtype=np.int64)
        if (labels == previous).all():
            break
        centres = _means(points, labels, centres)
    for _ in range(BOUNDED_STEPS):
        previous, labels = labels, _bounded_assignment(points, centres, min_size, max_size)
        if (labels == previous).all():
            break
        centres = _means(points, labels, centres)
    return labels.astype(np.int32)


def _seeds(points: Floats, num_cells: int, rng: np.random.Generator) -> Floats:
    """k-means++ (Arthur & Vassilvitskii 2007): centres (C, D) drawn with probability ~ squared distance."""
    chosen = [int(rng.integers(len(points)))]
    nearest_sq = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    for _ in range(num_cells - 1):
        mass = np.cumsum(nearest_sq)
        if mass[-1] > 0:
            pick = min(int(np.searchsorted(mass, rng.random() * mass[-1], side="right")), len(points) - 1)
        else:
            pick = int(rng.integers(len(points)))  # fewer distinct points than cells
        chosen.append(pick)
        np.minimum(nearest_sq, ((points - points[pick]) ** 2).sum(axis=1), out=nearest_sq)
    return points[chosen].copy()


def _means(points: Floats, labels: Ints, centres: Floats) -> Floats:
    """Normalised means (C, D) of the members; a cell without any, or whose members cancel, keeps its centre."""
    sums = np.stack(
        [np.bincount(labels, weights=column, minlength=len(centres)) for column in points.T], axis=1
    )
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(norms > 1e-9, sums / np.maximum(norms, 1e-300), centres)


def _bounded_assignment(points: Floats, centres: Floats, min_size: int, max_size: int) -> Ints:
    """Labels (N,) within the bounds, near the cheapest for these centres."""
    k = min(NUM_CANDIDATES, len(centres))
    chord, cells = cKDTree(centres).query(points, k=np.arange(1, k + 1))
    cost, cells = np.asarray(chord**2 / 2, dtype=np.float64), np.asarray(cells, dtype=np.int64)  # 1 - cos
    prices = _prices(cost, cells, len(centres), min_size, max_size)
    labels = cells[np.arange(len(points)), np.argmin(cost + prices[cells], axis=1)]
    if _repair(labels, cost, cells, len(centres), min_size, max_size):
        return labels
    every = np.broadcast_to(np.arange(len(centres)), (len(points), len(centres)))
    _repair(labels, 1 - points @ centres.T, every, len(centres), min_size, max_size)
    return labels


def _prices(cost: Floats, cells: Ints, num_cells: int, min_size: int, max_size: int) -> Floats:
    """Prices (C,) under which cells (N, K) chosen by cost + price come close to the bounds.

    Each round a cell that is too full raises its price until just the surplus prefers its second choice, and one that
    is too empty lowers its until just the missing points prefer it; half steps keep neighbours from overshooting.
    """
    prices = np.zeros(num_cells)
    best, fewest = prices, np.inf
    rows = np.arange(len(cost))
    for _ in range(PRICE_STEPS):
        total = cost + prices[cells]
        first = np.argmin(total, axis=1)
        lowest = total[rows, first]
        labels = cells[rows, first]
        sizes = np.bincount(labels, minlength=num_cells)
        violation = np.maximum(sizes - max_size, 0).sum() + np.maximum(min_size - sizes, 0).sum()
        if violation < fewest:
            best, fewest = prices.copy(), violation
        if violation == 0 or cells.shape[1] == 1:
            break
        total[rows, first] = np.inf
        slack = total.min(axis=1) - lowest
        total[rows, first] = lowest
        step = np.zeros(num_cells)
        for cell in np.flatnonzero(sizes > max_size):
            members = np.sort(slack[labels == cell])
            step[cell] = members[sizes[cell] - max_size - 1]
        for cell in np.flatnonzero(sizes < min_size):
            gaps = np.sort((total - lowest[:, None])[(cells == cell) & (labels != cell)[:, None]])
            if len(gaps):
                step[cell] = -gaps[min(min_size - sizes[cell], len(gaps)) - 1]
        prices = prices + 0.5 * step + 1e-12 * np.sign(step)
    return best


def _repair(labels: Ints, cost: Floats, cells: Ints, num_cells: int, min_size: int, max_size: int) -> bool:
    """Shift points in place along cheapest chains of cells until the bounds hold; False when no chain exists."""
    sizes = np.bincount(labels, minlength=num_cells)
    while True:
        if (sizes > max_size).any():
            sources, sinks = sizes > max_size, sizes < max_size
        elif (sizes < min_size).any():
            sources, sinks = sizes > min_size, sizes < min_size
        else:
            return True
        moves = _cheapest_chain(labels, cost, cells, sources, sinks)
        if not moves:
            return False
        for point, cell in moves:
            sizes[labels[point]] -= 1
            sizes[cell] += 1
            labels[point] = cell


def _cheapest_chain(
    labels: Ints, cost: Floats, cells: Ints, sources: NDArray[np.bool_], sinks: NDArray[np.bool_]
) -> list[tuple[int, int]]:
    """Moves (point, new cell) that take one point out of some source and bring one into some sink."""
    num_cells = len(sources)
    current = np.where(cells == labels[:, None], cost, 0).sum(axis=1)
    arcs = labels[:, None] * num_cells + cells
    extra = cost - current[:, None]
    away = (cells != labels[:, None]).ravel()
    arcs, extra = arcs.ravel()[away], extra.ravel()[away]
    owner = np.repeat(np.arange(len(labels)), cells.shape[1])[away]
    order = np.lexsort((owner, extra, arcs))
    first = order[np.r_[True, np.diff(arcs[order]) > 0]] if len(order) else order
    tail, head, price, mover = arcs[first] // num_cells, arcs[first] % num_cells, extra[first], owner[first]
    reach = np.where(sources, 0.0, np.inf)
    via = np.full(num_cells, -1, dtype=np.int64)
    for _ in range(num_cells):  # Bellman-Ford: moving back towards the own centre has a negative price
        offer = reach[tail] + price
        better = np.flatnonzero(offer < reach[head] - 1e-15)
        if len(better) == 0:
            break
        better = better[np.lexsort((offer[better], head[better]))]
        better = better[np.r_[True, np.diff(head[better]) > 0]]
        reach[head[better]], via[head[better]] = offer[better], better
    if not np.isfinite(reach[sinks]).any():
        return []
    cell = int(np.argmin(np.where(sinks, reach, np.inf)))
    moves = []
    while via[cell] >= 0 and len(moves) < num_cells:
        moves.append((int(mover[via[cell]]), cell))
        cell = int(tail[via[cell]])
    return moves
