"""Capacity-constrained spherical k-means: cells of bounded size without any administrative map.

k-means++ seeds, Lloyd iterations on unit vectors (Dhillon & Modha 2001: the centre is the normalised mean), and an
assignment that respects `min_size <= cell <= max_size`. Where the nearest centres already satisfy the bounds this is
plain spherical k-means. Otherwise, from coarse to fine:

1. centres of cells that are too small move into cells that are too large;
2. where the bounds are so tight that this is not enough, cells start from nested halves whose cuts keep the bounds;
3. what is left shifts along the cheapest chains of cells (a crowded cell hands a point to its neighbour, which hands
   one to the next, until one has room): the shortest paths of a min-cost flow on the graph of cells;
4. then points are exchanged: two that are both the better for it change places, one moves alone where the bounds allow
   it, and the centres follow. Every such step lowers the cost and keeps the bounds.

It promises the bounds, and a cost near the optimum, not the optimum.
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
SETTLED = 2e-4  # Lloyd stops when fewer than this share of the points change their cell
RELOCATION_ROUNDS = 12
CROWDED = 0.02  # of all points too many or too few: then cells start from nested halves instead
FLEXIBLE = 0.8  # of what the bounds allow, by which a half may differ from its share
LEAST_PART = 8  # a half has at least this share of the cells, one in so many: thin slices make long cells
RELOCATION_STEPS = 1
NUM_CANDIDATES = 16  # nearest centres a point may go to, unless the bounds need more
MOST_CANDIDATES = 64
ALL_PAIRS = 2_000_000  # points times cells up to which every cell may become a candidate for every point
STALLED_ROUNDS = 50  # of mending without progress, possible only where places have different weights
EXCHANGES = 20
EXCHANGE_CANDIDATES = 4
LEAST_GAIN = 1e-14  # in squared chord, below which it is rounding
FEW_CELLS, RESTARTS = 256, 6
SEED_SAMPLE = 10  # points per cell, and at least 20,000, that the seeds are drawn from where there are more


def spherical_kmeans(
    vectors: ArrayLike,
    num_cells: int,
    min_size: int,
    max_size: int,
    seed: int = 0,
    *,
    counts: ArrayLike | None = None,
) -> NDArray[np.int32]:
    """Labels (N,) int32 in 0 .. num_cells-1 with min_size <= members <= max_size; equal input, equal output.

    Args:
        vectors: unit vectors (N, D).
        num_cells: C.
        min_size: fewest members of a cell.
        max_size: most members of a cell.
        seed: of the k-means++ seeding, the only random step.
        counts: members (N,) that each vector stands for, which stay together; 1 if not given. One of more than
            `max_size` is a cell of its own, the only one allowed to be larger; counts that are large against the gap
            between the bounds may leave them unmet.

    Raises:
        ValueError: num_cells * min_size > N, num_cells * max_size < N, or vectors that are not of unit length.
    """
    points = np.asarray(vectors, dtype=np.float64)
    if points.ndim != 2 or not np.allclose((points**2).sum(axis=1), 1.0, atol=1e-5):
        raise ValueError(f"spherical_kmeans needs unit vectors (N, D); it was given an array of shape {points.shape}.")
    weights = np.ones(len(points), dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
    if num_cells < 1 or not 0 <= min_size <= max_size:
        raise ValueError(
            f"Need num_cells >= 1 and 0 <= min_size <= max_size; got {num_cells=}, {min_size=}, {max_size=}."
        )
    weights = np.minimum(weights, max_size)
    n = int(weights.sum())
    if num_cells * min_size > n or num_cells * max_size < n:
        raise ValueError(
            f"{n} points cannot fill {num_cells} cells of {min_size} to {max_size}: that takes "
            f"{num_cells * min_size} to {num_cells * max_size} points. Change num_cells or the bounds."
        )
    rng = np.random.default_rng(seed)
    centres = _seeds(points, num_cells, rng)
    labels, centres = _lloyd(points, weights, centres, LLOYD_STEPS)
    for _ in range(RELOCATION_ROUNDS):
        sizes = np.bincount(labels, weights=weights, minlength=num_cells).astype(np.int64)
        if not _relocate(points, labels, centres, sizes, min_size, max_size):
            break
        labels, centres = _lloyd(points, weights, centres, RELOCATION_STEPS)
    most = num_cells if len(points) * num_cells < ALL_PAIRS else MOST_CANDIDATES
    halves = _excess(labels, weights, num_cells, min_size, max_size) > CROWDED * n
    if not halves:
        _repair(points, weights, labels, centres, min_size, max_size, most)
    excess = _excess(labels, weights, num_cells, min_size, max_size)
    if halves or excess > 0:
        parts = _nested_halves(points, weights, num_cells, min_size, max_size)
        _repair(points, weights, parts, _means(points, weights, parts, centres), min_size, max_size, most)
        if halves or _excess(parts, weights, num_cells, min_size, max_size) < excess:
            labels = parts
    for _ in range(EXCHANGES if num_cells > 1 else 0):
        centres = _means(points, weights, labels, centres)
        if _exchange(points, weights, labels, centres, min_size, max_size) <= SETTLED * len(points):
            break
    return labels.astype(np.int32)


def _seeds(points: Floats, num_cells: int, rng: np.random.Generator) -> Floats:
    """Centres (C, D) to start from: where cells are few and luck weighs, the best of some after a short Lloyd."""
    sample = max(SEED_SAMPLE * num_cells, 20_000)
    if len(points) > sample:
        points = points[np.sort(rng.choice(len(points), sample, replace=False))]
    if num_cells > FEW_CELLS:
        return _drawn(points, num_cells, rng)
    best, least = points[:1], np.inf
    for _ in range(RESTARTS):
        labels, centres = _lloyd(points, np.ones(len(points), dtype=np.int64), _drawn(points, num_cells, rng), 10)
        cost = float(((points - centres[labels]) ** 2).sum())
        if cost < least:
            best, least = centres, cost
    return best


def _drawn(points: Floats, num_cells: int, rng: np.random.Generator) -> Floats:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007): centres (C, D), each the best of a few drawn."""
    chosen = [int(rng.integers(len(points)))]
    nearest_sq = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    trials = 2 + int(np.log(num_cells))
    for _ in range(num_cells - 1):
        mass = np.cumsum(nearest_sq)
        if mass[-1] > 0:
            drawn = np.searchsorted(mass, rng.random(trials) * mass[-1], side="right")
            drawn = np.minimum(drawn, len(points) - 1)
        else:
            drawn = rng.integers(len(points), size=1)  # fewer distinct points than cells
        left = np.minimum(nearest_sq, np.maximum(2 - 2 * (points[drawn] @ points.T), 0))
        pick = int(np.argmin(left.sum(axis=1)))
        chosen.append(int(drawn[pick]))
        nearest_sq = left[pick]
        nearest_sq[drawn[pick]] = 0.0
    return points[chosen].copy()


