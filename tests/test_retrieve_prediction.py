"""Predictions as JSON and GeoJSON, and the calibration of the radius."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hedwig.retrieve import Prediction, fit_radius_scale


def prediction() -> Prediction:
    return Prediction(
        pano_id="q",
        lat=48.5,
        lon=9.0,
        cell_ids=(3, 1),
        cell_probs=(0.7, 0.2),
        neighbour_ids=("a", "b"),
        neighbour_scores=(0.9, 0.8),
        neighbour_lat=(48.5, -10.0),
        neighbour_lon=(9.0, 170.0),
        radius_km=12.5,
        confidence=0.7,
    )


def test_dict_is_plain_json_and_complete() -> None:
    found = json.loads(json.dumps(prediction().to_dict()))
    assert found["cell_ids"] == [3, 1]
    assert found["neighbour_lon"] == [9.0, 170.0]
    assert set(found) == set(Prediction.__dataclass_fields__)


def test_geojson_has_lon_first_and_the_answer_first() -> None:
    found = json.loads(json.dumps(prediction().to_geojson()))
    assert found["type"] == "FeatureCollection"
    assert [f["geometry"]["coordinates"] for f in found["features"]] == [[9.0, 48.5], [9.0, 48.5], [170.0, -10.0]]
    assert found["features"][0]["properties"]["radius_km"] == 12.5
    assert found["features"][2]["properties"] == {"role": "neighbour", "rank": 2, "pano_id": "b", "score": 0.8}


def test_predictions_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        prediction().lat = 0.0  # type: ignore[misc]


def test_radius_scale_is_the_conformal_order_statistic() -> None:
    error_km = np.arange(1, 100, dtype=float)  # 99 ratios 1..99: ceil(100 x 0.9) = the 90th
    assert fit_radius_scale(np.ones(99), error_km) == 90.0
    assert fit_radius_scale(np.full(99, 2.0), error_km, coverage=0.5) == 25.0
    assert fit_radius_scale([1.0, 1.0], [3.0, 4.0]) == 4.0  # too few for 90 %: the largest


def test_scaled_radius_covers_new_queries_as_often_as_promised() -> None:
    rng = np.random.default_rng(5)
    shares = []
    for _ in range(300):
        spread = rng.uniform(10, 1000, size=220)
        error = spread * rng.lognormal(0, 1, size=220)
        scale = fit_radius_scale(spread[:200], error[:200], coverage=0.8)
        shares.append((error[200:] <= scale * spread[200:]).mean())
    # 6000 trials: binomial sd 0.5 %, and 300 calibrations of sd 2.8 % add 0.16 %; expectation 0.8 to 0.8 + 1/201
    assert 0.785 < np.mean(shares) < 0.82


@pytest.mark.parametrize(
    ("spread", "error", "coverage"),
    [([], [], 0.9), ([1.0], [1.0, 2.0], 0.9), ([0.0], [1.0], 0.9), ([1.0], [np.nan], 0.9), ([1.0], [1.0], 1.0)],
)
def test_useless_calibration_data_is_refused(spread: list[float], error: list[float], coverage: float) -> None:
    with pytest.raises(ValueError, match=r"[Ss]pread"):
        fit_radius_scale(spread, error, coverage)
