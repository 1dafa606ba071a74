"""Predictions as JSON and GeoJSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import shapely

from hedwig.retrieve import Prediction


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


def test_regions_are_drawn_where_there_are_polygons_and_listed_where_not() -> None:
    found = replace(prediction(), region_50=(3,), region_90=(3, 1), radius_50_km=4.0, localisable=False)
    plain = json.loads(json.dumps(found.to_geojson()))
    assert len(plain["features"]) == 3
    answer = plain["features"][0]["properties"]
    assert (answer["region_50"], answer["region_90"]) == ([3], [3, 1])
    assert (answer["radius_50_km"], answer["localisable"]) == (4.0, False)
    drawn = json.loads(json.dumps(found.to_geojson({1: shapely.box(8, 47, 9, 48), 3: shapely.box(9, 48, 10, 49)})))
    half, most = drawn["features"][3:]
    assert (half["properties"]["share"], most["properties"]["share"]) == (0.5, 0.9)
    assert most["properties"]["cell_ids"] == [3, 1]
    parts = most["geometry"]["geometries"]
    assert [shapely.geometry.shape(part).bounds for part in parts] == [(9, 48, 10, 49), (8, 47, 9, 48)]


def test_what_was_not_measured_is_nothing() -> None:
    found = prediction()
    assert (found.radius_50_km, found.localisable, found.region_50, found.region_90) == (None, True, (), ())
    assert not {"radius_50_km", "localisable", "region_50"} & set(found.to_geojson()["features"][0]["properties"])
