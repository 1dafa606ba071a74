"""Maps: the view that is chosen, what crosses the antimeridian, and pixels where they must be."""

from __future__ import annotations

import io

import geopandas as gpd
import numpy as np
import pytest
from PIL import Image
from shapely.geometry import MultiPolygon, Polygon, box

from hedwig.geo import equal_earth, haversine_km, lat_lon, unit_vectors
from hedwig.report.drawing import error_scale, png_bytes
from hedwig.report.maps import draw_errors, draw_geocells, draw_panoramas
from hedwig.report.view import densify, fit_view, great_circles, polygon_path, smallest_arc, unwrap

LAND = [np.array([[40.0, -10.0], [60.0, -10.0], [60.0, 30.0], [40.0, 30.0], [40.0, -10.0]])]


def pixels(figure, dpi=100):
    """(H, W, 3) int of a figure, and the function that finds a map position in it."""
    figure.set_dpi(dpi)
    data = png_bytes(figure, dpi=dpi)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    axes = figure.axes[0]

    def at(xy):
        x, y = axes.transData.transform(xy)
        return image[image.shape[0] - 1 - int(y), int(x)]

    return image, at


def test_smallest_arc_crosses_the_antimeridian():
    middle, width = smallest_arc([179.0, -179.0, 177.0])
    assert width == pytest.approx(4.0)
    assert middle % 360 == pytest.approx(179.0)
    assert smallest_arc([10.0]) == (10.0, 0.0)


def test_view_follows_the_extent_of_the_data():
    assert not fit_view([], []).regional
    assert not fit_view([np.nan], [np.nan]).regional
    region = fit_view([48.0, 52.0], [2.0, 14.0])
    assert region.regional
    assert region.lon0 == pytest.approx(8.0)
    fiji = fit_view([-17.0, -18.0], [179.0, -179.0])
    assert fiji.regional
    assert abs(fiji.lon0) == pytest.approx(180.0)
    continent = fit_view([30.0, 48.0], [-120.0, -70.0])
    assert (continent.regional, continent.lon0) == (False, pytest.approx(-95.0))
    world = fit_view([0.0, 10.0, 20.0], [-120.0, 0.0, 140.0])
    assert world.lon0 == 0.0
    assert world.extent[1] > float(equal_earth(0.0, 180.0)[0])
    for view in (region, fiji, continent):
        assert view.extent[0] < view.points([view.lat0], [view.lon0])[0, 0] < view.extent[1]
        assert 1.5 < view.ratio < 2.1


