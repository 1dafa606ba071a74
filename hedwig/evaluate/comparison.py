"""Runs side by side on the queries that all of them answered, with one set of floors and paired differences.

Two runs may have other splits, sources or seeds, so only panoramas that are test queries with a position in every run
and answered by every run are compared, and none that any of the runs trained on. What was left out is counted per run.
The floors come from the first run's training places, and are the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hedwig.evaluate.floors import best_constants, checked_positions, take
from hedwig.evaluate.joining import join_predictions
from hedwig.geo import haversine_km
from hedwig.metrics import paired_difference_ci, summarise

__all__ = ["ComparedRun", "compare_runs"]

Floats = NDArray[np.float64]
LEVELS_KM = (1, 25, 200, 750, 2500)
MOVED_KM = 0.001  # a position further off than this in another run is another truth


@dataclass(frozen=True)
class ComparedRun:
    """What a run's folder says about its test split.

    Attributes:
        panoramas: ``pano_id, lat, lon, split`` of all its panoramas.
        predictions: ``pano_id, lat, lon``.
    """

    panoramas: pd.DataFrame
    predictions: pd.DataFrame


def compare_runs(runs: Mapping[str, ComparedRun], *, num_bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Each run's numbers on the common queries, the floors, and each run minus the first.

    Args:
        runs: name -> run; the first is the one to compare with.
        num_bootstrap: resamplings of the intervals.
        seed: of the resamplings and of the random floor.

    Returns:
        ``first`` (its name), ``num_queries``, ``methods`` {run: `hedwig.metrics.summarise`}, ``floors`` {"random",
        "constant", "constant_geoscore"}, ``paired`` {run: `hedwig.metrics.paired_difference_ci` of it minus the first
        run, with accuracies at 1, 25, 200, 750 and 2500 km}, ``left_out`` {run: {"num_test", "num_unanswered",
        "num_not_common"}}, ``num_trained_elsewhere`` (queries left out because another run trained on them).

    Raises:
        ValueError: fewer than two runs, no common query, or a query that has moved between runs.
    """
    if len(runs) < 2:
        raise ValueError(f"A comparison needs at least two runs; got {', '.join(runs) or 'none'}.")
    first = next(iter(runs))
    tests = {name: _test_rows(run) for name, run in runs.items()}
    answered = {name: set(tests[name]["pano_id"]) & set(run.predictions["pano_id"]) for name, run in runs.items()}
    everywhere = set.intersection(*answered.values())
    trained = set().union(*(_trained_on(run) for run in runs.values()))
    elsewhere = trained & set().union(*(set(rows["pano_id"]) for rows in tests.values()))
    common = sorted(everywhere - trained)
    if not common:
        counts = ", ".join(f"{name} {len(ids)}" for name, ids in answered.items())
        raise ValueError(f"The runs have no test query in common (answered: {counts}); use one listing and one split.")
    truth = tests[first].set_index("pano_id").loc[common, ["lat", "lon"]].reset_index()
    errors = {}
    for name, run in runs.items():
        own = tests[name].set_index("pano_id").loc[common]
        moved = haversine_km(own["lat"], own["lon"], truth["lat"], truth["lon"]) > MOVED_KM
        if moved.any():
            raise ValueError(
                f"{int(moved.sum())} queries lie elsewhere in {name} than in {first}, such as "
                f"{common[int(np.argmax(moved))]!r}; the runs were made from other listings."
            )
        errors[name] = join_predictions(truth, run.predictions)["error_km"].to_numpy(np.float64)
    settings = {"num_bootstrap": num_bootstrap, "seed": seed}
    return {
        "first": first,
        "num_queries": len(common),
        "methods": {name: summarise(e, **settings) for name, e in errors.items()},
        "floors": {name: summarise(e, **settings) for name, e in _floors(runs[first], truth, seed).items()},
        "paired": {
            name: paired_difference_ci(e, errors[first], thresholds_km=LEVELS_KM, **settings)
            for name, e in errors.items()
            if name != first
        },
        "left_out": {
            name: {
                "num_test": len(tests[name]),
                "num_unanswered": len(tests[name]) - len(answered[name]),
                "num_not_common": len(answered[name]) - len(common),
            }
            for name in runs
        },
        "num_trained_elsewhere": len(elsewhere),
        **settings,
    }


def _test_rows(run: ComparedRun) -> pd.DataFrame:
    rows = run.panoramas
    return rows[(rows["split"] == "test") & rows["lat"].notna() & rows["lon"].notna()]


def _trained_on(run: ComparedRun) -> set[str]:
    return set(run.panoramas.loc[run.panoramas["split"] == "train", "pano_id"])


def _floors(run: ComparedRun, truth: pd.DataFrame, seed: int) -> dict[str, Floats]:
    train = run.panoramas[(run.panoramas["split"] == "train") & run.panoramas["lat"].notna()]
    places = checked_positions(train["lat"], train["lon"], "training panoramas")
    drawn = np.random.default_rng(seed).integers(0, len(places[0]), size=len(truth))
    lat, lon = truth["lat"], truth["lon"]
    constants = {name: haversine_km(lat, lon, *place) for name, place in best_constants(*places, seed=seed).items()}
    return {"random": haversine_km(lat, lon, *take(places, drawn)), **constants}
