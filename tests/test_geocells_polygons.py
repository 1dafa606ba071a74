"""Polygon files: codes of two and three letters, the columns of the usual sources, remote files, what is refused."""

from __future__ import annotations

import geopandas as gpd
import pytest
import shapely

from hedwig.geocells import Geography, polygons
from hedwig.geocells.polygons import alpha2, read_polygons


def frame(**columns):
    shapes = [shapely.box(0, 0, 10, 10), shapely.box(10, 0, 20, 10), shapely.box(20, 0, 30, 10)]
    return gpd.GeoDataFrame(columns, geometry=shapes[: len(next(iter(columns.values())))], crs="EPSG:4326")


@pytest.mark.parametrize(
    ("code", "expected"),
    [("FR", "FR"), ("FRA", "FR"), (" REU ", "RE"), ("XKX", "XK"), ("-99", ""), ("101", ""), ("France", ""), (None, "")],
)
def test_codes(code, expected):
    assert alpha2(code) == expected


def test_every_three_letter_code_is_its_own():
    table = polygons._TO_ALPHA2
    assert len(table) == len(set(table.values())) == 250
    assert (table["AUT"], table["AUS"], table["IRL"], table["IRQ"], table["CHE"], table["CHN"]) == (
        "AT", "AU", "IE", "IQ", "CH", "CN",
    )  # fmt: skip


def test_the_codes_agree_with_natural_earth(shared):
    known = gpd.read_file(shared / "data/boundaries/admin0_natural_earth_10m.geojson", ignore_geometry=True)
    pairs = [(a3, a2) for a3, a2 in zip(known["iso_a3"], known["iso_a2"], strict=True) if alpha2(a2) and alpha2(a3)]
    assert len(pairs) > 230
    assert [pair for pair in pairs if alpha2(pair[0]) != pair[1]] == []


def test_a_path_is_enough_for_the_usual_sources():
    boundaries = frame(shapeGroup=["DEU", "FRA", "117"], shapeName=["Germany", "France", "disputed"])
    areas = frame(shapeGroup=["DEU", "FRA"], shapeName=["Bayern", "Bretagne"])
    found = Geography.from_polygons(boundaries, areas, areas).lookup([5, 5, 5], [5, 15, 21])
    assert found.country.tolist() == ["DE", "FR", "FR"]
    assert found.admin1.tolist() == ["Bayern", "Bretagne", ""]
    assert found.off_polygon_km.round().tolist() == [0, 0, 111]  # the disputed area has no code: the nearest country
    gadm = frame(GID_0=["DEU", "FRA"], NAME_1=["x", "y"], NAME_2=["p", "q"])
    assert Geography.from_polygons(gadm, gadm, gadm).lookup(5, 15).admin2.tolist() == ["q"]
    natural_earth = frame(ISO_A2=["-99", "NO"], ISO_A2_EH=["FR", "NO"])
    assert Geography.from_polygons(natural_earth).lookup([5, 5], [5, 15]).country.tolist() == ["FR", "NO"]


@pytest.mark.parametrize("name", ["a.geojson", "a.gpkg", "a.parquet", "a.shp"])
def test_object_storage(tmp_path, monkeypatch, name):
    made = frame(iso_a2=["DE", "FR"])
    made.to_parquet(tmp_path / name) if name.endswith("parquet") else made.to_file(tmp_path / name)
    monkeypatch.setattr(polygons.storage, "exists", lambda path: path == f"s3://bucket/maps/{name}")
    files = [f"s3://bucket/maps/{path.name}" for path in tmp_path.iterdir()]
    monkeypatch.setattr(polygons.storage, "list_files", lambda folder: files)
    monkeypatch.setattr(polygons.storage, "read_bytes", lambda uri: (tmp_path / uri.rsplit("/", 1)[1]).read_bytes())
    names, shapes = read_polygons(f"s3://bucket/maps/{name}", "iso_a2")
    assert names.tolist() == ["DE", "FR"]
    assert shapely.area(shapes).tolist() == [100, 100]


def test_what_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No polygons at"):
        read_polygons(str(tmp_path / "none.gpkg"), "name")
    (tmp_path / "a.geojson").write_text("no json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_polygons(str(tmp_path / "a.geojson"), "name")
    with pytest.raises(ValueError, match="no polygons"):
        read_polygons(frame(name=["a"]).set_geometry([shapely.Point(0, 0)]), "name")
