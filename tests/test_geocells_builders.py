"""Every builder behind one function: the same table, bounds, bytes for any order of rows; and at full size (slow)."""

from __future__ import annotations

import time

import geopandas as gpd
import numpy as np
import pytest
import shapely

from hedwig.geocells import METHODS, Geography, build_geocells, measure

BOUNDS = {"admin": (30, 60), "kmeans": (30, 60), "quadtree": (1, 99), "quadtree-adaptive": (20, 99), "h3": (20, 200)}


@pytest.fixture(scope="module")
def quarters():
    """A geography of four countries, one a quarter of the globe."""
    boxes = [shapely.box(-180 + 90 * i, -90, -90 + 90 * i, 90) for i in range(4)]
    return Geography.from_polygons(gpd.GeoDataFrame({"iso_a2": ["AA", "BB", "CC", "DD"]}, geometry=boxes, crs=4326))


def towns(num=1500):
    rng = np.random.default_rng(0)
    middle = np.stack([rng.uniform(-50, 60, 12), rng.uniform(-180, 180, 12)], axis=1)
    points = middle[rng.integers(0, 12, num)] + rng.normal(0, [2, 4], (num, 2))
    points[-20:] = points[:20]  # some places have two panoramas
    return points


@pytest.mark.parametrize("method", METHODS)
def test_same_table_for_any_order_of_rows(tmp_path, quarters, method):
    points = towns()
    low, high = BOUNDS[method]
    order = np.random.default_rng(1).permutation(len(points))
    for name, rows in (("a", points), ("b", points[order]), ("c", points)):
        cells = build_geocells(*rows.T, method=method, min_panoramas=low, max_panoramas=high, geography=quarters)
        cells.save(tmp_path / name)
    for file in ("geocells.parquet", "anchors.parquet"):
        read = {(tmp_path / name / file).read_bytes() for name in "abc"}
        assert len(read) == 1
    told = measure(cells, *points.T, quarters.lookup(*points.T))
    assert (told["uncovered"], told["overlaps"], told["num_points"]) == (0, 0, 1500)
    assert told["max_size"] <= high
    if method in ("admin", "kmeans"):
        assert told["min_size"] >= low
    assert shapely.area(cells.table.geometry.to_numpy()).sum() == pytest.approx(64_800)
    assert [level.column for level in cells.hierarchy()] == ["parent_1", "parent_2"]
    assert told["border_purity"] == 1.0 if method == "admin" else told["border_purity"] > 0.9


def test_kmeans_bounds_hold_with_panoramas_at_one_place(quarters):
    points = np.repeat(towns(300), 4, axis=0)
    cells = build_geocells(*points.T, method="kmeans", min_panoramas=20, max_panoramas=40, geography=quarters)
    sizes = cells.table["num_panoramas"]
    assert (sizes.min(), sizes.max(), len(sizes)) >= (20, 20, 40)
    assert sizes.max() <= 40


def test_a_crowded_place_is_a_cell_of_its_own(quarters):
    points = np.concatenate([towns(200), np.tile([[10.0, 10.0]], (90, 1))])
    cells = build_geocells(*points.T, method="kmeans", min_panoramas=10, max_panoramas=40, geography=quarters)
    assert sorted(cells.table["num_panoramas"])[-1] == 90
    assert sorted(cells.table["num_panoramas"])[-2] <= 40


def test_what_is_refused(quarters):
    with pytest.raises(ValueError, match="Unknown method 's2'; use one of admin, kmeans, quadtree"):
        build_geocells([0], [0], method="s2")
    with pytest.raises(ValueError, match="num_cells=5 does nothing with method 'h3'"):
        build_geocells([0], [0], method="h3", num_cells=5)
    with pytest.raises(ValueError, match="no panoramas"):
        build_geocells([], [])
    with pytest.raises(ValueError, match="cannot fill 1 cells"):
        build_geocells([0, 1], [0, 1], method="kmeans", geography=quarters)


def streetview(shared, num):
    points = np.loadtxt(shared / "data/streetview_points/sv_points_latlong_collected.txt", delimiter=",")
    rng = np.random.default_rng(0)
    if num <= len(points):
        return points[rng.choice(len(points), num, replace=False)]
    return points[rng.choice(len(points), num)] + rng.normal(0, 0.02, (num, 2))


@pytest.mark.slow
def test_a_hundred_thousand_real_points_take_less_than_a_minute(shared):
    points = streetview(shared, 100_000)
    Geography.default().lookup(0, 0)
    for method, low, high, num_cells, expected_km in (
        ("admin", 30, 60, None, (20, 38)), ("kmeans", 25, 100, 2000, (20, 38)), ("kmeans", 0, 10**6, 100, (180, 260)),
        ("h3", 30, 300, None, (20, 70)), ("quadtree", 1, 999, None, (50, 200)),
    ):  # fmt: skip
        started = time.process_time()
        cells = build_geocells(
            *points.T, method=method, min_panoramas=low, max_panoramas=high, num_cells=num_cells
        )  # fmt: skip
        assert time.process_time() - started < 60, method
        told = measure(cells, *points.T, Geography.default().lookup(*points.T))
        assert told["max_size"] <= high
        assert expected_km[0] < told["oracle_median_km"] < expected_km[1], method
        if method == "kmeans":
            assert told["min_size"] >= low
            assert told["num_cells"] == num_cells


@pytest.mark.slow
def test_a_million_points_take_less_than_ten_minutes_and_any_order(tmp_path, shared):
    points = streetview(shared, 1_000_000)
    for name, rows in (("a", points), ("b", points[np.random.default_rng(1).permutation(len(points))])):
        started = time.process_time()
        cells = build_geocells(*rows.T, min_panoramas=1000, max_panoramas=2000)
        assert time.process_time() - started < 600
        cells.save(tmp_path / name)
    assert cells.table["num_panoramas"].sum() == 1_000_000
    assert cells.table["num_panoramas"].max() <= 2000
    for file in ("geocells.parquet", "anchors.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
