"""The precision floor: the coarse answer is a function of the square and the coarse posterior, and of nothing else."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from hedwig.geo import haversine_km
from hedwig.serving.precision import coarse_geojson, coarsen, square_centres

FLOOR_KM = 25.0


def world(rng, num=400):
    return np.degrees(np.arcsin(rng.uniform(-1, 1, num))), rng.uniform(-180, 180, num)


def test_squares_have_the_side_and_hold_their_points():
    rng = np.random.default_rng(0)
    lat, lon = world(rng, 5000)
    for floor_km in (1.0, 25.0, 500.0, 30_000.0):
        found = square_centres(lat, lon, floor_km)
        away_km = haversine_km(lat, lon, found[:, 0], found[:, 1])
        assert np.all(away_km <= found[:, 2] * 1.001 + 1e-3)  # nothing farther off than the corner
        again = square_centres(found[:, 0], found[:, 1], floor_km)
        assert np.array_equal(found, again)
        near = np.abs(found[:, 0]) < 60
        if floor_km < 1000:
            assert np.all(found[:, 2] >= floor_km / 2 * math.sqrt(2) * 0.99)
            assert np.all(found[near, 2] <= floor_km * 0.8)
    edges = square_centres([90.0, -90.0, 0.0, 0.0], [0.0, 180.0, 180.0, -180.0], FLOOR_KM)
    assert np.all(np.abs(edges[:, 0]) < 90)
    assert np.array_equal(edges[2], edges[3])  # the antimeridian is one line


def answer(lat, lon, ids, probs, rng):
    """A prediction with every fine thing in it that there is, and one that does not exist yet."""
    return {
        "pano_id": str(rng.integers(1 << 60)), "lat": lat, "lon": lon, "cell_ids": list(ids), "cell_probs": list(probs),
        "neighbour_ids": ["n"], "neighbour_scores": [rng.random()], "neighbour_lat": [lat], "neighbour_lon": [lon],
        "radius_km": rng.random(), "confidence": rng.random(), "radius_50_km": rng.random(), "localisable": True,
        "region_50": [int(ids[0])], "region_90": list(ids), "frame_weights": rng.random(8).tolist(),
    }  # fmt: skip


def test_no_output_field_separates_two_inputs_with_the_same_coarse_features():
    rng = np.random.default_rng(1)
    for _ in range(1000):
        # Cells in clusters of one square each, so that the same coarse posterior has many fine ones.
        places = square_centres(*world(rng, 12), FLOOR_KM)[:, :2]
        cell_lat, cell_lon = np.repeat(places, 4, axis=0).T + rng.uniform(-0.02, 0.02, (2, 48))
        share = rng.dirichlet(np.full(12, 0.4))
        told = []
        for _ in range(2):
            fine = (share[:, None] * rng.dirichlet(np.ones(4), 12)).ravel()
            order = np.argsort(-fine)
            here = places[np.argmax(share)] + rng.uniform(-0.05, 0.05, 2)
            told.append(coarsen(answer(*here.tolist(), order, fine[order], rng), cell_lat, cell_lon, FLOOR_KM, top_k=5))
        assert json.dumps(told[0], sort_keys=True) == json.dumps(told[1], sort_keys=True)
        assert json.dumps(coarse_geojson(told[0])) == json.dumps(coarse_geojson(told[1]))


def test_what_is_told_is_coarse_and_right():
    rng = np.random.default_rng(2)
    cell_lat, cell_lon = [48.14, 48.13, 52.5, 40.0], [11.57, 11.58, 13.4, -74.0]
    fine = answer(48.137, 11.575, [2, 0, 1, 3], [0.4, 0.3, 0.25, 0.05], rng)
    told = coarsen(fine, cell_lat, cell_lon, FLOOR_KM, top_k=2)
    munich = square_centres([48.137], [11.575], FLOOR_KM)[0]
    assert (told["lat"], told["lon"]) == tuple(munich[:2])
    assert haversine_km(told["lat"], told["lon"], 48.137, 11.575) < FLOOR_KM
    assert [a["prob"] for a in told["areas"]] == [0.55, 0.4]
    assert told["confidence"] == 0.55
    assert told["radius_50_km"] == FLOOR_KM
    assert 480 < told["radius_km"] < 560  # Berlin is in it, New York not
    assert all(told[name] == [] for name in told if name.startswith(("neighbour", "cell")))
    assert told["precision_km"] == FLOOR_KM
    assert not set(told) & {"region_50", "region_90", "frame_weights", "localisable"}
    text = json.dumps(coarse_geojson(told))
    assert "neighbour" not in text
    assert "48.13" not in text


def test_coarser_is_coarser_and_nonsense_is_refused():
    rng = np.random.default_rng(3)
    lat, lon = world(rng, 300)
    fine = answer(10.0, 20.0, range(300), rng.dirichlet(np.ones(300)), rng)
    num = [len(coarsen(fine, lat, lon, km, top_k=300)["areas"]) for km in (10.0, 500.0, 3000.0)]
    assert num == sorted(num, reverse=True)
    assert all(coarsen(fine, lat, lon, km)["radius_km"] >= km for km in (10.0, 500.0, 3000.0))
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="floor_km"):
            coarsen(fine, lat, lon, bad)
