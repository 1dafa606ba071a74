"""The reliability diagram draws the shares that it is given, and says what is absent."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_hex

from hedwig.metrics import calibration_error, radius_coverage
from hedwig.report.drawing import BLUE, VERMILLION
from hedwig.report.reliability import draw_reliability


def test_every_bin_is_at_its_confidence_and_share() -> None:
    rng = np.random.default_rng(0)
    stated = rng.random(400)
    confidence = calibration_error(stated, rng.random(400) < stated)
    axes = draw_reliability({"confidence": confidence}).axes[0]
    x, y = axes.get_lines()[1].get_data()
    np.testing.assert_array_equal(x, confidence["bins"]["confidence"])
    np.testing.assert_array_equal(y, confidence["bins"]["correct"])
    bars = np.array(axes.collections[0].get_segments())
    np.testing.assert_allclose(bars[:, 0, 1], confidence["bins"]["ci_low"])
    np.testing.assert_allclose(bars[:, 1, 1], confidence["bins"]["ci_high"])
    assert f"{100 * confidence['ece']:.1f} points" in axes.get_title(loc="left")


def test_a_region_that_breaks_its_promise_is_red() -> None:
    error = np.arange(1.0, 201.0)
    kept = radius_coverage(error, np.full(200, 100.0), 0.5)
    broken = radius_coverage(error, np.full(200, 100.0), 0.9)
    axes = draw_reliability({"radius_50": kept, "radius_90": broken}).axes[1]
    points = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [(float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in points] == [(0.5, 0.5), (0.9, 0.5)]
    assert [to_hex(p.get_color()) for p in points] == [BLUE, VERMILLION]
    assert any("median radius 100 km" in text.get_text() for text in axes.texts)


def test_what_is_absent_is_said() -> None:
    said = [text.get_text() for axes in draw_reliability({"confidence": None}).axes for text in axes.texts]
    assert "no confidence was stated" in said
    assert "no region was stated" in said
