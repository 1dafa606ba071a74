"""Offline geography: known places, poles and antimeridian, territories, user polygons, agreement on real points."""

from __future__ import annotations

import time

import geopandas as gpd
import numpy as np
import pytest
import shapely

from hedwig.geo import haversine_km, unit_vectors
from hedwig.geocells.geography import AdminTable, Geography


@pytest.fixture(scope="module")
def default():
    return Geography.default()


@pytest.fixture(scope="module")
def streetview(shared):
    points = np.loadtxt(shared / "data/streetview_points/sv_points_latlong_collected.txt", delimiter=",")
    return points[np.random.default_rng(0).choice(len(points), 20_000, replace=False)]


@pytest.mark.parametrize(
    ("lat", "lon", "country", "admin1", "admin2"),
    [
        (48.8566, 2.3522, "FR", "Île-de-France", "Paris"),
        (-22.56, 17.08, "NA", "Khomas Region", "Windhoek"),  # not a missing value
        (-17.0, -179.99, "FJ", "Northern", "Labasa"),  # a search in degrees answers Tubou or another country
        (-17.0, 180.01, "FJ", "Northern", "Labasa"),
        (37.76, -122.45, "US", "California", "City and County of San Francisco"),
        (4.92, -52.3, "GF", "Guyane", "Guyane"),  # the polygon is France's, the nearest French place far away
        (34.6, 32.98, "CY", "Larnaka", "Kolossi"),  # a base without an ISO code
    ],
)
def test_known_points(default, lat, lon, country, admin1, admin2):
    found = default.lookup(lat, lon)
    assert (found.country[0], found.admin1[0], found.admin2[0]) == (country, admin1, admin2)


def test_poles_ships_and_antarctica_have_a_country_and_a_finite_distance(default):
    found = default.lookup([90, -90, 30, -75], [0, 0, -40, 100])
    assert found.country.tolist() == ["GL", "AQ", "PT", "AQ"]
    assert found.place_km[1] < 1e-6
    assert 1300 < found.place_km[2] < 1350
    assert np.isfinite(found.place_km).all()


def test_the_place_is_the_nearest_of_the_country(default):
    rng = np.random.default_rng(0)
    lat, lon = rng.uniform(42, 55, 30), rng.uniform(0, 20, 30)
    found, places = default.lookup(lat, lon), default.places()
    for i in range(30):
        own = places[places["country"] == found.country[i]]
        km = haversine_km(lat[i], lon[i], own["lat"], own["lon"])
        assert found.place_km[i] == pytest.approx(km.min(), abs=1e-6)
        assert found.admin1[i] == own["admin1"].iloc[int(km.argmin())]


def test_twenty_thousand_points_take_seconds(default, streetview):
    start = time.perf_counter()
    found = default.lookup(*streetview.T)
    assert time.perf_counter() - start < 20  # 0.4 s alone on a core
    assert len(np.unique(found.country.astype(str))) > 100
    assert np.median(found.place_km) < 10


def test_default_and_natural_earth_files_agree_on_real_points(default, streetview, shared):
    folder = shared / "data/boundaries"
    own = Geography.from_polygons(
        folder / "admin0_natural_earth_10m.geojson", folder / "admin1_natural_earth_10m.geojson"
    )
    lat, lon = streetview[:1000].T
    ours, theirs = default.lookup(lat, lon), own.lookup(lat, lon)
    assert (ours.country == theirs.country).mean() >= 0.95
    assert (theirs.admin1 != "").mean() > 0.99
    assert (theirs.place_km > 0).mean() < 0.06  # 3.1 % of the points lie off every polygon
    assert np.percentile(theirs.place_km, 99) < 20
    np.testing.assert_array_equal(theirs.off_polygon_km, theirs.place_km)
    assert 0.01 < (ours.off_polygon_km > 0).mean() < 0.06
    assert np.percentile(ours.off_polygon_km, 99) < 20


def squares():
    return gpd.GeoDataFrame(
        {"code": ["AA", "BB", "-99"], "label": ["one", "two", "three"]},
        geometry=[shapely.box(170, -5, 180, 5), shapely.box(0, 0, 10, 10), shapely.box(10, 0, 20, 10)],
        crs="EPSG:4326",
    )


def test_own_polygons_nearest_across_the_antimeridian_and_without_codes():
    own = Geography.from_polygons(squares(), admin1=squares(), country_column="code", admin1_column="label")
    found = own.lookup([0, 0, 5, 5], [175, -179, 5, 15])
    assert found.country.tolist() == ["AA", "AA", "BB", "BB"]
    np.testing.assert_allclose(found.place_km, [0, 111.2, 0, 553.9], atol=1)
    assert found.admin1.tolist() == ["one", "", "two", "three"]  # nothing beyond 50 km in the finer layers
    assert found.admin2.tolist() == ["", "", "", ""]


@pytest.mark.parametrize("name", ["a.geojson", "a.gpkg", "a.parquet", "a.shp"])
def test_reads_every_format(tmp_path, name):
    path = tmp_path / name
    squares().to_parquet(path) if name.endswith("parquet") else squares().to_file(path)
    assert Geography.from_polygons(path, country_column="code").lookup(5, 5).country.tolist() == ["BB"]


def test_a_projected_file_is_turned_into_degrees(tmp_path):
    squares().to_crs("EPSG:3857").to_file(tmp_path / "a.gpkg")
    assert Geography.from_polygons(tmp_path / "a.gpkg", country_column="code").lookup(9, 9).country[0] == "BB"


def test_errors_name_the_columns_and_the_rows(default):
    with pytest.raises(ValueError, match=r"no column named one of .*'iso_a2'.*; they have \['code', 'label'\]"):
        Geography.from_polygons(squares())
    with pytest.raises(ValueError, match="No value of column 'label' is an ISO"):
        Geography.from_polygons(squares(), country_column="label")
    with pytest.raises(ValueError, match=r"1 of 2 points are not positions, first row 1: lat=120"):
        default.lookup([1, 120], [2, 30])
    with pytest.raises(ValueError, match="1 of 1 points"):
        default.lookup(np.nan, 0)
    with pytest.raises(ValueError, match="no places"):
        Geography.from_polygons(squares(), country_column="code").places()
    with pytest.raises(ValueError, match=r"lengths \[1, 2\]"):
        AdminTable(np.array(["A"]), np.array(["A"]), np.array(["A"]), np.zeros(2), np.zeros(1))


def test_country_polygons_and_map_outlines(default):
    countries = default.country_polygons()
    assert countries["country"].is_unique
    assert {"FR", "NO", "TW", "XK", "NA"} <= set(countries["country"])
    assert countries.geometry.is_valid.all()
    rings = default.land_rings(0.5)
    assert 100 < len(rings) < 2000
    assert sum(map(len, rings)) < 20_000
    assert all((np.abs(ring[:, 0]) <= 90).all() and (ring[0] == ring[-1]).all() for ring in rings)
    assert max(np.abs(ring[:, 1]).max() for ring in rings) == 180


def test_places_are_positions_of_inhabited_places(default):
    places = default.places()
    assert len(places) > 150_000
    assert {"lat", "lon", "country", "admin1", "population", "name"} <= set(places.columns)
    assert not places.isna().any().any()
    tokyo = places[places["name"] == "Tokyo"].sort_values("population").iloc[-1]
    assert haversine_km(tokyo["lat"], tokyo["lon"], 35.68, 139.69) < 10
    assert np.allclose(np.linalg.norm(unit_vectors(places["lat"], places["lon"]), axis=1), 1)
