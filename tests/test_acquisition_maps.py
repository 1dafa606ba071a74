"""The map of a plan: what is shown where, far regions in insets, and pictures that are pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from shapely.geometry import box

from hedwig.acquisition.maps import draw_positions, png_bytes
from hedwig.geo import equal_earth

LAND = [np.array([[40.0, -5], [40, 30], [60, 30], [60, -5], [40, -5]])]


def pixels(figure, dpi=80):
    return np.asarray(Image.open(io.BytesIO(png_bytes(figure, dpi=dpi))).convert("RGB"), dtype=int)


def offsets(axes):
    return np.asarray(axes.collections[-1].get_offsets())


def test_the_whole_world_is_drawn_in_equal_earth():
    lat, lon = [60.0, -40.0, 0.0, np.nan], [-170.0, 20.0, 160.0, 0.0]
    figure = draw_positions(lat, lon, LAND, title="t")
    assert len(figure.axes) == 1
    assert offsets(figure.axes[0]) == pytest.approx(np.stack(equal_earth(lat[:3], lon[:3]), axis=1))


def test_a_view_across_the_antimeridian_is_turned_to_it():
    figure = draw_positions([-17.0, -18.0], [179.0, -179.0], LAND, title="Fiji")
    left, right = figure.axes[0].get_xlim()
    assert right - left < 0.2
    assert np.ptp(offsets(figure.axes[0])[:, 0]) < 0.05


def test_far_regions_get_insets_and_the_main_view_stays_close():
    rng = np.random.default_rng(0)
    lat, lon = rng.uniform(30, 45, 500), rng.uniform(-110, -80, 500)
    names = [f"main-{int(x // 5)}" for x in lon]
    shapes = [box(-110 + 5 * i, 30, -105 + 5 * i, 45) for i in range(6)]
    ids = [f"main-{int(s.bounds[0] // 5)}" for s in shapes]
    far = {"isle": (20.0, -157.0), "ice": (65.0, -150.0)}
    lat = np.concatenate([lat, [v[0] for v in far.values()]])
    lon = np.concatenate([lon, [v[1] for v in far.values()]])
    shapes += [box(v[1] - 1, v[0] - 1, v[1] + 1, v[0] + 1) for v in far.values()]
    figure = draw_positions(lat, lon, LAND, title="t", outlines=shapes, region=[*names, *far], names=[*ids, *far])
    assert len(figure.axes) == 3
    assert {"isle", "ice"} <= {text.get_text() for text in figure.texts}
    without = draw_positions(lat, lon, LAND, title="t", outlines=shapes)
    assert len(without.axes) == 1
    assert np.ptp(figure.axes[0].get_xlim()) < 0.6 * np.ptp(without.axes[0].get_xlim())


def test_land_regions_and_points_have_their_colours_and_bytes_repeat():
    def draw():
        return draw_positions([50.0], [10.0], LAND, title="t", outlines=[box(8, 48, 14, 54)])

    image = pixels(draw())
    flat = {tuple(p) for p in image.reshape(-1, 3)}
    assert {(0xE3, 0xE0, 0xD8), (0xFA, 0xF8, 0xF3)} <= flat
    blue = (np.abs(image - [0, 0x72, 0xB2]).sum(axis=2) < 90).sum()
    assert 3 < blue < 200
    assert png_bytes(draw()) == png_bytes(draw())


def test_no_position_is_said_in_the_picture():
    figure = draw_positions([], [], LAND, title="t")
    assert any("No row has a position" in t.get_text() for t in figure.axes[0].texts)
    assert pixels(figure).shape[1] == 672
