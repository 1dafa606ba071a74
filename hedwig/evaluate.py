"""The record of an evaluation: the predictions beside everything that should be worse, and what should be better.

An error in kilometres says little until it stands next to answers that never saw the picture (a random training
place, the best constant) and answers that were told the truth (its cell, its nearest training place). They are
always computed, and `verdict` says in words when the predictions do not beat the former. Truth and predictions meet
here and only here, by ``pano_id``, never by row order. Arrays and tables in, plain dict out: nothing is read from
disk, nothing is drawn, and equal seeds give equal records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from hedwig.geo import chord_to_km, haversine_km, lat_lon, unit_vectors
from hedwig.index import GeocellIndex
from hedwig.metrics import (
    accuracy_at_km,
    cell_recall_at_k,
    geoscore,
    paired_difference_ci,
    summarise,
    wilson_interval,
)

__all__ = [
    "Embedded",
    "best_constants",
    "brute_force_1nn",
    "evaluate",
    "join_predictions",
    "self_retrieval",
    "shuffled_labels",
]

Floats = NDArray[np.float64]
Assign = Callable[[Floats, Floats], NDArray[Any]]
_BEST_OF_FLOORS = {"median_km": ("random", "constant"), "geoscore": ("random", "constant_geoscore")}
_NUM_GRID, _NUM_SAMPLE = 2000, 5000


@dataclass(frozen=True)
class Embedded:
    """One encoder's embeddings of queries and training references, each row with its name or place.

    Attributes:
        query_ids: (Q,) pano_id of the queries, in any order.
        queries: (Q, D) embeddings.
        references: (N, D) embeddings of training panoramas.
        lat: (N,) degrees, where the references are.
        lon: (N,) degrees.
    """

    query_ids: NDArray[Any]
    queries: NDArray[np.float32]
    references: NDArray[np.float32]
    lat: Floats
    lon: Floats


def evaluate(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    *,
    train_lat: ArrayLike,
    train_lon: ArrayLike,
    cell_lat: ArrayLike,
    cell_lon: ArrayLike,
    assign: Assign,
    embeddings: Mapping[str, Embedded] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score predictions against the truth, with floors, oracles, comparisons and a verdict.

    Args:
        truth: ``pano_id, lat, lon`` of Q queries, and ``country`` if there is one.
        predictions: ``pano_id, lat, lon, cell_ids, radius_km`` for every query; others are ignored.
        train_lat: (N,) degrees of the training panoramas.
        train_lon: (N,) degrees.
        cell_lat: (C,) degrees of the geocells' centroids; row number = cell_id.
        cell_lon: (C,) degrees.
        assign: (lat, lon) -> (Q,) true cell ids, such as ``Geocells.assign``; -1 outside of all.
        embeddings: further methods by name, answered by the nearest reference in cosine, such as ``clip_mean`` (mean
            of the frames' CLIP embeddings) and ``viclip_1nn`` (hedwig's own, without cells).
        num_bootstrap: resamplings of every interval.
        seed: of the resamplings and of the random floor.

    Returns:
        ``methods`` {name: `hedwig.metrics.summarise`} for ``hedwig, top_cell``, those of `embeddings`, the floors
        ``random, constant, constant_geoscore`` and the oracles ``perfect_cell, nearest_training``; ``paired`` {name:
        hedwig minus it}; ``verdict`` (text) and ``better_than_floors``; ``cell_recall`` {"1", "5"};
        ``radius_coverage``; ``countries`` [...]; ``split`` (distance of queries to training data); ``constants``
        {name: [lat, lon]}; ``num_queries, num_train, num_unused_predictions, num_outside_cells, seed,
        num_bootstrap``. Beside these plain values, ``errors_km`` {name: (Q,) float64} in the order of pano_id: take it
        out before writing JSON if the record is to stay small.

    Raises:
        ValueError: a query without a prediction, double ids, positions that are missing, or no training data.
    """
    joined = join_predictions(truth, predictions)
    lat, lon = joined["lat"].to_numpy(np.float64), joined["lon"].to_numpy(np.float64)
    train = _positions(train_lat, train_lon, "training panoramas")
    centroids = _positions(cell_lat, cell_lon, "geocells")
    nearest = cKDTree(unit_vectors(*train)).query(unit_vectors(lat, lon))[1]
    true_cell = np.asarray(assign(lat, lon), dtype=np.int64)
    outside = true_cell < 0
    oracle_cell = np.where(outside, cKDTree(unit_vectors(*centroids)).query(unit_vectors(lat, lon))[1], true_cell)
    considered = _padded_cells(joined["cell_ids"], len(centroids[0]))
    constants = best_constants(*train, seed=seed)

    answers: dict[str, tuple[Floats, Floats]] = {
        "hedwig": (joined["pred_lat"].to_numpy(np.float64), joined["pred_lon"].to_numpy(np.float64)),
        "top_cell": _take(centroids, considered[:, 0]),
    }
    for name, embedded in (embeddings or {}).items():
        answers[name] = _nearest_reference(name, embedded, joined["pano_id"].to_numpy())
    drawn = np.random.default_rng(seed).integers(0, len(train[0]), size=len(lat))
    answers["random"] = _take(train, drawn)
    for name, (constant_lat, constant_lon) in constants.items():
        answers[name] = (np.full(len(lat), constant_lat), np.full(len(lat), constant_lon))
    answers["perfect_cell"] = _take(centroids, oracle_cell)
    answers["nearest_training"] = _take(train, nearest)

    errors = {name: haversine_km(lat, lon, *answer) for name, answer in answers.items()}
    methods = {name: summarise(e, num_bootstrap=num_bootstrap, seed=seed) for name, e in errors.items()}
    paired = {
        name: paired_difference_ci(errors["hedwig"], e, num_bootstrap=num_bootstrap, seed=seed)
        for name, e in errors.items()
        if name != "hedwig"
    }
    better, verdict = _verdict(methods, paired)
    covered = int((errors["hedwig"] <= joined["radius_km"].to_numpy(np.float64)).sum())
    return {
        "methods": methods,
        "paired": paired,
        "verdict": verdict,
        "better_than_floors": better,
        "cell_recall": cell_recall_at_k(considered, true_cell, [k for k in (1, 5) if k <= considered.shape[1]]),
        "radius_coverage": {
            "share": covered / len(lat),
            "ci": list(wilson_interval(covered, len(lat))),
            "median_radius_km": float(joined["radius_km"].median()),
        },
        "countries": _countries(joined, errors["hedwig"]),
        "split": {
            "min_km": float(errors["nearest_training"].min()),
            "median_km": float(np.median(errors["nearest_training"])),
        },
        "constants": {name: [float(a), float(b)] for name, (a, b) in constants.items()},
        "num_queries": len(lat),
        "num_train": len(train[0]),
        "num_unused_predictions": len(predictions) - len(joined),
        "num_outside_cells": int(outside.sum()),
        "seed": seed,
        "num_bootstrap": num_bootstrap,
        "errors_km": errors,
    }


