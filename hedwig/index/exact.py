"""Exact search inside cells in numpy, and the joining of several rankings into one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["best_of", "best_rows", "check_queries", "exact_search"]

Ints = NDArray[np.int64]
Scores = NDArray[np.float32]


def exact_search(
    queries: ArrayLike, cells: ArrayLike, vectors: ArrayLike, cell_ids: ArrayLike, top_k: int
) -> tuple[Ints, Scores]:
    """What `GeocellIndex.search_rows` approximates, in numpy: queries grouped by cell, one matrix product per cell.

    Args:
        queries: (B, D).
        cells: (B, K) int; -1 is no cell.
        vectors: (N, D), in any order.
        cell_ids: (N,) int.
        top_k: M.

    Returns:
        rows: (B, M) int64 positions in `vectors`, best first; -1 for none.
        scores: (B, M); -inf where the row is -1.
    """
    reference, owner = np.asarray(vectors, dtype=np.float32), np.asarray(cell_ids)
    x, wanted = check_queries(queries, cells, top_k, reference.shape[1], None)
    by_cell = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner, np.arange(owner.max(initial=-1) + 2), sorter=by_cell)
    rows = np.full((len(x), top_k), -1, dtype=np.int64)
    scores = np.full((len(x), top_k), -np.inf, dtype=np.float32)
    for cell in np.unique(wanted[wanted >= 0]):
        members = by_cell[starts[cell] : starts[cell + 1]] if cell + 1 < len(starts) else by_cell[:0]
        asking = np.flatnonzero((wanted == cell).any(axis=1))
        if len(members) == 0:
            continue
        candidates = x[asking] @ reference[members].T
        rows[asking], scores[asking] = best_of(
            np.concatenate([rows[asking], np.broadcast_to(members, candidates.shape)], axis=1),
            np.concatenate([scores[asking], candidates], axis=1),
            top_k,
        )
    return rows, scores


def best_of(rows: Ints, scores: Scores, num: int) -> tuple[Ints, Scores]:
    """(B, num) best first of (B, L) candidates, ties by row; L may be less than `num`: -1 and -inf fill."""
    if scores.shape[1] > num:
        top = np.argpartition(-scores, num, axis=1)[:, : num + 1]
        ranked = np.take_along_axis(scores, top, axis=1)
        worst, next_one = ranked[:, :num].min(axis=1), ranked[:, num]
        if not ((worst == next_one) & (next_one > -np.inf)).any():  # else which of them stay is a matter of rows
            rows, scores = np.take_along_axis(rows, top[:, :num], axis=1), ranked[:, :num]
    best = np.lexsort((rows, -scores), axis=1)[:, :num]
    rows, scores = np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)
    if scores.shape[1] < num:
        missing = ((0, 0), (0, num - scores.shape[1]))
        rows = np.pad(rows, missing, constant_values=-1)
        scores = np.pad(scores, missing, constant_values=-np.inf)
    return rows, scores


def best_rows(rows: Ints, scores: Scores, num: int) -> tuple[Ints, Scores]:
    """(B, num) different rows, best first, each with its best score, of (B, L) with repetitions; -1 and -inf fill."""
    order = np.lexsort((-scores, rows), axis=1)
    rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    scores[:, 1:][rows[:, 1:] == rows[:, :-1]] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, :num]
    scores = np.take_along_axis(scores, best, axis=1)
    return np.where(np.isneginf(scores), -1, np.take_along_axis(rows, best, axis=1)), scores


def check_queries(
    queries: ArrayLike, cells: ArrayLike, top_k: int, dim: int, num_cells: int | None
) -> tuple[Scores, Ints]:
    """Queries (B, D) and cells (B, K) as contiguous arrays, or an error that says what is wrong with them."""
    x = np.ascontiguousarray(queries, dtype=np.float32)
    wanted = np.ascontiguousarray(cells, dtype=np.int64)
    if x.ndim != 2 or x.shape[1] != dim or wanted.ndim != 2 or len(wanted) != len(x):
        raise ValueError(
            f"queries must be (B, {dim}) and cells (B, K); got {x.shape} and {wanted.shape}. Were the queries made "
            "by the model that made the index?"
        )
    # A finite sum of squares takes 1 us and proves every component finite; only a suspect is looked at one by one.
    flat: Any = x.reshape(-1)
    if not math.isfinite(np.dot(flat, flat)) and not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        raise ValueError(f"{len(bad)} of {len(x)} queries are not finite, first row {bad[0]}; take them out.")
    if num_cells is not None and wanted.size and (wanted.min() < -1 or wanted.max() >= num_cells):
        raise ValueError(
            f"cells must lie in -1..{num_cells - 1}; got {wanted.min()}..{wanted.max()}. "
            "Do the classifier and the index belong to the same geocells?"
        )
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    return x, wanted
