"""Geocells: a partition with stable ids, exact assignment, checked on the way in and out; real street-view points."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely

from hedwig.geo import haversine_km, spherical_mean
from hedwig.geocells import Geocells, Geography, build_geocells
from hedwig.geocells.geography import AdminTable


@pytest.fixture(scope="module")
def streetview(shared):
    points = np.loadtxt(shared / "data/streetview_points/sv_points_latlong_collected.txt", delimiter=",")
    return points[np.random.default_rng(0).choice(len(points), 10_000, replace=False)]


@pytest.fixture(scope="module")
def quarters():
    """A geography of four countries, one a quarter of the globe."""
    boxes = [shapely.box(-180 + 90 * i, -90, -90 + 90 * i, 90) for i in range(4)]
    return Geography.from_polygons(gpd.GeoDataFrame({"iso_a2": ["AA", "BB", "CC", "DD"]}, geometry=boxes, crs=4326))


def assert_same(a, b):
    pd.testing.assert_frame_equal(a.table.drop(columns="geometry"), b.table.drop(columns="geometry"))
    pd.testing.assert_frame_equal(a.anchors, b.anchors)
    assert shapely.equals_exact(a.table.geometry.to_numpy(), b.table.geometry.to_numpy(), 0.0).all()


def test_table_describes_the_members():
    lat, lon = np.array([10.0, 12, 50, 50, 51]), np.array([0.0, 2, 100, 100, 101])
    cells = Geocells.from_membership(lat, lon, [7, 7, 3, 3, 3])
    assert cells.table.columns.tolist() == [
        "cell_id", "geometry", "lat", "lon", "num_panoramas", "radius_km", "country", "admin1", "parent",
        "parent_1", "parent_2", "off_polygon_km",
    ]  # fmt: skip
    assert cells.table["cell_id"].dtype == np.int32
    assert cells.table["num_panoramas"].tolist() == [2, 3]
    mean = spherical_mean(lat[2:], lon[2:])
    np.testing.assert_allclose(cells.table.loc[1, ["lat", "lon"]].astype(float), mean, atol=1e-9)
    far = haversine_km(*mean, lat[2:], lon[2:]).max()
    assert cells.table.loc[1, "radius_km"] == pytest.approx(far)
    assert len(cells.anchors) == 4  # the place with two panoramas is one anchor
    assert len(cells) == 2


def test_assign_is_the_nearest_anchor_at_poles_and_seam():
    rng = np.random.default_rng(0)
    lat, lon = np.degrees(np.arcsin(rng.uniform(-1, 1, 200))), rng.uniform(-180, 180, 200)
    cells = Geocells.from_membership(lat, lon, rng.integers(0, 20, 200))
    q_lat, q_lon = np.r_[rng.uniform(-90, 90, 300), 90, -90, 0, 0], np.r_[rng.uniform(-180, 180, 300), 5, 5, 180, 540]
    anchors = cells.anchors
    km = haversine_km(q_lat[:, None], q_lon[:, None], anchors["lat"].to_numpy(), anchors["lon"].to_numpy())
    found, distance = cells.assign_with_distance(q_lat, q_lon)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, anchors["cell_id"].to_numpy()[km.argmin(axis=1)])
    np.testing.assert_allclose(distance, km.min(axis=1), atol=1e-4)
    assert found[-1] == found[-2]


def test_fiji_is_one_cell_with_polygons_on_both_sides():
    lat, lon = np.array([-17, -17.1, -16.9, 40, 40.1]), np.array([179.9, -179.9, 180.0, 0, 1])
    cells = Geocells.from_membership(lat, lon, [0, 0, 0, 1, 1])
    fiji = int(cells.assign(-17, 179.99)[0])
    assert cells.assign([-17, -17, -17], [180, -180, -179.99]).tolist() == [fiji] * 3
    geometry = cells.table.geometry[fiji]
    assert geometry.covers(shapely.Point(179.95, -17))
    assert geometry.covers(shapely.Point(-179.95, -17))
    assert abs(abs(cells.table["lon"][fiji]) - 180) < 0.1
    assert cells.table["radius_km"][fiji] < 25


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_points_and_all_at_one_place(quarters, n):
    cells = build_geocells(np.full(n, 5.0), np.full(n, 5.0), geography=quarters)
    assert cells.table["num_panoramas"].tolist() == [n]
    assert shapely.area(cells.table.geometry.to_numpy()).sum() == pytest.approx(64_800)
    assert cells.table["radius_km"][0] < 1e-6
    apart = build_geocells([5.0, -5, 60][:n], [-100.0, 5, 100][:n], geography=quarters)
    assert apart.table["country"].tolist() == ["AA", "CC", "DD"][:n]
    assert apart.table["parent"].tolist() == apart.table["country"].tolist()


def test_a_place_claimed_twice_goes_to_the_majority():
    cells = Geocells.from_membership([1, 1, 1, 2, 3], [1, 1, 1, 2, 3], [5, 5, 9, 9, 9])
    assert sorted(cells.table["num_panoramas"]) == [2, 3]
    assert cells.assign(1, 1)[0] != cells.assign(2, 2)[0]


def test_ids_follow_country_admin1_position():
    names = AdminTable(
        np.array(["B", "A", "A", "A"], dtype=object), np.array(["x", "y", "x", "x"], dtype=object),
        np.array([""] * 4, dtype=object), np.zeros(4), np.zeros(4),
    )  # fmt: skip
    cells = Geocells.from_membership([0, 10, 30, 20], [0, 1, 2, 3], [4, 3, 2, 1], names)
    assert cells.table["lat"].round(6).tolist() == [20, 30, 10, 0]
    assert cells.table["admin1"].tolist() == ["x", "x", "y", "x"]


@pytest.mark.parametrize("method", ["admin", "kmeans"])
def test_real_points_bounds_partition_and_shuffled_rows(streetview, method):
    lat, lon = streetview[:5000].T
    cells = build_geocells(lat, lon, method=method)
    p = np.random.default_rng(1).permutation(5000)
    assert_same(cells, build_geocells(lat[p], lon[p], method=method))
    sizes = cells.table["num_panoramas"]
    assert sizes.sum() == 5000
    assert sizes.max() <= 60
    if method == "admin":
        small = cells.table[sizes < 30]["country"]
        assert (cells.table["country"].value_counts()[small] == 1).all()  # only whole countries are below the minimum
    else:
        assert sizes.min() >= 30
    rng = np.random.default_rng(2)
    q_lat, q_lon = np.degrees(np.arcsin(rng.uniform(-1, 1, 10_000))), rng.uniform(-180, 180, 10_000)
    polygons = cells.table.geometry.to_numpy()
    shapely.prepare(polygons)
    points = shapely.points(q_lon, q_lat)
    assert shapely.covers(polygons[cells.assign(q_lat, q_lon)], points).mean() >= 0.999
    hits = np.bincount(shapely.STRtree(points).query(polygons, predicate="covers")[1], minlength=10_000)
    assert (hits == 1).mean() > 0.9999  # disjoint and covering
    test_lat, test_lon = streetview[5000:].T
    centre = cells.table.iloc[cells.assign(test_lat, test_lon)]
    assert np.median(haversine_km(test_lat, test_lon, centre["lat"], centre["lon"])) < 260  # k-means, C=100: 237


def test_save_and_load(tmp_path, quarters):
    rng = np.random.default_rng(0)
    cells = build_geocells(
        rng.uniform(-80, 80, 300), rng.uniform(-180, 180, 300), geography=quarters, min_panoramas=5, max_panoramas=20
    )
    cells.save(tmp_path / "geocells")
    assert_same(Geocells.load(tmp_path / "geocells"), cells)
    assert gpd.read_parquet(tmp_path / "geocells/geocells.parquet").crs.to_epsg() == 4326
    with pytest.raises(FileNotFoundError, match=r"holds no geocells\.parquet"):
        Geocells.load(tmp_path)


def test_broken_tables_are_refused():
    good = Geocells.from_membership([0, 10, 20], [0, 10, 20], [0, 1, 2])
    with pytest.raises(ValueError, match="row numbers 0 to 2"):
        Geocells(good.table.iloc[::-1], good.anchors)
    with pytest.raises(ValueError, match=r"lack the columns \['radius_km'\]"):
        Geocells(good.table.drop(columns="radius_km"), good.anchors)
    with pytest.raises(ValueError, match="1 cells have no anchor, first cell_id 2"):
        Geocells(good.table, good.anchors[good.anchors["cell_id"] != 2])
    with pytest.raises(ValueError, match="name cells 1 to 3"):
        Geocells(good.table, good.anchors.assign(cell_id=good.anchors["cell_id"] + 1))
    with pytest.raises(ValueError, match="overlap"):
        Geocells(good.table.assign(geometry=shapely.buffer(good.table.geometry.to_numpy(), 1)), good.anchors)
    with pytest.raises(ValueError, match="outside the polygon"):
        Geocells(good.table, good.anchors.assign(lat=good.anchors["lat"].to_numpy()[::-1]))


def test_positions_that_are_none_are_refused():
    with pytest.raises(ValueError, match="not positions"):
        Geocells.from_membership([np.nan], [0], [0])
