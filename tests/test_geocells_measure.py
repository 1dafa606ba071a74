"""The numbers of a partition against hand-made cells whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from hedwig.geo import EARTH_RADIUS_KM, haversine_km
from hedwig.geocells import Geocells, PublishedQuadtree, measure, measure_published
from hedwig.geocells.geography import AdminTable
from hedwig.geocells.measure import _num_overlaps, area_km2


def table(country):
    names = np.array(list(country), dtype=object)
    return AdminTable(names, names, names, np.zeros(len(names)), np.r_[3.0, np.zeros(len(names) - 1)])


def test_numbers_of_two_cells():
    lat, lon = np.zeros(8), np.array([0, 1, 2, 3, 50, 51, 52, 53.0])
    cells = Geocells.from_membership(lat, lon, [0] * 4 + [1] * 4, table("AAABBBBB"))
    told = measure(cells, lat, lon, table("AAABBBBB"))
    km = haversine_km(0, 0, 0, 1)
    assert (told["num_cells"], told["num_points"], told["min_size"], told["max_size"]) == (2, 8, 4, 4)
    assert (told["uncovered"], told["overlaps"], told["num_off_polygon"]) == (0, 0, 1)
    assert told["oracle_median_km"] == pytest.approx(km, abs=1e-3)  # 0.5 and 1.5 degrees, half of each
    assert told["oracle_mean_km"] == pytest.approx(km, abs=1e-3)
    assert told["border_purity"] == 7 / 8
    assert told["balance"] == 1.0
    assert told["max_off_polygon_km"] == 3.0


def test_balance_is_the_effective_share_of_cells():
    lat, lon = np.zeros(8), np.arange(8) * 10.0
    cells = Geocells.from_membership(lat, lon, [0, 0, 0, 0, 0, 0, 0, 1])
    told = measure(cells, lat, lon, table("A" * 8))
    share = np.array([7, 1]) / 8
    assert told["balance"] == pytest.approx(float(np.exp(-(share * np.log(share)).sum())) / 2, abs=1e-4)


def test_areas_are_those_of_the_sphere():
    half = 2 * np.pi * EARTH_RADIUS_KM**2
    boxes = [shapely.box(-180, 0, 180, 90), shapely.box(0, -90, 90, 90), shapely.box(0, 30, 180, 90)]
    np.testing.assert_allclose(area_km2(boxes), [half, half / 2, half / 4], rtol=1e-12)


def test_overlaps_are_pairs_that_share_an_area():
    boxes = np.array(
        [shapely.box(0, 0, 2, 2), shapely.box(1, 1, 3, 3), shapely.box(2, 0, 4, 1), shapely.box(9, 9, 10, 10)]
    )
    assert _num_overlaps(boxes) == 1  # the third touches the first and the second along lines only


def test_published_boxes_with_a_gap():
    boxes = PublishedQuadtree(
        np.array([[0.0, 0, 10, 10], [0, 10, 10, 20], [50, 50, 60, 60]]), np.array([5.0, 5, 55]), np.array([5.0, 15, 55])
    )
    told = measure_published(boxes, [5, 5, 5, 5], [5, 6, 15, 21], table("AAAA"))
    assert (told["num_cells"], told["uncovered"], told["min_size"], told["max_size"]) == (2, 1, 2, 2)
    one, six = haversine_km(5, 5, 5, 6), haversine_km(5, 15, 5, 21)
    assert told["oracle_mean_km"] == pytest.approx((one + six) / 4, abs=1e-3)
