"""Plans: the paper's districts checked ring by ring, land by area, towns by population, coverage block by block."""

from __future__ import annotations

import io
import itertools
import json

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from shapely.geometry import box

from hedwig.acquisition.plans import (
    equal_area_blocks,
    plan_coverage,
    plan_population,
    plan_regions,
    plan_world,
    read_points,
)
from hedwig.acquisition.regions import area_km2, make_regions, read_regions
from hedwig.geo import EARTH_RADIUS_KM, haversine_km
from hedwig.geocells import Geography
from hedwig.schema import SchemaError


@pytest.fixture(scope="module")
def geography():
    return Geography.default()


@pytest.fixture(scope="module")
def districts(shared):
    return shared / "data/boundaries/us_cd_117th.geojson"


def even_odd(rings, lat, lon):
    """Ray casting to the east over all rings of a shape, one point at a time."""
    inside = False
    for ring in rings:
        for (x1, y1), (x2, y2) in itertools.pairwise(ring):
            if (y1 > lat) != (y2 > lat) and lon < x1 + (lat - y1) / (y2 - y1) * (x2 - x1):
                inside = not inside
    return inside


def test_eighteen_places_lie_in_each_congressional_district(districts, geography):
    plan = plan_regions(read_regions(str(districts), "district"), 18, geography=geography, seed=0)
    table = plan.table
    assert len(table) == 435 * 18
    assert plan.shortfall == {}
    assert table.groupby("region").size().tolist() == [18] * 435
    assert table["plan_id"].is_unique
    assert (table["country"] == "US").mean() > 0.995  # a few at a border or a coast are nearer to a neighbour's polygon
    features = json.loads(districts.read_text())["features"]
    own = dict(tuple(table.groupby("region")))
    for feature in features:
        shape = feature["geometry"]
        parts = shape["coordinates"] if shape["type"] == "MultiPolygon" else [shape["coordinates"]]
        rings = [np.array(ring) for part in parts for ring in part]
        rows = own[feature["properties"]["district"]]
        # only the edges that a ray to the east can meet
        for lat, lon in zip(rows["lat"], rows["lon"], strict=True):
            near = [r for r in rings if r[:, 1].min() <= lat <= r[:, 1].max() and r[:, 0].max() >= lon]
            assert even_odd_fast(near, lat, lon), (feature["properties"], lat, lon)


def even_odd_fast(rings, lat, lon):
    crossings = 0
    for ring in rings:
        x1, y1, x2, y2 = *ring[:-1].T, *ring[1:].T
        cross = (y1 > lat) != (y2 > lat)
        at = x1[cross] + (lat - y1[cross]) / (y2[cross] - y1[cross]) * (x2[cross] - x1[cross])
        crossings += int((lon < at).sum())
    return crossings % 2 == 1


def test_the_two_ray_castings_agree():
    rng = np.random.default_rng(0)
    rings = [np.vstack([r := rng.uniform(0, 1, (7, 2)), r[:1]]) for _ in range(2)]
    points = rng.uniform(0, 1, (200, 2))
    assert [even_odd(rings, a, b) for a, b in points] == [even_odd_fast(rings, a, b) for a, b in points]


def test_shuffled_districts_give_the_same_bytes(districts, geography):
    frame = gpd.read_file(districts)
    shuffled = frame.sample(frac=1, random_state=3)
    plans = [plan_regions(make_regions(f, "district"), 5, geography=geography, min_distance_km=2.0, seed=4)
             for f in (frame, shuffled)]  # fmt: skip
    assert plans[0].csv() == plans[1].csv()
    lat, lon = plans[0].table["lat"].to_numpy(), plans[0].table["lon"].to_numpy()
    km = haversine_km(lat[:, None], lon[:, None], lat, lon)
    assert km[~np.eye(len(km), dtype=bool)].min() >= 2.0


