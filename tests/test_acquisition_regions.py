"""Regions: every format and CRS gives the same shapes; what is broken is repaired and counted; areas on the sphere."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest
import shapely
from shapely.geometry import Polygon, box

from hedwig import storage
from hedwig.acquisition.regions import area_km2, make_regions, read_regions
from hedwig.geo import EARTH_RADIUS_KM
from hedwig.schema import SchemaError


def frame(shapes, names, crs="EPSG:4326"):
    return gpd.GeoDataFrame({"name": names}, geometry=list(shapes), crs=crs)


def slow_area_km2(polygon, step=0.01):
    """Sum of small cells whose middle is inside, each with the cosine of its latitude."""
    west, south, east, north = polygon.bounds
    lon, lat = np.meshgrid(np.arange(west + step / 2, east, step), np.arange(south + step / 2, north, step))
    inside = shapely.contains_xy(polygon, lon, lat)
    return float(np.cos(np.radians(lat[inside])).sum() * np.radians(step) ** 2 * EARTH_RADIUS_KM**2)


def test_area_of_the_globe_of_a_box_and_of_a_slanted_shape_with_a_hole():
    assert area_km2(box(-180, -90, 180, 90)) == pytest.approx(4 * np.pi * EARTH_RADIUS_KM**2)
    expected = np.radians(10) * (np.sin(np.radians(70)) - np.sin(np.radians(40))) * EARTH_RADIUS_KM**2
    assert area_km2(box(5, 40, 15, 70)) == pytest.approx(expected)
    slanted = Polygon([(0, 50), (6, 52), (5, 58), (1, 60)], [[(2, 53), (3, 56), (4, 54)]])
    assert area_km2(slanted) == pytest.approx(slow_area_km2(slanted), rel=2e-3)
    assert area_km2(shapely.reverse(slanted)) == pytest.approx(area_km2(slanted))
    assert area_km2(shapely.multipolygons([slanted, box(20, 0, 21, 1)])) == pytest.approx(
        area_km2(slanted) + area_km2(box(20, 0, 21, 1))
    )


@pytest.mark.parametrize("ending", ["geojson", "gpkg", "parquet", "shp", "zip"])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857"])
def test_every_format_and_crs_gives_the_same_regions(tmp_path, ending, crs):
    if ending == "geojson" and crs != "EPSG:4326":
        pytest.skip("GeoJSON is always in degrees")
    shapes = [box(10, 50, 11, 51), Polygon([(20, -5), (22, -5), (21, 3)])]
    table = frame(shapes, ["b", "a"]).to_crs(crs)
    path = tmp_path / f"r.{ending}"
    if ending == "parquet":
        table.to_parquet(path)
    elif ending == "zip":
        table.to_file(tmp_path / "r.shz", driver="ESRI Shapefile")
        (tmp_path / "r.shz").rename(path)
    else:
        table.to_file(path)
    regions = read_regions(str(path), "name")
    assert regions.ids.tolist() == ["a", "b"]
    for got, expected in zip(regions.geometry, reversed(shapes), strict=True):
        assert shapely.symmetric_difference(got, expected).area < 1e-6
    assert len(regions.sha256) == 64
    assert regions.record()["num_rows"] == 2


def test_the_digest_of_a_shapefile_covers_its_attributes(tmp_path):
    frame([box(0, 0, 1, 1)], ["a"]).to_file(tmp_path / "r.shp")
    before = read_regions(str(tmp_path / "r.shp"), "name").sha256
    frame([box(0, 0, 1, 1)], ["b"]).to_file(tmp_path / "r.shp")
    assert read_regions(str(tmp_path / "r.shp"), "name").sha256 != before


def test_a_remote_shapefile_is_fetched_with_its_sidecars(tmp_path, monkeypatch):
    frame([box(0, 0, 1, 1)], ["a"]).to_file(tmp_path / "r.shp")
    (tmp_path / "r.txt").write_text("not needed")
    fetched = []

    def read(uri):
        fetched.append(uri)
        return (tmp_path / uri.rsplit("/", 1)[1]).read_bytes()

    monkeypatch.setattr(storage, "exists", lambda path: True)
    monkeypatch.setattr(storage, "read_bytes", read)
    monkeypatch.setattr(storage, "list_files", lambda folder: [f"{folder}/{p.name}" for p in tmp_path.iterdir()])
    regions = read_regions("s3://bucket/deep/r.shp", "name")
    assert regions.ids.tolist() == ["a"]
    assert sorted(u.rsplit(".", 1)[1] for u in fetched) == ["cpg", "dbf", "prj", "shp", "shx"]


def test_invalid_shapes_are_repaired_and_counted_and_ids_dissolve():
    bow_tie = Polygon([(0, 0), (2, 2), (2, 0), (0, 2)])
    regions = make_regions(
        frame([bow_tie, box(5, 0, 6, 1), box(6, 0, 7, 1), box(9, 9, 10, 10), shapely.Point(0, 0)],
              ["x", "y", "y", None, "z"]), "name",
    )  # fmt: skip
    assert regions.ids.tolist() == ["x", "y"]
    assert regions.geometry[0].area == pytest.approx(2.0)
    assert regions.geometry[1].equals(box(5, 0, 7, 1))
    counts = (regions.num_rows, regions.num_repaired, regions.num_dissolved, regions.num_left_out, regions.num_cut)
    assert counts == (5, 1, 1, 2, 0)
    assert all(shapely.is_valid(s) for s in regions.geometry)


def test_whole_numbers_are_ids_without_a_point():
    assert make_regions(frame([box(0, 0, 1, 1), box(1, 0, 2, 1)], [7.0, np.nan]), "name").ids.tolist() == ["7"]


def test_errors_name_the_column_the_bounds_and_the_file(tmp_path):
    table = gpd.GeoDataFrame({"district": ["a"]}, geometry=[box(0, 0, 1, 1)], crs="EPSG:4326")
    with pytest.raises(SchemaError, match=r"distrikt.*Did you mean 'district'"):
        make_regions(table, "distrikt")
    with pytest.raises(ValueError, match="no CRS"):
        make_regions(frame([box(0, 0, 9000, 9000)], ["a"], crs=None), "name")
    with pytest.raises(ValueError, match="no area"):
        make_regions(frame([shapely.Point(0, 0)], ["a"]), "name")
    with pytest.raises(FileNotFoundError, match=r"nothing\.geojson"):
        read_regions(str(tmp_path / "nothing.geojson"), "name")
    (tmp_path / "broken.geojson").write_text("no json")
    with pytest.raises(ValueError, match=r"broken\.geojson cannot be read"):
        read_regions(str(tmp_path / "broken.geojson"), "name")


def test_shapes_across_the_antimeridian_are_cut_there():
    uncut = Polygon(
        [(178, -20), (-178, -20), (-178, -15), (178, -15)], [[(179, -18), (-179, -18), (-179, -17), (179, -17)]]
    )
    beyond = box(175, 60, 190, 70)
    whole = box(-180, -60, 180, 70)  # the flat map's own frame, not a crossing
    regions = make_regions(frame([uncut, beyond, whole], ["a", "b", "c"]), "name")
    assert regions.num_cut == 2
    assert all(s.bounds[0] >= -180 and s.bounds[2] <= 180 for s in regions.geometry)
    assert area_km2(regions.geometry[0]) == pytest.approx(area_km2(box(0, -20, 4, -15)) - area_km2(box(0, -18, 2, -17)))
    assert shapely.contains_xy(regions.geometry[0], [179.5, -179.5, 179.9, 0], [-19, -16, -17.5, -17]).tolist() == [
        True, True, False, False,
    ]  # fmt: skip
    assert area_km2(regions.geometry[1]) == pytest.approx(area_km2(box(0, 60, 15, 70)))
    assert regions.geometry[2].equals(whole)


def test_a_ring_around_the_pole_is_refused():
    ring = Polygon([(0, 70), (120, 70), (-120, 70)])
    with pytest.raises(ValueError, match="'arctic' winds around a pole"):
        make_regions(frame([Polygon([(0, 70), (100, 70), (170, 70), (-100, 70)]), ring], ["arctic", "b"]), "name")


def test_a_point_of_the_antimeridian_written_twice_is_a_crossing_and_the_frame_stays():
    """Rings with vertices at exactly ±180 are two shapes; the smaller is meant, and not the 355 degrees beside it."""
    both = [(177, -16), (180, -16), (-180, -16), (-178, -16), (-178, -18), (-180, -18), (180, -18), (177, -18)]
    once = [(177, -16), (180, -16), (-180, -16), (-178, -16), (-178, -18), (177, -18)]
    band = [(-180, -10), (180, -10), (180, 10), (-180, 10)]  # all around: as a crossing it would have no area
    antarctica = [(-180, -85), (0, -70), (180, -85), (180, -90), (-180, -90)]
    regions = make_regions(frame([Polygon(r) for r in (both, once, band, antarctica)], ["a", "b", "c", "d"]), "name")
    assert regions.num_cut == 2
    for shape in regions.geometry[:2]:
        assert area_km2(shape) == pytest.approx(area_km2(box(0, -18, 5, -16)))
        assert shapely.contains_xy(shape, [179, -179, 0], [-17, -17, -17]).tolist() == [True, True, False]
    assert regions.geometry[2].equals(Polygon(band))
    assert regions.geometry[3].equals(Polygon(antarctica))
