"""The record of an evaluation: the predictions beside everything that should be worse, and what should be better.

An error in kilometres says little until it stands next to answers that never saw the picture (a random training
place, the best constant) and answers that were told the truth (its cell, its nearest training place). They are
always computed, and `verdict` says in words when the predictions do not beat the former. Truth and predictions meet
here and only here, by ``pano_id``, never by row order. Arrays and tables in, plain dict out: nothing is read from
disk, nothing is drawn, and equal seeds give equal records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from hedwig.evaluate.checks import sanity_checks
from hedwig.evaluate.expected import expected_error
from hedwig.evaluate.floors import Embedded, best_constants, checked_positions, nearest_reference, take
from hedwig.evaluate.joining import join_predictions, padded_cells
from hedwig.evaluate.slices import Lookup, calibration, places_answered
from hedwig.geo import haversine_km, unit_vectors
from hedwig.metrics import by_group, cell_recall_at_k, paired_difference_ci, radius_coverage, summarise, wilson_interval

__all__ = ["evaluate"]

Floats = NDArray[np.float64]
Assign = Callable[[Floats, Floats], NDArray[Any]]
EXPECTED_PAIRS = 200_000  # a standard error of about 0.2 % of the mean
_BEST_OF_FLOORS = {"median_km": ("random", "constant"), "geoscore": ("random", "constant_geoscore")}


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
    lookup: Lookup | None = None,
    places: pd.DataFrame | None = None,
    confidence_km: float | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score predictions against the truth, with floors, oracles, comparisons and a verdict.

    Args:
        truth: ``pano_id, lat, lon`` of Q queries, and ``country`` if there is one.
        predictions: ``pano_id, lat, lon, cell_ids, radius_km`` for every query; others are ignored. Where they have
            ``cell_probs, confidence, radius_50_km`` or ``localisable``, these are judged too.
        train_lat: (N,) degrees of the training panoramas.
        train_lon: (N,) degrees.
        cell_lat: (C,) degrees of the geocells' centroids; row number = cell_id.
        cell_lon: (C,) degrees.
        assign: (lat, lon) -> (Q,) true cell ids, such as ``Geocells.assign``; -1 outside of all.
        embeddings: further methods by name, answered by the nearest reference in cosine, such as ``clip_mean`` (mean
            of the frames' CLIP embeddings) and ``viclip_1nn`` (hedwig's own, without cells).
        lookup: (lat, lon) -> country, admin-1 and admin-2, such as ``Geography.lookup``; None leaves out what needs
            it.
        places: inhabited places with their population, such as ``Geography.places()``, for town against country.
        confidence_km: distance that a confidence speaks of, see `hedwig.evaluate.slices.calibration`.
        num_bootstrap: resamplings of every interval.
        seed: of the resamplings and of the random floor.

    Returns:
        ``methods`` {name: `hedwig.metrics.summarise`} for ``hedwig, top_cell``, those of `embeddings`, the floors
        ``random, constant, constant_geoscore`` and the oracles ``perfect_cell, nearest_training``; ``paired`` {name:
        hedwig minus it}; ``verdict`` (text) and ``better_than_floors``; ``cell_recall`` {"1", "5"};
        ``radius_coverage``; ``countries`` [...]; ``admin`` and ``urban`` (`places_answered`; None without `lookup`);
        ``calibration`` (see there); ``checks`` (`sanity_checks`); ``split`` (distance of queries to training data);
        ``constants`` {name: [lat, lon]}; ``expected_error`` (of a random training place, by Monte Carlo);
        ``num_queries, num_train, num_unused_predictions, num_outside_cells, seed, num_bootstrap``. Beside these plain
        values, ``errors_km`` {name: (Q,) float64} in the order of pano_id: take it out before writing JSON if the
        record is to stay small.

    Raises:
        ValueError: a query without a prediction, double ids, positions that are missing, or no training data.
    """
    joined = join_predictions(truth, predictions)
    lat, lon = joined["lat"].to_numpy(np.float64), joined["lon"].to_numpy(np.float64)
    train = checked_positions(train_lat, train_lon, "training panoramas")
    centroids = checked_positions(cell_lat, cell_lon, "geocells")
    nearest = cKDTree(unit_vectors(*train)).query(unit_vectors(lat, lon))[1]
    true_cell = np.asarray(assign(lat, lon), dtype=np.int64)
    outside = true_cell < 0
    oracle_cell = np.where(outside, cKDTree(unit_vectors(*centroids)).query(unit_vectors(lat, lon))[1], true_cell)
    considered = padded_cells(joined["cell_ids"], len(centroids[0]))
    constants = best_constants(*train, seed=seed)

    answers: dict[str, tuple[Floats, Floats]] = {
        "hedwig": (joined["pred_lat"].to_numpy(np.float64), joined["pred_lon"].to_numpy(np.float64)),
        "top_cell": take(centroids, considered[:, 0]),
    }
    for name, embedded in (embeddings or {}).items():
        answers[name] = nearest_reference(name, embedded, joined["pano_id"].to_numpy())
    drawn = np.random.default_rng(seed).integers(0, len(train[0]), size=len(lat))
    answers["random"] = take(train, drawn)
    for name, (constant_lat, constant_lon) in constants.items():
        answers[name] = (np.full(len(lat), constant_lat), np.full(len(lat), constant_lon))
    answers["perfect_cell"] = take(centroids, oracle_cell)
    answers["nearest_training"] = take(train, nearest)

    errors = {name: haversine_km(lat, lon, *answer) for name, answer in answers.items()}
    methods = {name: summarise(e, num_bootstrap=num_bootstrap, seed=seed) for name, e in errors.items()}
    paired = {
        name: paired_difference_ci(errors["hedwig"], e, num_bootstrap=num_bootstrap, seed=seed)
        for name, e in errors.items()
        if name != "hedwig"
    }
    better, verdict = _verdict(methods, paired)
    placed: dict[str, Any] = {"admin": None, "urban": None}
    own_country = given_country = None
    if lookup is not None:
        placed, own, given = places_answered(joined, lookup, places)
        own_country, given_country = own.country, given.country
    return {
        "methods": methods,
        "paired": paired,
        "verdict": verdict,
        "better_than_floors": better,
        "cell_recall": cell_recall_at_k(considered, true_cell, [k for k in (1, 5) if k <= considered.shape[1]]),
        "radius_coverage": radius_coverage(errors["hedwig"], joined["radius_km"], 0.9),
        "countries": _countries(joined, errors["hedwig"], own_country, given_country),
        **placed,
        "calibration": calibration(joined, considered, true_cell, len(centroids[0]), confidence_km=confidence_km),
        "checks": sanity_checks(joined, seed=seed),
        "split": {
            "min_km": float(errors["nearest_training"].min()),
            "median_km": float(np.median(errors["nearest_training"])),
        },
        "constants": {name: [float(a), float(b)] for name, (a, b) in constants.items()},
        "expected_error": expected_error(*train, lat, lon, num_pairs=EXPECTED_PAIRS, seed=seed),
        "num_queries": len(lat),
        "num_train": len(train[0]),
        "num_unused_predictions": len(predictions) - len(joined),
        "num_outside_cells": int(outside.sum()),
        "seed": seed,
        "num_bootstrap": num_bootstrap,
        "errors_km": errors,
    }


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


def _countries(
    joined: pd.DataFrame, error_km: Floats, own: NDArray[Any] | None, given: NDArray[Any] | None
) -> list[dict[str, Any]]:
    """Per country of the truth, or else of the geography, the most queries first; how many were answered in it, too."""
    told = joined["country"].to_numpy(dtype=object) if "country" in joined.columns else np.full(len(joined), None)
    # The listing's own word counts; the geography fills the gaps.
    country = np.where(pd.isna(told), "" if own is None else own, told)
    rows = [{"country": row.pop("group"), **row} for row in by_group(error_km, country)]
    if own is None or given is None:
        return rows
    for row in rows:
        mine = country == row["country"]
        hits = int((given[mine] == own[mine]).sum())
        row["country_accuracy"] = hits / int(mine.sum())
        row["country_accuracy_ci"] = list(wilson_interval(hits, int(mine.sum())))
    return rows