def test_the_csv_reads_back_as_it_was(geography):
    regions = make_regions(gpd.GeoDataFrame({"n": ["a,b"]}, geometry=[box(9, 48, 10, 49)], crs="EPSG:4326"), "n")
    plan = plan_regions(regions, 30, geography=geography, seed=1)
    back = pd.read_csv(io.BytesIO(plan.csv()))
    assert list(back.columns) == ["plan_id", "lat", "lon", "region", "country", "admin1"]
    assert (back["lat"] == plan.table["lat"]).all()
    assert (back["plan_id"] == plan.table["plan_id"]).all()
    assert back["plan_id"].str.fullmatch("p[0-9a-f]{15}").all()
    assert back["region"].unique().tolist() == ["a,b"]
    assert set(plan.table["country"]) == {"DE"}


def test_world_follows_the_land_and_leaves_antarctica_out(geography):
    plan = plan_world(20_000, geography=geography, seed=2)
    shapes = geography.country_polygons()
    area = dict(zip(shapes["country"], map(area_km2, shapes.geometry), strict=True))
    land = sum(a for code, a in area.items() if code != "AQ")
    lat, lon = plan.table["lat"].to_numpy(), plan.table["lon"].to_numpy()
    for code in ("RU", "BR", "AU", "CD", "DE"):
        inside = shapely.contains_xy(shapes.geometry[shapes["country"] == code].iloc[0], lon, lat).sum()
        share = area[code] / land
        assert abs(inside - 20_000 * share) < 4 * np.sqrt(20_000 * share), code
    assert "AQ" not in set(plan.table["country"])
    assert (plan_world(50, geography=geography, countries=["AQ"]).table["lat"] < -60).all()


def test_world_reaches_both_sides_of_the_antimeridian_and_checks_countries(geography):
    fiji = plan_world(300, geography=geography, countries=["FJ"]).table
    assert set(fiji["country"]) == {"FJ"}
    assert fiji["lon"].min() < -178
    assert fiji["lon"].max() > 179
    with pytest.raises(ValueError, match=r"No country 'fr'.*Did you mean 'FR'"):
        plan_world(1, geography=geography, countries=["fr"])


def test_population_follows_the_power_of_the_population(geography):
    places = geography.places()
    places = places[(places["country"] == "KE") & (places["population"] > 0)]
    for alpha in (1.0, 0.0, 0.5):
        plan = plan_population(4000, geography=geography, countries=["KE"], alpha=alpha, radius_km=3, seed=7)
        weight = places["population"] ** alpha
        share = float(weight[places["name"] == "Nairobi"].sum() / weight.sum())
        got = (plan.table["place"] == "Nairobi").sum()
        assert abs(got - 4000 * share) < 4 * np.sqrt(4000 * share) + 1, alpha
    assert list(plan.table.columns) == ["plan_id", "lat", "lon", "region", "country", "admin1", "place", "population"]


def test_population_stays_near_its_place_and_on_land(geography):
    table = plan_population(500, geography=geography, countries=["MV", "MC"], radius_km=2, seed=7).table
    places = geography.places().groupby(["country", "name"])
    land = shapely.multipolygons([p for g in geography.country_polygons().geometry for p in shapely.get_parts(g)])
    assert shapely.contains_xy(land, table["lon"], table["lat"]).all()
    for row in table.head(100).itertuples():
        own = places.get_group((row.country, row.place))
        assert haversine_km(row.lat, row.lon, own["lat"], own["lon"]).min() <= 2.001


def test_blocks_have_equal_areas():
    rng = np.random.default_rng(0)
    lat, lon = np.degrees(np.arcsin(rng.uniform(-1, 1, 400_000))), rng.uniform(-180, 180, 400_000)
    counts = np.bincount(np.unique(equal_area_blocks(lat, lon, 1000.0), return_inverse=True)[1])
    num = 4 * np.pi * EARTH_RADIUS_KM**2 / 1000.0**2
    assert abs(len(counts) - num) < 0.03 * num
    assert counts.std() / counts.mean() < 0.08
    assert equal_area_blocks([90, -90, 0], [180, -180, 180], 50.0)[2] == equal_area_blocks([0], [-180], 50.0)[0]


