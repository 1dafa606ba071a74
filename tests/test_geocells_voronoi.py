"""The Voronoi partition: equal to the nearest anchor, disjoint, covering, valid; at poles, seam and in odd sets."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from hedwig.geo import haversine_km, unit_vectors
from hedwig.geocells.voronoi import sphere_delaunay, voronoi_polygons

GLOBE = 360 * 180


def globe_points(n, seed=1):
    rng = np.random.default_rng(seed)
    return np.degrees(np.arcsin(rng.uniform(-1, 1, n))), rng.uniform(-180, 180, n)


def nearest_by_haversine(lat, lon, anchor_lat, anchor_lon):
    return np.argmin(haversine_km(lat[:, None], lon[:, None], anchor_lat[None], anchor_lon[None]), axis=1)


def assert_partition(lat, lon, labels, n=2000, share=0.999):
    lat, lon, labels = np.asarray(lat, float), np.asarray(lon, float), np.asarray(labels)
    names, polygons = voronoi_polygons(lat, lon, labels)
    assert names.tolist() == sorted(set(labels.tolist()))
    assert shapely.is_valid(polygons).all()
    assert not shapely.is_empty(polygons).any()
    assert shapely.area(polygons).sum() == pytest.approx(GLOBE, rel=1e-9)
    assert shapely.area(shapely.union_all(polygons)) == pytest.approx(GLOBE, rel=1e-9)
    assert shapely.total_bounds(polygons).tolist() == [-180, -90, 180, 90]
    shapely.prepare(polygons)
    q_lat, q_lon = globe_points(n)
    truth = labels[nearest_by_haversine(q_lat, q_lon, lat, lon)]
    covered = shapely.covers(polygons[np.searchsorted(names, truth)], shapely.points(q_lon, q_lat))
    assert covered.mean() >= share
    own = polygons[np.searchsorted(names, labels)]
    assert shapely.distance(own, shapely.points(lon, lat)).max() < 1e-6  # degrees: 0.1 m


def test_random_anchors_with_grouped_labels():
    lat, lon = globe_points(600, seed=2)
    centres = globe_points(60, seed=3)
    assert_partition(lat, lon, nearest_by_haversine(lat, lon, *centres), n=10_000)


@pytest.mark.parametrize(
    ("lat", "lon"),
    [
        ([5], [6]),
        ([5, 6], [6, 7]),
        ([90, -90], [0, 0]),
        ([0, 0], [0, 180]),
        ([0, 1, 2], [0, 5, 1]),
        ([80, 80, 80], [0, 120, -120]),
        ([0, 0, 0, 0], [0, 90, 180, -90]),
        ([0, 0, 0, 0, 90, -90], [0, 90, 180, -90, 0, 0]),
        ([35.26] * 4 + [-35.26] * 4, [0, 90, 180, -90] * 2),
        ([35.26] * 4 + [-35.26] * 4, [45, 135, -135, -45] * 2),
        ([10, 10, -10, -10], [179, -179, 179, -179]),
        ([89.999999, 89.9999, 89.99, -89.9999, -89.99999], [0, 90, -160, 10, -30]),
        ([48, 48, -30, 0], [9, 9.00001, 100, -80]),
    ],
    ids=[
        "one", "two", "poles", "antipodes", "three", "three-round-pole", "four-on-equator", "octahedron",
        "cube-on-the-seam", "cube", "seam-corners", "near-poles", "one-metre-apart",
    ],
)  # fmt: skip
def test_few_and_symmetric_anchors(lat, lon):
    assert_partition(lat, lon, np.arange(len(lat)))


@pytest.mark.parametrize("axis", ["equator", "parallel", "meridian", "grid"])
def test_cocircular_anchors(axis):
    turn = np.linspace(-170, 170, 40)
    if axis == "grid":
        lat, lon = (a.ravel() for a in np.meshgrid(np.arange(-80, 81, 20.0), np.arange(-180, 180, 30.0)))
    elif axis == "meridian":
        lat, lon = np.linspace(-80, 80, 40), np.full(40, 10.0)
    else:
        lat, lon = np.full(40, 0.0 if axis == "equator" else 30.0), turn
    assert_partition(lat, lon, np.arange(len(lat)))


@pytest.mark.parametrize("spread_deg", [1e-1, 1e-4, 1e-6])
def test_dense_clusters_beside_scattered_anchors(spread_deg):
    rng = np.random.default_rng(0)
    lat = np.r_[48 + rng.normal(0, spread_deg, 200), rng.uniform(-80, 80, 100)]
    lon = np.r_[9 + rng.normal(0, spread_deg, 200), rng.uniform(-180, 180, 100)]
    assert_partition(lat, lon, rng.integers(0, 5, 300))


def test_edges_follow_great_circles():
    # the border of these two is perpendicular to the meridian 0 at lat 60; as a great circle it falls away from there
    _, polygons = voronoi_polygons([50, 70], [0, 0], [0, 1])
    border = shapely.get_coordinates(shapely.boundary(polygons[1]))
    border = border[(border[:, 1] < 89) & (np.abs(border[:, 0]) < 179)]
    to_south = haversine_km(border[:, 1], border[:, 0], 50, 0)
    to_north = haversine_km(border[:, 1], border[:, 0], 70, 0)
    assert len(border) > 100
    np.testing.assert_allclose(to_south, to_north, atol=1e-6)
    assert border[:, 1].min() < -59


def test_delaunay_has_no_anchor_inside_a_circumcircle():
    lat, lon = globe_points(80, seed=5)
    vectors = unit_vectors(lat, lon)
    triangles = sphere_delaunay(vectors)
    assert len(triangles) == 2 * 80 - 4
    a, b, c = (vectors[triangles[:, i]] for i in range(3))
    normal = np.cross(b - a, c - a)
    height = (normal * a).sum(axis=1)
    assert ((vectors @ normal.T) <= height + 1e-12).all()  # every triangle is a facet of the convex hull, turned out


def test_refuses_no_anchors_and_doubles():
    with pytest.raises(ValueError, match="at least one anchor"):
        voronoi_polygons([], [], [])
    with pytest.raises(ValueError, match="3 anchors lie at 2 places"):
        voronoi_polygons([1, 1, 2], [3, 3, 4], [0, 1, 2])
