"""Places, town and country, confidence and radii in the record, each against a loop over the rows."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from test_evaluate_record import NUM_CELLS, World

from hedwig.evaluate import is_urban, join_predictions, places_answered
from hedwig.evaluate.slices import calibration
from hedwig.geo import haversine_km
from hedwig.geocells import AdminTable
from hedwig.metrics import calibration_error, cell_nll, wilson_interval


def stripes(lat: np.ndarray, lon: np.ndarray) -> AdminTable:
    """A geography of stripes: country by longitude, admin-1 by latitude; nothing is known south of 40° S."""
    country = np.where(lat < -40, "", np.where(lon < 0, "WW", "EE")).astype(object)
    admin1 = np.where(lat < -40, "", np.where(lat < 10, "south", "north")).astype(object)
    zero = np.zeros(len(lat))
    return AdminTable(country, admin1, admin1, zero, zero)


PLACES = pd.DataFrame({"lat": [10.0, 20.0, 20.0], "lon": [179.98, 5.0, 6.0], "population": [60_000, 49_999, 1e6]})


def test_urban_is_near_a_large_place_also_across_the_date_line() -> None:
    rng = np.random.default_rng(0)
    lat = np.r_[rng.uniform(19.8, 20.2, 200), 10.0, 10.0, 10.2]
    lon = np.r_[rng.uniform(4.8, 6.2, 200), -179.98, 179.98, 179.98]
    found = is_urban(lat, lon, PLACES)
    large = PLACES[PLACES.population >= 50_000]
    slow = [bool((haversine_km(a, b, large.lat, large.lon) <= 10).any()) for a, b in zip(lat, lon, strict=True)]
    np.testing.assert_array_equal(found, slow)
    assert found[-3:].tolist() == [True, True, False]
    assert 0 < found[:200].sum() < 200
    assert not is_urban(lat, lon, PLACES, min_population=2e6).any()


def test_places_of_the_record_against_a_loop() -> None:
    world = World()
    world.truth["country"] = None
    large = world.truth[["lat", "lon"]].iloc[:20].assign(population=1e5)
    found = world.evaluate(lookup=stripes, places=large, num_bootstrap=10)
    joined = join_predictions(world.truth, world.predictions)
    own = stripes(joined["lat"].to_numpy(), joined["lon"].to_numpy())
    given = stripes(joined["pred_lat"].to_numpy(), joined["pred_lon"].to_numpy())
    known = [i for i in range(len(joined)) if own.country[i]]
    hits = [i for i in known if own.country[i] == given.country[i]]
    both = [i for i in hits if own.admin1[i] == given.admin1[i]]
    assert found["admin"]["country"]["share"] == len(hits) / len(known)
    assert found["admin"]["admin1"]["share"] == found["admin"]["admin2"]["share"] == len(both) / len(known)
    assert found["admin"]["country"]["num_unknown"] == len(joined) - len(known)
    for row in found["countries"]:
        mine = [i for i in known if own.country[i] == row["country"]]
        right = sum(own.country[i] == given.country[i] for i in mine)
        assert row["num_queries"] == len(mine)
        assert row["country_accuracy"] == right / len(mine)
        assert row["country_accuracy_ci"] == list(wilson_interval(right, len(mine)))
    assert sum(row["num_queries"] for row in found["countries"]) == len(known)
    urban = {name: row["num_queries"] for name, row in found["urban"].items()}
    assert 20 <= urban["urban"] < 60
    assert urban["urban"] == is_urban(joined["lat"], joined["lon"], large).sum()
    assert sum(urban.values()) == len(joined)
    assert places_answered(joined, stripes)[0]["urban"] is None
    found.pop("errors_km")
    json.dumps(found)


def test_without_a_geography_the_record_says_none() -> None:
    found = World().evaluate(num_bootstrap=10)
    assert found["admin"] is None
    assert found["urban"] is None
    assert "country_accuracy" not in found["countries"][0]


def with_probabilities(world: World) -> pd.DataFrame:
    rng = np.random.default_rng(7)
    shares = [rng.dirichlet(np.ones(len(row) + 1))[:-1] for row in world.predictions["cell_ids"]]
    world.predictions["cell_probs"] = shares
    world.predictions["confidence"] = [row[1] for row in shares]
    world.predictions["radius_50_km"] = world.predictions["radius_km"] / 2
    world.predictions["localisable"] = world.predictions["confidence"] > 0.1
    # Distinct cells per row, as a retriever lists them.
    world.predictions["cell_ids"] = [
        [c, (c + 1) % NUM_CELLS, *((c + k) % NUM_CELLS for k in range(2, len(row)))]
        for c, row in ((int(row[0]), row) for row in world.predictions["cell_ids"])
    ]
    return join_predictions(world.truth, world.predictions)


def test_calibration_of_the_record_against_its_parts() -> None:
    world = World()
    joined = with_probabilities(world)
    found = world.evaluate(num_bootstrap=10)["calibration"]
    true = world.assign(joined["lat"].to_numpy(), joined["lon"].to_numpy())
    # The confidence is that of the second cell listed.
    right = np.array([row[1] for row in joined["cell_ids"]]) == true
    assert found["confidence"] == calibration_error(joined["confidence"], right)
    cells, probs = np.array(joined["cell_ids"].tolist()), np.array(joined["cell_probs"].tolist())
    assert found["cell_nll"] == cell_nll(cells, probs, true, NUM_CELLS)
    assert found["radius_50"]["share"] == (joined["error_km"] <= joined["radius_50_km"]).mean()
    assert (found["radius_50"]["nominal"], found["radius_90"]["nominal"]) == (0.5, 0.9)
    kept = joined[joined["localisable"]]
    assert found["localisable"] == {
        "num_queries": len(kept),
        "share": len(kept) / len(joined),
        "median_km": kept["error_km"].median(),
    }
    within = world.evaluate(num_bootstrap=10, confidence_km=200.0)["calibration"]["confidence"]
    assert within == calibration_error(joined["confidence"], joined["error_km"] <= 200)


def test_what_predictions_do_not_hold_is_none() -> None:
    world = World()
    joined = join_predictions(world.truth, world.predictions).drop(columns=["confidence"])
    joined["radius_50_km"] = None  # a column of a run whose calibration did not measure it
    cells = np.array(joined["cell_ids"].tolist())
    found = calibration(joined, cells, np.zeros(len(joined), dtype=np.int64), NUM_CELLS)
    assert [name for name, value in found.items() if value is not None] == ["radius_90"]
    assert found["radius_90"]["share"] == pytest.approx((joined["error_km"] <= joined["radius_km"]).mean())
