"""The map by country: colours are medians, few queries are pale, a country without an outline has its dot."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
from matplotlib.colors import LogNorm
from shapely.geometry import box

from hedwig.report.country_map import draw_countries
from hedwig.report.drawing import error_scale

SHAPES = gpd.GeoDataFrame({"country": ["AA", "BB"]}, geometry=[box(0, 40, 10, 50), box(10, 40, 20, 50)], crs=4326)
QUERIES = {
    "lat": np.array([44.0, 46.0, 45.0, 42.0]),
    "lon": np.array([4.0, 6.0, 15.0, 18.0]),
    "country": np.array(["AA", "AA", "BB", "SG"]),
}
RECORDS = [
    {"country": "AA", "num_queries": 100, "median_km": 10.0},
    {"country": "BB", "num_queries": 3, "median_km": 3000.0},
    {"country": "SG", "num_queries": 50, "median_km": 200.0},
    {"country": "CC", "num_queries": 0, "median_km": None},
]


def test_countries_take_the_colour_of_their_median_and_few_queries_are_pale() -> None:
    axes = draw_countries(RECORDS, SHAPES, QUERIES, []).axes[0]
    areas, dots = axes.collections[-2:]
    colours = areas.get_facecolors()
    norm, scale = LogNorm(10.0, 5000.0), error_scale()
    np.testing.assert_allclose(colours[:, :3], [scale(norm(10.0))[:3], scale(norm(3000.0))[:3]])
    assert colours[0, 3] > 1.5 * colours[1, 3]
    assert len(dots.get_offsets()) == 3, "the city state has no outline and still a dot"
    np.testing.assert_array_equal(dots.get_array(), [10.0, 3000.0, 200.0])


def test_without_outlines_or_countries_there_is_a_map_all_the_same() -> None:
    assert len(draw_countries(RECORDS, None, QUERIES, []).axes[0].collections[-1].get_offsets()) == 3
    said = [text.get_text() for text in draw_countries([], SHAPES, {}, []).axes[0].texts]
    assert "No query has both a known country and an answer." in said
