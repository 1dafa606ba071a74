"""Runs side by side: only common queries count, floors once, differences to the first, and no query somebody knew."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from hedwig.evaluate import ComparedRun, compare_runs
from hedwig.geo import haversine_km
from hedwig.metrics import paired_difference_ci, summarise


def world(num: int = 120) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "pano_id": [f"p{i:03d}" for i in range(num)],
            "lat": rng.uniform(-50, 60, num),
            "lon": rng.uniform(-180, 180, num),
            "split": np.where(np.arange(num) < num // 2, "train", "test"),
        }
    )


def run(panoramas: pd.DataFrame, off_deg: float, seed: int = 1) -> ComparedRun:
    test = panoramas[panoramas["split"] == "test"]
    answers = test[["pano_id"]].assign(lat=test["lat"] + off_deg * np.random.default_rng(seed).uniform(0, 1, len(test)))
    return ComparedRun(panoramas, answers.assign(lon=test["lon"]).sample(frac=1, random_state=seed))


def test_numbers_are_those_of_the_common_queries() -> None:
    panoramas = world()
    first, second = run(panoramas, 4.0), run(panoramas, 8.0, seed=2)
    second = ComparedRun(panoramas.sample(frac=1, random_state=3), second.predictions.iloc[5:])
    found = compare_runs({"a": first, "b": second}, num_bootstrap=50, seed=4)
    common = sorted(second.predictions["pano_id"])
    truth = panoramas.set_index("pano_id").loc[common]
    errors = []
    for each in (first, second):
        answers = each.predictions.set_index("pano_id").loc[common]
        errors.append(haversine_km(truth["lat"], truth["lon"], answers["lat"], answers["lon"]))
    assert found["num_queries"] == 55
    for name, error_km in zip("ab", errors, strict=True):
        assert found["methods"][name] == summarise(error_km, num_bootstrap=50, seed=4)
    expected = paired_difference_ci(
        errors[1], errors[0], thresholds_km=(1, 25, 200, 750, 2500), num_bootstrap=50, seed=4
    )
    assert found["paired"] == {"b": expected}
    assert found["paired"]["b"]["median_km"]["difference"] > 0
    assert found["left_out"] == {
        "a": {"num_test": 60, "num_unanswered": 0, "num_not_common": 5},
        "b": {"num_test": 60, "num_unanswered": 5, "num_not_common": 0},
    }
    assert set(found["floors"]) == {"random", "constant", "constant_geoscore"}
    assert all(floor["num_queries"] == 55 for floor in found["floors"].values())
    json.dumps(found)


def test_a_query_that_another_run_trained_on_is_left_out() -> None:
    panoramas = world()
    other = panoramas.copy()
    other.loc[60:69, "split"] = "train"
    found = compare_runs({"a": run(panoramas, 1.0), "b": run(other, 1.0)}, num_bootstrap=10)
    assert found["num_queries"] == 50
    assert found["num_trained_elsewhere"] == 10
    # Even when the other run answered it, as a folder whose split column was edited would.
    again = ComparedRun(other, run(panoramas, 1.0).predictions)
    assert compare_runs({"a": run(panoramas, 1.0), "b": again}, num_bootstrap=10)["num_queries"] == 50


def test_runs_that_cannot_be_compared() -> None:
    panoramas = world()
    moved = panoramas.assign(lat=panoramas["lat"] + 0.01)
    with pytest.raises(ValueError, match="60 queries lie elsewhere in b than in a"):
        compare_runs({"a": run(panoramas, 1.0), "b": run(moved, 1.0)})
    renamed = panoramas.assign(pano_id="x" + panoramas["pano_id"])
    with pytest.raises(ValueError, match=r"no test query in common \(answered: a 60, b 60\)"):
        compare_runs({"a": run(panoramas, 1.0), "b": run(renamed, 1.0)})
    with pytest.raises(ValueError, match="at least two"):
        compare_runs({"a": run(panoramas, 1.0)})