def test_coverage_fills_blocks_in_turns(geography):
    rng = np.random.default_rng(1)
    city = pd.DataFrame({"lat": rng.uniform(48.70, 48.90, 5000), "lon": rng.uniform(9.1, 9.3, 5000)})
    village = pd.DataFrame({"lat": [50.01, 50.02, 50.03], "lon": [12.01, 12.02, 12.03]})
    lonely = pd.DataFrame({"lat": [-33.0], "lon": [151.0]})
    points = pd.concat([city, village, lonely, village])
    blocks = equal_area_blocks(points["lat"], points["lon"], 100.0)
    sizes = pd.Series(blocks).groupby(blocks).size()
    plan = plan_coverage(points, 9, geography=geography, block_km=100.0, seed=0)
    assert plan.details["num_unique"] == 5004
    taken = plan.table.groupby("block").size()
    assert len(taken) == len(sizes)
    assert int(taken.sum()) == 9
    small = {b: n for b, n in taken.items() if sizes[b] < 10}
    assert sorted(small.values()) == [1, 3]  # all of the village once it is its turn, the lonely one at once
    shuffled = points.sample(frac=1, random_state=0)
    assert plan_coverage(shuffled, 9, geography=geography, block_km=100.0, seed=0).csv() == plan.csv()
    assert plan_coverage(points, 9, geography=geography, block_km=100.0, seed=1).csv() != plan.csv()


def test_coverage_keeps_apart_and_tells_what_is_lacking(geography):
    lat = np.linspace(40.0, 40.1, 1001)
    points = pd.DataFrame({"lat": lat, "lon": np.full(1001, -3.0)})
    plan = plan_coverage(points, 500, geography=geography, block_km=50.0, min_distance_km=1.0)
    found = np.sort(plan.table["lat"].to_numpy())
    assert (haversine_km(found[:-1], -3.0, found[1:], -3.0) >= 1.0).all()
    assert 6 <= len(found) <= 12
    assert plan.shortfall == {"coverage": 500 - len(found)}


def test_points_are_read_in_all_their_forms(tmp_path, geography):
    lat, lon = [48.1, 52.5, 41.9, 40.4, 59.3], [11.6, 13.4, 12.5, -3.7, 18.1]
    table = pd.DataFrame({"id": range(5), "Latitude": lat, "LNG": lon})
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("\n".join(f"{a}, {b}" for a, b in zip(lat, lon, strict=True)))
    (tmp_path / "d.tsv").write_text("lat\tlon\n" + "\n".join(f"{a}\t{b}" for a, b in zip(lat, lon, strict=True)))
    for name in ("a.csv", "b.parquet", "c.txt", "d.tsv"):
        points, bad = read_points(str(tmp_path / name), geography)
        assert (points["lat"].tolist(), points["lon"].tolist(), bad) == (lat, lon, 0)
    (tmp_path / "e.csv").write_text("lat,lon\n48.1,11.6\nx,3\n95,7\n0,0\n52.5,13.4\n,\n")
    points, bad = read_points(str(tmp_path / "e.csv"), geography)
    assert (points["lat"].tolist(), bad) == ([48.1, 52.5], 4)


def test_swapped_or_nameless_points_are_refused(tmp_path, geography):
    pd.DataFrame({"lat": np.linspace(-120, -75, 30), "lon": np.full(30, 40.0)}).to_csv(tmp_path / "s.csv", index=False)
    with pytest.raises(ValueError, match="look swapped"):
        read_points(str(tmp_path / "s.csv"), geography)
    (tmp_path / "n.csv").write_text("north,east\n1,2\n")
    with pytest.raises(SchemaError, match="lacks the column"):
        read_points(str(tmp_path / "n.csv"), geography)
    with pytest.raises(FileNotFoundError):
        read_points(str(tmp_path / "none.csv"), geography)


def test_population_without_a_radius_takes_each_place_once(geography):
    plan = plan_population(400, geography=geography, countries=["MC"], radius_km=0)
    assert plan.table["plan_id"].is_unique
    assert 0 < len(plan.table) < 400
    assert plan.shortfall == {"population": 400 - len(plan.table)}


def test_population_of_a_country_stays_in_it(geography):
    table = plan_population(1000, geography=geography, countries=["BE"], radius_km=30).table
    shapes = geography.country_polygons()
    belgium = shapes.geometry[shapes["country"] == "BE"].iloc[0]
    assert len(table) > 900
    assert shapely.contains_xy(belgium, table["lon"], table["lat"]).all()
    # An overseas department, whose land is in the polygon of France.
    assert set(plan_population(20, geography=geography, countries=["RE"]).table["country"]) == {"RE"}
