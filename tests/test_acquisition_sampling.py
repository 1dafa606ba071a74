"""Random points: uniform by area on the sphere, inside, apart, and the same whatever the order of the regions."""

from __future__ import annotations

import time

import numpy as np
import pytest
import shapely
from shapely.geometry import Polygon, box

from hedwig.acquisition.regions import area_km2
from hedwig.acquisition.sampling import AreaSampler, CapSampler, shares, spread
from hedwig.geo import haversine_km, unit_vectors


def rng(seed=0):
    return np.random.default_rng(seed)


def within_chance(count, num, share):
    """Four standard deviations of a binomial."""
    return abs(count - num * share) < 4 * np.sqrt(num * share * (1 - share))


def test_points_are_uniform_by_area_and_not_by_degrees():
    lat, lon, _ = AreaSampler(box(-30, -10, 50, 85)).draw(rng(), 40_000)
    total = np.sin(np.radians(85)) - np.sin(np.radians(-10))
    for edge in (20, 45, 60, 75):
        assert within_chance((lat > edge).sum(), 40_000, (np.sin(np.radians(85)) - np.sin(np.radians(edge))) / total)
    for edge in (-10, 10, 30):
        assert within_chance((lon < edge).sum(), 40_000, (edge + 30) / 80)


def test_uniform_in_a_shape_with_holes_parts_and_slanted_edges():
    shape = shapely.union_all(
        [
            Polygon([(0, 40), (20, 45), (18, 70), (3, 60)], [[(6, 50), (12, 50), (9, 58)]]),
            box(60, -20, 62, -19),
            box(-179.9, 60, -170, 61),
        ]
    )
    lat, lon, _ = AreaSampler(shape).draw(rng(1), 30_000)
    assert shapely.contains_xy(shape, lon, lat).all()
    for window in (box(0, 0, 8, 90), box(0, 0, 30, 55), box(60, -20, 61, -19), box(-180, 60, -175, 61)):
        share = area_km2(shapely.intersection(shape, window)) / area_km2(shape)
        hits = shapely.contains_xy(window, lon, lat).sum()
        assert within_chance(hits, 30_000, share), window


def test_a_thin_slanted_shape_is_sampled_quickly():
    sliver = Polygon([(-120, 10), (60, 70), (60, 70.001), (-120, 10.001)])  # 1 in 60,000 of its bounds
    began = time.process_time()
    lat, lon, _ = AreaSampler(sliver).draw(rng(), 200)
    assert len(lat) == 200
    assert shapely.contains_xy(sliver, lon, lat).all()
    assert time.process_time() - began < 5
    assert np.abs(lat - (10 + (lon + 120) / 3)).max() < 0.0011


def test_no_area_is_an_error_and_a_shape_below_rounding_ends():
    with pytest.raises(ValueError, match="no area"):
        AreaSampler(Polygon([(0, 0), (1, 1), (0, 0)]))
    tiny = box(0.00000010, 0.00000010, 0.00000040, 0.00000040)
    assert spread({"tiny": AreaSampler(tiny)}, {"tiny": 3}).shortfall == {"tiny": 3}


def test_a_cap_is_uniform_in_area_and_weighted_by_place():
    lat, lon = np.array([50.0, 89.9, 0.0]), np.array([10.0, 30.0, 179.99])
    sampler = CapSampler(lat, lon, np.array([1.0, 3.0, 0.0]), radius_km=40.0)
    found_lat, found_lon, place = sampler.draw(rng(), 20_000)
    km = haversine_km(found_lat, found_lon, lat[place], lon[place])
    assert km.max() <= 40.001
    assert within_chance((km < 20).sum(), 20_000, 0.25)  # a quarter of the area
    assert within_chance((place == 1).sum(), 20_000, 0.75)
    assert (place != 2).all()
    mean = unit_vectors(found_lat[place == 1], found_lon[place == 1]).mean(axis=0)
    assert np.linalg.norm(mean - unit_vectors(89.9, 30.0)) * 6371 < 1.5  # no side is preferred


