"""Capacity-constrained spherical k-means: cells of bounded size without any administrative map.

k-means++ seeds, Lloyd iterations on unit vectors (Dhillon & Modha 2001: the centre is the normalised mean), and an
assignment that respects `min_size <= cell <= max_size`. Where the nearest centres already satisfy the bounds this is
plain spherical k-means. Otherwise points are shifted along the cheapest chains of cells (a crowded cell hands a point
to its neighbour, which hands one to the next, until one has room): the shortest paths of a min-cost flow, but on the
graph of cells instead of points and several at a time. It promises the bounds, and a cost near the optimum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree

__all__ = ["spherical_kmeans"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LLOYD_STEPS = 50
BOUNDED_STEPS = 3
NUM_CANDIDATES = 8  # nearest centres a point may go to, unless the bounds need more


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
    sums = np.stack([np.bincount(labels, weights=column, minlength=len(centres)) for column in points.T], axis=1)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(norms > 1e-9, sums / np.maximum(norms, 1e-300), centres)


def _bounded_assignment(points: Floats, centres: Floats, min_size: int, max_size: int) -> Ints:
    """Labels (N,) within the bounds: nearest centres, then the cheapest chains of moves that mend the sizes."""
    k = min(NUM_CANDIDATES, len(centres))
    chord, cells = cKDTree(centres).query(points, k=np.arange(1, k + 1))
    labels = np.asarray(cells[:, 0], dtype=np.int64).copy()
    while not _repair(labels, chord**2 / 2, cells, len(centres), min_size, max_size):  # chord^2 / 2 is 1 - cos
        k = min(4 * k, len(centres))  # with all centres as candidates a chain always exists
        chord, cells = cKDTree(centres).query(points, k=np.arange(1, k + 1))
    return labels


def _repair(labels: Ints, cost: Floats, cells: Ints, num_cells: int, min_size: int, max_size: int) -> bool:
    """Shift points in place along chains of cells until the bounds hold; False when the candidates offer no chain."""
    sizes = np.bincount(labels, minlength=num_cells)
    arcs = [_arcs(cell, labels, cost, cells) for cell in range(num_cells)]
    while True:
        if (sizes > max_size).any():
            surplus, room = np.maximum(sizes - max_size, 0), np.maximum(max_size - sizes, 0)
        elif (sizes < min_size).any():
            surplus, room = np.maximum(sizes - min_size, 0), np.maximum(min_size - sizes, 0)
        else:
            return True
        moves = _cheapest_chains(arcs, surplus, room)
        if not moves:
            return False
        touched = {cell for point, cell in moves} | {int(labels[point]) for point, _ in moves}
        for point, cell in moves:
            sizes[labels[point]] -= 1
            sizes[cell] += 1
            labels[point] = cell
        for cell in touched:
            arcs[cell] = _arcs(cell, labels, cost, cells)


def _arcs(cell: int, labels: Ints, cost: Floats, cells: Ints) -> tuple[Ints, Ints, Floats, Ints]:
    """Ways out of a cell: its number (A,), each cell a member may go to (A,), the least extra cost, the member."""
    members = np.flatnonzero(labels == cell)
    here = cells[members] == cell
    extra = (cost[members] - np.where(here, cost[members], 0).sum(axis=1, keepdims=True))[~here]
    heads = cells[members][~here]
    movers = np.broadcast_to(members[:, None], here.shape)[~here]
    order = np.lexsort((movers, extra, heads))
    order = order[np.diff(heads[order], prepend=-1) > 0]
    return np.full(len(order), cell), heads[order], extra[order], movers[order]


def _cheapest_chains(arcs: list[tuple[Ints, Ints, Floats, Ints]], surplus: Ints, room: Ints) -> list[tuple[int, int]]:
    """Moves (point, new cell) along shortest chains from cells with surplus to cells with room, no point moved twice.

    The successive shortest paths of min-cost flow, except that a round takes several of them at once.
    """
    tail, head, price, mover = (np.concatenate(column) for column in zip(*arcs, strict=True))
    num_cells = len(surplus)
    # a way back to the nearest centre saves cost; as a gain it could close a cycle, and 0 would be no arc
    graph = csr_array(
        (np.maximum(price, 1e-12), head, np.searchsorted(tail, np.arange(num_cells + 1))), (num_cells, num_cells)
    )
    reach, before, _ = dijkstra(graph, indices=np.flatnonzero(surplus), min_only=True, return_predecessors=True)
    entered = np.flatnonzero(before >= 0)
    via = np.full(num_cells, -1, dtype=np.int64)
    via[entered] = np.searchsorted(tail * num_cells + head, before[entered] * num_cells + entered)
    parent = np.where(via >= 0, tail[via], np.arange(len(via)))
    branch = np.where(via[parent] >= 0, parent, np.arange(len(via)))  # ends at the first cell after the source
    while (branch[branch] != branch).any():
        branch = branch[branch]
    moves: list[tuple[int, int]] = []
    moved: set[int] = set()
    surplus = surplus.copy()
    for sink in np.argsort(reach, kind="stable"):
        first = via[branch[sink]]
        if room[sink] == 0 or first < 0 or surplus[tail[first]] == 0 or int(mover[first]) in moved:
            continue
        chain, cell = [], int(sink)
        while via[cell] >= 0 and int(mover[via[cell]]) not in moved:
            chain.append((int(mover[via[cell]]), cell))
            cell = int(tail[via[cell]])
        if via[cell] < 0:
            surplus[cell] -= 1
            moved |= {point for point, _ in chain}
            moves += chain
    return moves
