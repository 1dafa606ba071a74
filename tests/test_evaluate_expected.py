"""The expected error of a guess against closed forms and against all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from hedwig.evaluate import expected_error, expected_error_on_rectangle
from hedwig.geo import EARTH_RADIUS_KM, haversine_km


def mean_in_rectangle(a: float, b: float) -> float:
    """Mean distance of two uniform points in a rectangle (Ghosh 1951)."""
    d = np.hypot(a, b)
    logs = b**2 / a * np.log((a + d) / b) + a**2 / b * np.log((b + d) / a)
    return float((a**3 / b**2 + b**3 / a**2 + d * (3 - a**2 / b**2 - b**2 / a**2) + 2.5 * logs) / 15)


@pytest.mark.parametrize("sides", [(4500.0, 2500.0), (1.0, 1.0), (10.0, 0.1)])
def test_a_rectangle_agrees_with_the_closed_form(sides: tuple[float, float]) -> None:
    found = expected_error_on_rectangle(*sides, num_pairs=200_000)
    assert abs(found["mean_km"] - mean_in_rectangle(*sides)) < 4 * found["standard_error_km"]
    assert found["standard_error_km"] < 0.002 * found["mean_km"]


def test_the_papers_rectangle_gives_the_papers_figure() -> None:
    assert mean_in_rectangle(4500, 2500) == pytest.approx(1863.7, abs=0.05)
    assert expected_error_on_rectangle(4500, 2500)["mean_km"] == pytest.approx(1863, abs=4)


def test_places_agree_with_the_mean_over_all_pairs() -> None:
    rng = np.random.default_rng(1)
    lat, lon = rng.uniform(-60, 60, 40), rng.uniform(-180, 180, 40)
    every = haversine_km(lat[:, None], lon[:, None], lat, lon)
    among = expected_error(lat, lon, num_pairs=200_000)
    assert abs(among["mean_km"] - every.sum() / (40 * 39)) < 4 * among["standard_error_km"]
    asked = expected_error(lat, lon, lat[:7], lon[:7], num_pairs=200_000)
    assert abs(asked["mean_km"] - every[:7].mean()) < 4 * asked["standard_error_km"]
    assert abs(asked["accuracy_at_km"]["5000"] - (every[:7] < 5000).mean()) < 0.01
    assert asked == expected_error(lat, lon, lat[:7], lon[:7], num_pairs=200_000)


def test_the_whole_sphere_is_a_quarter_turn_away() -> None:
    vectors = np.random.default_rng(0).normal(size=(3000, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lat, lon = np.degrees(np.arcsin(vectors[:, 2])), np.degrees(np.arctan2(vectors[:, 1], vectors[:, 0]))
    assert expected_error(lat, lon, num_pairs=200_000)["mean_km"] == pytest.approx(
        EARTH_RADIUS_KM * np.pi / 2, rel=0.01
    )


def test_a_place_is_no_guess_of_itself() -> None:
    assert expected_error([0.0, 0.0], [0.0, 90.0], num_pairs=50)["median_km"] == pytest.approx(10_007.557, abs=0.01)
    with pytest.raises(ValueError, match="at least 2"):
        expected_error([0.0], [0.0])
    with pytest.raises(ValueError, match="two positive sides"):
        expected_error_on_rectangle(0, 5)