def _excess(labels: Ints, weights: Ints, num_cells: int, min_size: int, max_size: int) -> int:
    """By how many points the cells are above the maximum or below the minimum, together."""
    sizes = np.bincount(labels, weights=weights, minlength=num_cells)
    return int(np.maximum(sizes - max_size, 0).sum() + np.maximum(min_size - sizes, 0).sum())


def _nested_halves(points: Floats, weights: Ints, num_cells: int, min_size: int, max_size: int) -> Ints:
    """Labels (N,) of parts within the bounds: cut in two across the longest axis until there are C of them.

    A cut goes where it lowers the spread most, among those that leave either half a mean size within the bounds; with
    bounds that leave no choice the halves have equal parts of the weight.
    """
    labels = np.zeros(len(points), dtype=np.int64)
    stack = [(np.arange(len(points)), 0, num_cells)]
    while stack:
        rows, first, parts = stack.pop()
        labels[rows] = first
        if parts == 1 or len(rows) < 2:
            continue
        weight = weights[rows].astype(np.float64)
        centred = points[rows] - np.average(points[rows], axis=0, weights=weight)
        axis = np.linalg.eigh((centred * weight[:, None]).T @ centred)[1][:, -1]
        order = np.argsort(centred @ axis, kind="stable")
        along, weight, depth = rows[order], weight[order], (centred @ axis)[order]
        filled, total = np.cumsum(weight)[:-1], float(weight.sum())
        mean = total / parts
        share = np.clip(np.round(filled / mean), 1, parts - 1)
        least = max(1, parts // LEAST_PART)
        room = FLEXIBLE * np.minimum(share, parts - share) * max(0.0, min(mean - min_size, max_size - mean))
        allowed = np.abs(filled - share * mean) <= np.maximum(room, weight.max() / 2)
        allowed &= (share >= least) & (share <= parts - least)
        if allowed.any():  # what is explained by two means, of deviations whose total is 0
            explained = np.cumsum(weight * depth)[:-1] ** 2 * total / (filled * (total - filled))
            cut = int(np.argmax(np.where(allowed, explained, -np.inf)))
        else:
            cut = int(np.argmin(np.abs(filled - mean * (parts // 2))))
        low = int(np.clip(share[cut], 1, parts - 1))
        stack += [(along[: cut + 1], first, low), (along[cut + 1 :], first + low, parts - low)]
    return labels


def _lloyd(points: Floats, weights: Ints, centres: Floats, steps: int) -> tuple[Ints, Floats]:
    """Nearest centres and means in turn, until they settle: labels (N,) and the centres (C, D) they are nearest to."""
    labels = np.full(len(points), -1, dtype=np.int64)
    for _ in range(steps):
        previous, labels = labels, np.asarray(cKDTree(centres).query(points)[1], dtype=np.int64)
        if (labels != previous).mean() <= SETTLED:
            break
        centres = _means(points, weights, labels, centres)
    return labels, centres


def _means(points: Floats, weights: Ints, labels: Ints, centres: Floats) -> Floats:
    """Normalised means (C, D) of the members; a cell without any, or whose members cancel, keeps its centre."""
    sums = np.stack([np.bincount(labels, weights=column, minlength=len(centres)) for column in points.T * weights], 1)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(norms > 1e-9, sums / np.maximum(norms, 1e-300), centres)


def _relocate(points: Floats, labels: Ints, centres: Floats, sizes: Ints, min_size: int, max_size: int) -> bool:
    """Move centres of small cells next to those above the maximum, in place; False when there are none of either.

    Small are those below the minimum and, where the mean is near the maximum, those that leave most of it unused.
    """
    spare = np.flatnonzero(sizes < max(min_size, min(0.75 * sizes.mean(), sizes.mean() ** 2 / max_size)))
    wanted = np.maximum(np.ceil(sizes / max_size).astype(np.int64) - 1, 0)
    crowded = np.repeat(np.arange(len(centres)), wanted)
    num = min(len(spare), len(crowded))
    if num == 0:
        return False
    spare = spare[np.argsort(sizes[spare], kind="stable")][:num]
    crowded = crowded[np.argsort(-sizes[crowded], kind="stable")][:num]
    order = np.argsort(labels, kind="stable")
    start = np.searchsorted(labels[order], np.arange(len(centres) + 1))
    turn = np.zeros(len(centres), dtype=np.int64)
    for cell, source in zip(spare, crowded, strict=True):
        turn[source] += 1
        members = order[start[source] : start[source + 1]]
        centres[cell] = points[members[turn[source] * len(members) // (wanted[source] + 1)]]
    return True


def _repair(
    points: Floats, weights: Ints, labels: Ints, centres: Floats, min_size: int, max_size: int, most: int
) -> None:
    """Shift points in place along the cheapest chains that mend the sizes, with more candidates where they need it."""
    k = min(NUM_CANDIDATES, len(centres))
    while _excess(labels, weights, len(centres), min_size, max_size):
        chord, cells = cKDTree(centres).query(points, k=np.arange(1, k + 1))
        # a point may stay where it is, even far away: its own cell takes the place of the last candidate
        away = np.flatnonzero((cells != labels[:, None]).all(axis=1))
        cells[away, -1] = labels[away]
        chord[away, -1] = np.linalg.norm(points[away] - centres[labels[away]], axis=1)
        mended = _shift(labels, chord**2 / 2, cells, weights, len(centres), min_size, max_size)  # 1 - cos
        if mended or k >= min(most, len(centres)):
            return
        k = min(2 * k, most, len(centres))


def _exchange(points: Floats, weights: Ints, labels: Ints, centres: Floats, min_size: int, max_size: int) -> int:
    """Let points change places, or move alone, in place where that lowers the cost within the bounds; how many did."""
    k = min(EXCHANGE_CANDIDATES, len(centres))
    chord, cells = cKDTree(centres).query(points, k=np.arange(1, k + 1))
    chord[cells == labels[:, None]] = np.inf
    best = chord.argmin(axis=1)
    rows = np.arange(len(points))
    target = cells[rows, best]
    gain = ((points - centres[labels]) ** 2).sum(axis=1) - chord[rows, best] ** 2
    # between two cells the r-th best of one side changes places with the r-th best of the other, of equal weight
    back = target < labels
    pair = np.minimum(labels, target) * len(centres) + np.maximum(labels, target)
    order = np.lexsort((-gain, back, weights, pair))
    ends = np.diff(pair[order], prepend=-1) != 0
    ends[1:] |= np.diff(weights[order]) != 0
    side = 2 * (np.cumsum(ends) - 1) + back[order]
    start = np.searchsorted(side, np.arange(2 * int(ends.sum()) + 1))
    num = np.minimum(start[1::2] - start[:-1:2], start[2::2] - start[1::2])
    group, rank = np.repeat(np.arange(len(num)), num), np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
    forth, back_again = order[start[2 * group] + rank], order[start[2 * group + 1] + rank]
    better = gain[forth] + gain[back_again] > LEAST_GAIN
    moved = np.concatenate([forth[better], back_again[better]])
    labels[moved] = target[moved]
    num_moved = len(moved)
    gain[moved] = 0.0
    sizes = np.bincount(labels, weights=weights, minlength=len(centres)).astype(np.int64).tolist()
    alone = np.flatnonzero(gain > LEAST_GAIN)
    alone = alone[np.argsort(-gain[alone], kind="stable")]
    for row, old, new, weight in zip(
        *(column.tolist() for column in (alone, labels[alone], target[alone], weights[alone])), strict=True
    ):
        if sizes[old] - weight >= min_size and sizes[new] + weight <= max_size:
            sizes[old] -= weight
            sizes[new] += weight
            labels[row] = new
            num_moved += 1
    return num_moved


def _shift(
    labels: Ints, cost: Floats, cells: Ints, weights: Ints, num_cells: int, min_size: int, max_size: int
) -> bool:
    """Shift points in place along chains of cells until the bounds hold; False when the candidates offer no chain."""
    sizes = np.bincount(labels, weights=weights, minlength=num_cells).astype(np.int64)
    order = np.argsort(labels, kind="stable")
    cuts = np.searchsorted(labels[order], np.arange(1, num_cells))
    members = [set(rows.tolist()) for rows in np.split(order, cuts)]
    arcs = [_arcs(cell, members[cell], cost, cells, weights) for cell in range(num_cells)]
    least, patience = np.inf, STALLED_ROUNDS
    while patience:
        violation = int(np.maximum(sizes - max_size, 0).sum() + np.maximum(min_size - sizes, 0).sum())
        patience = STALLED_ROUNDS if violation < least else patience - 1
        least = min(least, violation)
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
            sizes[labels[point]] -= weights[point]
            sizes[cell] += weights[point]
            members[labels[point]].remove(point)
            members[cell].add(point)
            labels[point] = cell
        for cell in touched:
            arcs[cell] = _arcs(cell, members[cell], cost, cells, weights)
    return False


def _arcs(cell: int, own: set[int], cost: Floats, cells: Ints, weights: Ints) -> tuple[Ints, Ints, Floats, Ints]:
    """Ways out of a cell: its number (A,), each cell a member may go to (A,), the least extra cost, the member.

    The lightest members come first, because a chain of equal weights changes only the cells at its ends.
    """
    members = np.fromiter(own, dtype=np.int64, count=len(own))
    here = cells[members] == cell
    extra = (cost[members] - np.where(here, cost[members], 0).sum(axis=1, keepdims=True))[~here]
    heads = cells[members][~here]
    movers = np.broadcast_to(members[:, None], here.shape)[~here]
    order = np.lexsort((movers, extra, weights[movers], heads))
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
