"""Checks that say whether numbers can be believed at all: do rows, labels and axes belong together?

Three slips ruin a geolocation table without an error anywhere: vectors and positions shifted against each other, labels
dealt out to the wrong pictures, and latitude exchanged with longitude. Each check here is one that the slip must fail.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from hedwig.geo import haversine_km
from hedwig.index import GeocellIndex

__all__ = ["sanity_checks", "self_retrieval", "shuffled_labels"]

Floats = NDArray[np.float64]
_NUM_SHUFFLES = 20  # to be below all of them by chance has a probability of 1 in 21
_LEAST_ROWS = 5  # fewer exchangeable answers than this say nothing


def sanity_checks(joined: pd.DataFrame, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Do the answers depend on which query it is, and are latitude and longitude where they belong?

    Args:
        joined: what `join_predictions` returns.
        seed: of the shuffles.

    Returns:
        ``shuffled_labels``: ``median_km`` of the answers, ``shuffled_median_km`` (the lowest of 20 shuffles), and
        ``passed``: the former is lower, which by chance happens once in 21 times.
        ``swapped_answers``: ``num_queries`` whose answer is still a position with lat and lon exchanged, their
        ``median_km`` and ``swapped_median_km``, and ``passed``: exchanging does not halve the error; None where fewer
        than 5 answers can be exchanged.
    """
    median = float(joined["error_km"].median())
    shuffled = min(float(np.median(shuffled_labels(joined, seed=seed + i))) for i in range(_NUM_SHUFFLES))
    possible = joined[joined["pred_lon"].abs() <= 90]
    found: dict[str, dict[str, Any]] = {
        "shuffled_labels": {"median_km": median, "shuffled_median_km": shuffled, "passed": median < shuffled},
        "swapped_answers": {"num_queries": len(possible), "passed": None},
    }
    if len(possible) >= _LEAST_ROWS:
        swapped = haversine_km(possible["lat"], possible["lon"], possible["pred_lon"], possible["pred_lat"])
        before, after = float(possible["error_km"].median()), float(np.median(swapped))
        found["swapped_answers"] |= {
            "median_km": before,
            "swapped_median_km": after,
            "passed": not after < before / 2,
        }
    return found


def self_retrieval(
    index: GeocellIndex,
    vectors: ArrayLike,
    pano_ids: ArrayLike,
    lat: ArrayLike,
    lon: ArrayLike,
    *,
    num_queries: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Do training rows, asked as queries in their own cell, find themselves at 0 km? If not, rows and labels slipped.

    Args:
        index: the built index.
        vectors: (N, D) embeddings as they went into it, taken from the embeddings' table, not from the index.
        pano_ids: (N,) their names.
        lat: (N,) degrees, from the panoramas' table.
        lon: (N,) degrees.
        num_queries: how many rows to draw.
        seed: of the draw.

    Returns:
        ``num_queries``, ``share_at_0_km`` (1.0 expected; duplicates of one picture elsewhere may lower it a little),
        ``max_km``.
    """
    names = np.asarray(pano_ids, dtype=object)
    cell_of = dict(zip(index.pano_ids.tolist(), index.cell_ids.tolist(), strict=True))
    if unknown := [n for n in names.tolist() if n not in cell_of]:
        raise ValueError(f"{len(unknown)} panoramas are not in the index, such as {unknown[0]!r}; build it again.")
    rows = np.random.default_rng(seed).permutation(len(names))[:num_queries]
    found = index.search_rows(np.asarray(vectors)[rows], [[cell_of[n]] for n in names[rows]], 1)[0][:, 0]
    error_km = haversine_km(np.asarray(lat)[rows], np.asarray(lon)[rows], index.lat[found], index.lon[found])
    share = float((error_km < 1e-6).mean())
    return {"num_queries": len(rows), "share_at_0_km": share, "max_km": float(error_km.max())}


def shuffled_labels(joined: pd.DataFrame, *, seed: int = 0) -> Floats:
    """(Q,) errors in km when truths are dealt out at random; real predictions must be far below these.

    Args:
        joined: what `join_predictions` returns.
        seed: of the shuffle.
    """
    order = np.random.default_rng(seed).permutation(len(joined))
    truth = joined[["lat", "lon"]].to_numpy(np.float64)[order]
    return haversine_km(truth[:, 0], truth[:, 1], joined["pred_lat"], joined["pred_lon"])