def join_predictions(truth: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """One row per query, sorted by pano_id: the truth, and the prediction as ``pred_lat, pred_lon, error_km, …``.

    Raises:
        ValueError: queries without a position or a prediction, ids that occur twice, or no queries at all.
    """
    for name, table in (("truth", truth), ("predictions", predictions)):
        if num_double := int(table["pano_id"].duplicated().sum()):
            raise ValueError(f"{num_double} pano_id occur more than once in the {name}; they cannot be joined.")
    if truth.empty:
        raise ValueError("There are no queries to evaluate; is there a test split with positions?")
    if num_lost := int(truth[["lat", "lon"]].isna().any(axis=1).sum()):
        raise ValueError(f"{num_lost} of {len(truth)} queries have no position; take them out of the truth.")
    missing = truth.loc[~truth["pano_id"].isin(predictions["pano_id"]), "pano_id"]
    if len(missing):
        raise ValueError(
            f"{len(missing)} of {len(truth)} queries have no prediction, such as {missing.iloc[0]!r}; "
            "run `hedwig predict` for the whole split."
        )
    renamed = predictions.rename(columns={"lat": "pred_lat", "lon": "pred_lon"})
    known = truth[[c for c in ("pano_id", "lat", "lon", "country") if c in truth.columns]]
    overlap = [c for c in renamed.columns if c in known.columns and c != "pano_id"]
    joined = known.merge(renamed.drop(columns=overlap), on="pano_id", validate="one_to_one")
    joined = joined.sort_values("pano_id", ignore_index=True)
    joined["error_km"] = haversine_km(joined["lat"], joined["lon"], joined["pred_lat"], joined["pred_lon"])
    return joined


def best_constants(lat: ArrayLike, lon: ArrayLike, *, seed: int = 0) -> dict[str, tuple[float, float]]:
    """The best answers that look at nothing: one point each for the median error and for the GeoScore.

    Candidates are a Fibonacci grid of the globe and training places, scored on a sample of the training places; the
    best is then refined on finer and finer grids around it. Test positions are not used.

    Args:
        lat: (N,) degrees of the training places.
        lon: (N,) degrees.
        seed: of the sample, used where N is above 5000.

    Returns:
        ``{"constant": (lat, lon), "constant_geoscore": (lat, lon)}``.
    """
    places = unit_vectors(*_positions(lat, lon, "training panoramas"))
    if len(places) > _NUM_SAMPLE:
        places = places[np.random.default_rng(seed).choice(len(places), _NUM_SAMPLE, replace=False)]
    # Fibonacci lattice (González 2010): equal areas, so no crowding of candidates at the poles.
    i = np.arange(_NUM_GRID) + 0.5
    grid_lat = np.degrees(np.arcsin(1 - 2 * i / _NUM_GRID))
    grid = unit_vectors(grid_lat, np.degrees(np.pi * (1 + 5**0.5) * i))
    found = {}
    for name in ("constant", "constant_geoscore"):
        candidates = np.concatenate([grid, places[:_NUM_GRID]])
        for spread_deg in (3.0, 1.0, 0.3, 0.1):
            best = candidates[np.argmax(_constant_quality(candidates, places, name))]
            best_lat, best_lon = lat_lon(best)
            steps = np.linspace(-spread_deg, spread_deg, 13)
            # Degrees of longitude shrink with the latitude; near the poles a whole turn is enough.
            stretch = min(1 / max(float(np.cos(np.radians(best_lat))), 1e-3), 60.0)
            around_lat, around_lon = np.meshgrid(np.clip(best_lat + steps, -90, 90), best_lon + steps * stretch)
            candidates = np.concatenate([best[None], unit_vectors(around_lat.ravel(), around_lon.ravel())])
        answer_lat, answer_lon = lat_lon(candidates[np.argmax(_constant_quality(candidates, places, name))])
        found[name] = (float(answer_lat), float(answer_lon))
    return found


def brute_force_1nn(query: ArrayLike, reference: ArrayLike, *, chunk_rows: int = 1024) -> NDArray[np.int64]:
    """Position of the most similar reference (cosine) of each query, over all of them.

    Args:
        query: (Q, D).
        reference: (N, D), N > 0.
        chunk_rows: queries per matrix product; bounds the memory to chunk_rows x N floats.

    Returns:
        (Q,) int64; the first among equals.
    """
    q, r = np.asarray(query, dtype=np.float32), np.asarray(reference, dtype=np.float32)
    if q.ndim != 2 or r.ndim != 2 or q.shape[1] != r.shape[1] or len(r) == 0:
        raise ValueError(f"query must be (Q, D) and reference (N, D) with N > 0; got {q.shape} and {r.shape}.")
    if not (np.isfinite(q).all() and np.isfinite(r).all()):
        raise ValueError("Embeddings that are not finite have no nearest neighbour; embed these panoramas again.")
    # The length of a query does not change who is nearest; that of a reference does.
    r = r / np.maximum(np.linalg.norm(r, axis=1, keepdims=True), 1e-12)
    best = [np.argmax(q[i : i + chunk_rows] @ r.T, axis=1) for i in range(0, len(q), chunk_rows)]
    return np.concatenate([*best, np.empty(0, dtype=np.int64)]).astype(np.int64)


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
    found = index.search(np.asarray(vectors)[rows], [[cell_of[n]] for n in names[rows]], 1)[0][:, 0]
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


def _positions(lat: ArrayLike, lon: ArrayLike, what: str) -> tuple[Floats, Floats]:
    lats, lons = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    if lats.ndim != 1 or lats.shape != lons.shape or len(lats) == 0 or not np.isfinite(lats + lons).all():
        raise ValueError(
            f"The {what} need one finite lat and lon each, and at least one row; got {lats.shape}, {lons.shape}, "
            f"{int((~np.isfinite(lats)).sum() + (~np.isfinite(lons)).sum())} values missing."
        )
    return lats, lons


def _take(places: tuple[Floats, Floats], rows: NDArray[Any]) -> tuple[Floats, Floats]:
    return places[0][rows], places[1][rows]


def _padded_cells(cell_ids: pd.Series[Any], num_cells: int) -> NDArray[np.int64]:
    """Lists of any length as (Q, K) with -1 behind the shorter ones."""
    lists = [np.asarray(row, dtype=np.int64) for row in cell_ids]
    if empty := sum(len(row) == 0 for row in lists):
        raise ValueError(f"{empty} predictions name no cell; they are not predictions of this version.")
    padded = np.full((len(lists), max(len(row) for row in lists)), -1, dtype=np.int64)
    for i, row in enumerate(lists):
        padded[i, : len(row)] = row
    if padded.max() >= num_cells:
        raise ValueError(
            f"Predictions name cell {padded.max()} but there are {num_cells} geocells: they were made with other "
            "geocells; run `hedwig predict` again."
        )
    return padded


def _nearest_reference(name: str, embedded: Embedded, pano_ids: NDArray[Any]) -> tuple[Floats, Floats]:
    row_of = {pano_id: row for row, pano_id in enumerate(np.asarray(embedded.query_ids).tolist())}
    if missing := [p for p in pano_ids.tolist() if p not in row_of]:
        raise ValueError(f"{len(missing)} queries have no embedding for {name!r}, such as {missing[0]!r}; embed them.")
    places = _positions(embedded.lat, embedded.lon, f"references of {name!r}")
    if len(places[0]) != len(embedded.references):
        raise ValueError(f"{name!r}: {len(embedded.references)} reference embeddings but {len(places[0])} positions.")
    rows = [row_of[p] for p in pano_ids.tolist()]
    return _take(places, brute_force_1nn(np.asarray(embedded.queries)[rows], embedded.references))


def _constant_quality(candidates: Floats, places: Floats, name: str) -> Floats:
    """(K,) the higher the better: minus the median distance to (N, 3) places, or the mean GeoScore."""
    quality = []
    for start in range(0, len(candidates), 256):
        chord = np.sqrt(np.maximum(2 - 2 * candidates[start : start + 256] @ places.T, 0.0))
        if name == "constant":
            quality.append(-np.median(chord, axis=1))  # the arc grows with the chord
        else:
            quality.append(geoscore(chord_to_km(chord)).mean(axis=1))
    return np.concatenate(quality)


def _verdict(methods: Mapping[str, Any], paired: Mapping[str, Any]) -> tuple[bool, str]:
    """Is hedwig's interval apart from, and on the right side of, that of each floor that competes in the same unit?"""
    ours, ties = methods["hedwig"], []
    for floor in _BEST_OF_FLOORS["median_km"]:
        if not ours["median_km_ci"][1] < methods[floor]["median_km_ci"][0]:
            ties.append(f"{floor} (median {ours['median_km']:.0f} against {methods[floor]['median_km']:.0f} km)")
    for floor in _BEST_OF_FLOORS["geoscore"]:
        if not ours["geoscore_ci"][0] > methods[floor]["geoscore_ci"][1]:
            ties.append(f"{floor} (GeoScore {ours['geoscore']:.0f} against {methods[floor]['geoscore']:.0f})")
    n = ours["num_queries"]
    if ties:
        text = (
            f"NOT better than answering without looking, on {n} queries: the 95 % intervals overlap with, or are "
            f"worse than, {'; '.join(ties)}. Nothing here shows that the pictures were used."
        )
    else:
        text = f"Better than every floor on {n} queries: the 95 % intervals of median error and GeoScore are apart."
    for name in ("clip_mean", "viclip_1nn", "top_cell"):
        if name in paired:
            low, high = paired[name]["median_km"]["ci"]
            word = "better than" if high < 0 else "worse than" if low > 0 else "not distinguishable from"
            text += f" {word.capitalize()} {name} (difference of medians {low:.0f} to {high:.0f} km)."
    return not ties, text


def _countries(joined: pd.DataFrame, error_km: Floats) -> list[dict[str, Any]]:
    """Per country, the most queries first: count, median and accuracy at 750 km with its Wilson interval."""
    if "country" not in joined.columns:
        return []
    rows = []
    for country, positions in joined.groupby("country").indices.items():
        errors = error_km[positions]
        rows.append(
            {
                "country": str(country),
                "num_queries": len(errors),
                "median_km": float(np.median(errors)),
                "accuracy_at_750_km": accuracy_at_km(errors, [750])["750"],
                "accuracy_at_750_km_ci": list(wilson_interval(int((errors < 750).sum()), len(errors))),
            }
        )
    return sorted(rows, key=lambda row: (-int(str(row["num_queries"])), row["country"]))