def test_unwrap_keeps_frame_edges_and_joins_crossings():
    lat = np.array([0.0, 1.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(unwrap(lat, np.array([179.0, -179.0, -178.0, -178.0, 179.0])), [179, 181, 182, 182, 179])
    pole = np.array([-90.0, -90.0, -70.0, -70.0, -90.0])
    frame = np.array([180.0, -180.0, -180.0, 180.0, 180.0])
    np.testing.assert_allclose(unwrap(pole, frame), frame)


def test_densify_keeps_the_corners():
    lat, lon = densify(np.array([0.0, 0.0, 10.0]), np.array([0.0, 9.0, 9.0]), 3.0)
    assert np.diff(lat).max() <= 3.0
    assert np.diff(lon).max() <= 3.0
    assert {(0.0, 0.0), (0.0, 9.0), (10.0, 9.0)} <= set(zip(lat, lon, strict=True))


def test_great_circles_are_the_shortest_ways():
    view = fit_view(
        [0.0, 0.0],
        [
            -170.0,
            170.0,
        ][:2],
    )
    start, end = (np.array([35.0]), np.array([140.0])), (np.array([38.0]), np.array([-122.0]))
    world = fit_view([0.0, 0.0, 0.0], [-120.0, 0.0, 120.0])
    lines = great_circles(world, *start, *end, num_points=101)
    assert len(lines) == 2, "a way across the Pacific is drawn at both edges of the map"
    # the slow twin: the middle of the way is the normalised mean of both ends
    mid = lat_lon(unit_vectors(*start) + unit_vectors(*end))
    ys = [line[50, 1] for _, line in lines]
    np.testing.assert_allclose(ys, float(equal_earth(*mid)[1][0]), atol=1e-9)
    assert float(mid[0][0]) > 45.0
    for _, line in lines:
        assert np.abs(np.diff(line[:, 0])).max() < 0.2, "no step across the whole map"
    assert haversine_km(*start, *end) < 8600
    same = great_circles(view, np.zeros(2), np.array([180.0, 180.0]), np.zeros(2), np.array([180.0, 0.0]))
    assert all(np.isfinite(line).all() for _, line in same), "one point, or two antipodes, must not give NaN"


def test_polygon_path_leaves_holes_open_and_joins_split_parts():
    view = fit_view([0.0, 10.0], [0.0, 10.0])
    holed = Polygon(box(0, 0, 10, 10).exterior.coords, [box(4, 4, 6, 6).exterior.coords])
    for shape in (holed, holed.reverse(), MultiPolygon([holed])):
        area = 0.0
        for ring in polygon_path(view, shape).to_polygons():
            x, y = ring.T
            area += float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2
        assert area == pytest.approx((100 - 4) * np.cos(np.radians(5.0)), rel=1e-6)
    fiji = fit_view([-17.0, -18.0], [178.0, -178.0])
    split = MultiPolygon([box(178, -18, 180, -17), box(-180, -18, -178, -17)])
    crossing = Polygon([(178, -18), (-178, -18), (-178, -17), (178, -17)])
    for shape in (split, crossing):
        corners = polygon_path(fiji, shape).vertices
        assert np.ptp(corners[:, 0]) == pytest.approx(4 * np.cos(np.radians(17.5)), rel=1e-6)
    assert polygon_path(view, box(50, 50, 51, 51)) is None
    assert polygon_path(view, None) is None


def test_panoramas_stand_where_they_are():
    train, queries = (np.array([45.0, 55.0]), np.array([0.0, 20.0])), (np.array([50.0, np.nan]), np.array([10.0, 5.0]))
    figure = draw_panoramas(train, queries, LAND, synthetic=True)
    _, at = pixels(figure)
    view = fit_view(np.append(train[0], 50.0), np.append(train[1], 10.0))
    blue, vermillion = at(view.points(45.0, 0.0)), at(view.points(50.0, 10.0))
    assert blue[2] > blue[0] + 60
    assert vermillion[0] > vermillion[2] + 100
    land = at(view.points(52.0, 4.0))
    assert np.ptp(land) < 25
    assert 200 < land.mean() < 240
    words = [text.get_text() for text in figure.texts] + [t.get_text() for t in figure.legends[0].get_texts()]
    assert "synthetic world" in words
    assert "1 queries" in words


def test_geocells_are_coloured_by_count_with_holes_left_open():
    holed = Polygon(box(0, 40, 10, 50).exterior.coords, [box(4, 44, 6, 46).exterior.coords])
    cells = gpd.GeoDataFrame(
        {"cell_id": [0, 1], "lat": [41.0, 45.0], "lon": [1.0, 15.0], "num_panoramas": [1, 1000]},
        geometry=[holed, MultiPolygon([box(10, 40, 14, 50), box(16, 40, 20, 50)])],
        crs=4326,
    )
    _, at = pixels(draw_geocells(cells, []))
    view = fit_view([40.0, 50.0], [0.0, 20.0])
    few, many = at(view.points(48.0, 2.0)), at(view.points(47.0, 18.0))
    assert few[2] > few[1], "the dark end of viridis"
    assert many[0] > 200 > many[2], "the yellow end of viridis"
    hole, gap = at(view.points(45.3, 5.3)), at(view.points(47.0, 15.0))
    assert min(hole) > 220
    assert min(gap) > 220


def test_errors_are_coloured_by_size_and_joined_to_the_answer():
    queries = {
        "lat": np.array([0.0, 30.0, np.nan]), "lon": np.array([-100.0, 0.0, 1.0]),
        "pred_lat": np.array([0.0, 30.0, 1.0]), "pred_lon": np.array([100.0, 0.01, 1.0]),
        "error_km": np.array([17_800.0, 1.0, 1.0]),
    }  # fmt: skip
    figure = draw_errors(queries, [])
    _, at = pixels(figure)
    view = fit_view(np.array([0, 30, 0, 30.0]), np.array([-100, 0, 100, 0.01]))
    scale = error_scale()
    np.testing.assert_allclose(at(view.points(30.0, 0.0)), 255 * np.array(scale(0.0))[:3], atol=12)
    np.testing.assert_allclose(at(view.points(0.0, -100.0)), 255 * np.array(scale(0.99))[:3], atol=12)
    beside = at(view.points(0.0, -130.0) + np.array([0.0, 0.03]))
    on_the_way = min(at(view.points(0.0, lon)).sum() for lon in (-130.0, -131.0, -132.0))
    assert on_the_way < beside.sum() - 60, "the way leads west over the antimeridian"
    assert at(view.points(0.0, -50.0)).min() > 200, "and not through the middle of the map"
    assert any("2 queries" in text.get_text() for text in figure.texts)


@pytest.mark.parametrize("position", [(), (10.0,), (np.nan,)])
def test_next_to_nothing_is_drawn_not_raised(position):
    p = np.array(position, dtype=float)
    queries = {"lat": p, "lon": p, "pred_lat": p, "pred_lon": p, "error_km": p * 0}
    figures = [draw_panoramas((p, p), (p, p), []), draw_errors(queries, LAND), draw_geocells(None, LAND)]
    figures += [draw_errors({}, []), draw_errors({**queries, "error_km": None}, [])]
    empty = gpd.GeoDataFrame({"cell_id": [0]}, geometry=[None], crs=4326)
    figures += [draw_geocells(empty, []), draw_geocells(empty.iloc[:0], [])]
    for figure in figures:
        assert len(png_bytes(figure, dpi=50)) > 2000
    said = [text.get_text() for figure in figures for text in figure.axes[0].texts]
    assert "This run has no geocells to draw." in said
    assert ("No panorama of this run has a position." in said) == (not np.isfinite(p).any())
