"""Charts: the curves are the shares they claim to be, and odd data are said, not raised."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from hedwig.report.charts import draw_calibration, draw_error_cdf
from hedwig.report.drawing import MAX_PNG_BYTES, new_figure, png_bytes


def test_cdf_is_the_share_of_queries_within_a_distance():
    rng = np.random.default_rng(0)
    errors = {"hedwig": 10 ** rng.uniform(-1, 4, 500), "random": np.full(500, 5000.0)}
    figure = draw_error_cdf(errors)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    x, y = lines["hedwig"].get_data()
    for km in (1.0, 25.0, 200.0, 2500.0):
        drawn = y[np.searchsorted(x, km, side="right") - 1]
        assert drawn == pytest.approx(np.mean(errors["hedwig"] <= km), abs=1e-12)
    assert lines["hedwig"].get_linewidth() > lines["random training place"].get_linewidth()
    assert lines["random training place"].get_linestyle() != "-", "floors are dashed"
    words = [text.get_text() for text in figure.axes[0].texts]
    assert [w.split("\n")[0] for w in words] == ["street", "city", "region", "country", "continent"]


def test_cdf_groups_methods_floors_and_oracles_in_this_order():
    names = ("perfect_cell", "constant", "viclip_1nn", "hedwig", "my_own")
    figure = draw_error_cdf({name: np.array([1.0, 10.0]) for name in names})
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[0] == "Methods"
    assert legend.index("hedwig") < legend.index("my own") < legend.index("best constant (median km)")
    assert legend.index("best constant (median km)") < legend.index("perfect cell")


def test_coverage_is_counted_or_taken_as_given():
    queries = {"error_km": np.array([1.0, 5.0, 50.0, 9.0]), "radius_km": np.array([2.0, 2.0, 100.0, 10.0])}
    assert draw_calibration(queries).axes[0].get_title(loc="left") == "75% inside the stated radius"
    assert draw_calibration(queries, coverage=0.5).axes[0].get_title(loc="left") == "50% inside the stated radius"


def test_selection_shows_the_median_of_the_surest():
    confidence = np.linspace(0, 1, 100)
    error = np.where(confidence > 0.5, 10.0, 1000.0)
    (line, _) = draw_calibration({"error_km": error, "confidence": confidence}).axes[1].get_lines()
    share, median = line.get_data()
    assert median[0] == 10.0
    assert median[-1] == np.median(error)
    assert share[-1] == 1.0


def test_outcome_is_binned_by_confidence():
    confidence = np.repeat([0.1, 0.9], 50)
    error = np.repeat([5000.0, 100.0], 50)
    panel = draw_calibration({"error_km": error, "confidence": confidence}).axes[2]
    line = next(line for line in panel.get_lines() if line.get_label() == "within 200 km")
    np.testing.assert_allclose(line.get_ydata(), (np.array(line.get_xdata()) > 0.5).astype(float))


@pytest.mark.parametrize("values", [[], [0.0], [np.nan, np.nan], [0.0] * 30, [20_015.0] * 12])
def test_odd_errors_are_drawn(values):
    e = np.array(values, dtype=float)
    figures = [draw_error_cdf({"hedwig": e, "a $b_\\frac{x} 中": e}), draw_error_cdf({})]
    figures.append(draw_calibration({"error_km": e, "radius_km": e, "confidence": e / 20_015}))
    figures.append(draw_calibration({"error_km": e}))
    for figure in figures:
        assert png_bytes(figure, dpi=50).startswith(b"\x89PNG\r\n\x1a\n")
    said = [text.get_text() for text in figures[1].axes[0].texts]
    assert any("No query has both" in words for words in said)


def test_pictures_are_sharp_and_bounded():
    figure = draw_error_cdf({"hedwig": np.geomspace(0.1, 1e4, 300)}, synthetic=True)
    data = png_bytes(figure)
    image = Image.open(io.BytesIO(data))
    assert image.width > 1200
    assert len(data) <= MAX_PNG_BYTES
    assert "synthetic world" in [text.get_text() for text in figure.texts]


def test_a_picture_of_noise_is_made_smaller_until_it_fits():
    figure = new_figure(3.0, 2.0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.random.default_rng(0).random((600, 900, 3)), interpolation="nearest")
    assert len(png_bytes(figure, max_bytes=60_000)) <= 60_000