def test_a_place_at_the_coast_keeps_its_weight_and_a_place_at_sea_is_left_out():
    land = shapely.multipolygons([box(0, -5, 5, 5)])
    sampler = CapSampler(np.array([0.0, 0.0, 0.0]), np.array([2.0, 4.99, 9.0]), np.ones(3), radius_km=30.0, land=land)
    lat, lon, place = sampler.draw(rng(), 9_000)
    assert shapely.contains_xy(land, lon, lat).all()
    assert within_chance((place == 0).sum(), 9_000, 1 / 3)
    assert within_chance((place == 1).sum(), 9_000, 1 / 3)
    assert (place != 2).all()


def regions():
    return {name: AreaSampler(shape) for name, shape in {
        "north": box(0, 1, 1, 2), "south": box(0, 0, 1, 1), "far": box(30, 30, 40, 40), "small": box(9, 9, 9.05, 9.05),
    }.items()}  # fmt: skip


def test_the_order_of_regions_does_not_matter_nor_without_distance_which_others_there_are():
    wanted = dict.fromkeys(regions(), 50)
    for km in (0.0, 3.0):
        first = spread(regions(), wanted, min_distance_km=km, seed=5)
        again = spread(dict(reversed(regions().items())), wanted, min_distance_km=km, seed=5)
        assert (first.lat == again.lat).all()
        assert (first.owner == again.owner).all()
        assert first.owner.tolist() == sorted(first.owner)
    whole = spread(regions(), wanted, seed=5)
    alone = spread({"far": regions()["far"]}, {"far": 50}, seed=5)
    assert (whole.lat[whole.owner == "far"] == alone.lat).all()
    assert not np.isin(alone.lat, spread({"far": regions()["far"]}, {"far": 50}, seed=6).lat).any()


def test_points_of_all_regions_keep_apart_and_what_does_not_fit_is_told():
    wanted = {"north": 60, "south": 60, "far": 10, "small": 40}
    drawn = spread(regions(), wanted, min_distance_km=6.0, seed=1)
    km = haversine_km(drawn.lat[:, None], drawn.lon[:, None], drawn.lat, drawn.lon)
    assert km[~np.eye(len(km), dtype=bool)].min() >= 6.0
    counts = {name: int((drawn.owner == name).sum()) for name in wanted}
    assert (counts["north"], counts["south"], counts["far"]) == (60, 60, 10)
    assert 1 <= counts["small"] <= 2  # a box of 5.5 km holds no more
    assert drawn.shortfall == {"small": 40 - counts["small"]}
    # kept as they were: the same region alone holds no more either
    assert spread({"small": regions()["small"]}, {"small": 40}, min_distance_km=20).shortfall == {"small": 39}


def test_a_full_region_is_really_full():
    drawn = spread({"a": AreaSampler(box(0, 0, 1, 1))}, {"a": 2000}, min_distance_km=10.0)
    grid = np.linspace(0.001, 0.999, 120)
    lat, lon = (axis.ravel() for axis in np.meshgrid(grid, grid))
    nearest = haversine_km(lat[:, None], lon[:, None], drawn.lat, drawn.lon).min(axis=1)
    assert (nearest > 10.0).mean() < 0.004  # rule of three: less than 0.1 % free with 95 % confidence


def test_numbers_must_not_be_negative():
    with pytest.raises(ValueError, match="min_distance_km=-1"):
        spread(regions(), dict.fromkeys(regions(), 1), min_distance_km=-1)


def test_shares_depend_on_key_and_seed_alone():
    assert shares(["a", "b"], 0)[1] == shares(["b"], 0)[0]
    assert shares(["a"], 0) != shares(["a"], 1)
    assert abs(shares([str(i) for i in range(4000)], 3).mean() - 0.5) < 0.02


def test_no_position_is_taken_twice_and_what_is_lacking_is_told():
    lat, lon = np.array([10.0, 20.0, 30.0]), np.array([1.0, 2.0, 3.0])
    places = CapSampler(lat, lon, np.ones(3), 0.0)
    drawn = spread({"a": places, "b": places}, {"a": 2, "b": 5})
    assert sorted(zip(drawn.lat, drawn.lon, strict=True)) == list(zip(lat, lon, strict=True))
    assert sum(drawn.shortfall.values()) == 7 - 3
