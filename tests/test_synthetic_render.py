"""The pictures: repeatable, seamless, right in geometry, and telling where they are."""

from __future__ import annotations

import math
import time

import numpy as np
import pandas as pd
import pytest
import simplejpeg

from hedwig.geo import haversine_km
from hedwig.synthetic import PanoramaRenderer, World, encode_jpeg, render_panorama
from hedwig.synthetic.backdrop import rays
from hedwig.synthetic.countries import country
from hedwig.synthetic.scene import scene_of
from hedwig.synthetic.script import sign_board
from hedwig.synthetic.sprites import paste


def row(**changes):
    base = {"pano_id": "synth-0-000001", "lat": 48.0, "lon": 10.0, "heading": 70.0, "country": "DE",
            "captured_at": "2020-06-21", "population": 4000}  # fmt: skip
    return {**base, **changes}


def test_a_row_always_gives_the_same_picture_and_other_rows_others():
    first = render_panorama(row(), width=256)
    render_panorama(row(pano_id="else"), width=128)
    assert first.shape == (128, 256, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, render_panorama(row(split="test", image_uri="x"), width=256))
    for change in (
        {"pano_id": "b"},
        {"lat": -30.0},
        {"country": "JP"},
        {"captured_at": "2020-12-21"},
        {"heading": 9.0},
    ):
        assert np.abs(first.astype(int) - render_panorama(row(**change), width=256)).mean() > 1


def test_the_seam_is_no_edge():
    inside, seam = [], []
    for index in range(12):
        image = render_panorama(row(pano_id=f"s{index}", heading=30.0 * index, lat=60 - 9.0 * index), width=256)
        steps = np.abs(image.astype(int) - np.roll(image, 1, axis=1)).mean(axis=(0, 2))
        seam.append(steps[0])
        inside.append(steps[1:].mean())
    assert np.mean(seam) <= 1.25 * np.mean(inside)


def test_turning_the_camera_rolls_the_picture():
    at, turned = (render_panorama(row(heading=heading), width=256).astype(int) for heading in (70.0, 160.0))
    rolled = np.abs(np.roll(at, -64, axis=1) - turned).mean()
    assert rolled < 6  # sensor noise, clouds and ground texture belong to the camera
    assert rolled < 0.4 * np.abs(at - turned).mean()


def test_the_sun_is_where_astronomy_puts_it():
    found = tried = 0
    for index in range(60):
        where = row(pano_id=f"sun{index}", lat=(45.0, -35.0)[index % 2], population=600, heading=11.0 * index)
        scene = scene_of(where)
        if scene.cloudiness > 0.15 or scene.sun_elevation_deg < 25:
            continue
        tried += 1
        image = render_panorama(where, width=256).astype(float)
        sky = image[:48].min(axis=2)  # higher than 22.5°: above most houses
        lines, columns = np.nonzero(sky >= sky.max() - 6)
        turn = np.angle(np.exp(2j * math.pi * (columns + 0.5) / 256).mean()) / (2 * math.pi) * 360
        azimuth = turn - 180 + where["heading"]
        error = abs((azimuth - scene.sun_azimuth_deg + 180) % 360 - 180)
        found += error < 6 and abs(90 - (lines.mean() + 0.5) / 128 * 180 - scene.sun_elevation_deg) < 4
        assert (math.cos(math.radians(scene.sun_azimuth_deg)) < 0) == (where["lat"] > 0)
    assert tried >= 10
    assert found >= 0.8 * tried


def test_ground_rays_match_plain_trigonometry():
    view = rays(128)
    for line, column in ((40, 5), (50, 100), (63, 64)):
        pitch = math.pi / 2 - (line + 0.5) / 64 * math.pi
        azimuth = (column + 0.5) / 128 * 2 * math.pi - math.pi
        distance = 2.4 / math.tan(-pitch)
        assert view.ahead[line - 32, column] == pytest.approx(distance * math.cos(azimuth), rel=1e-5, abs=1e-6)
        assert view.right[line - 32, column] == pytest.approx(distance * math.sin(azimuth), rel=1e-5, abs=1e-6)


def test_the_centre_line_lies_on_the_other_side_of_the_lane():
    # Brazil and Indonesia-like pair: the same row but for the country; a solid yellow line in both.
    for code, sign in (("US", -1), ("JP", 1)):
        where = row(country=code, lat=0.0, population=600)
        scene = scene_of(where)
        assert scene.roadside.drives_left == (code == "JP")
        image = render_panorama({**where, "heading": scene.road_bearing_deg}, width=512).astype(int)
        strip = image[150:175, 256 - 120 : 256 + 120]
        if code == "US":
            paint = (
                (strip[..., 0] > 150) & (strip[..., 2] < 0.55 * strip[..., 0]) & (strip[..., 1] > 0.6 * strip[..., 0])
            )
            columns = np.nonzero(paint)[1] - 120
            assert len(columns) > 20
            assert (np.median(columns) * sign) > 0
        assert scene.camera_lateral_m * sign < 0


def test_clues_change_the_colours_they_should():
    def ground(**changes):
        images = [render_panorama(row(pano_id=f"g{i}", population=600, **changes), width=128) for i in range(6)]
        return np.mean([image[34:42].mean(axis=(0, 1)) for image in images], axis=0)

    desert, forest = (ground(lat=lat, lon=lon, country="XX") for lat, lon in ((23.0, 9.0), (-3.0, -62.0)))
    assert desert[0] - desert[1] > forest[0] - forest[1] + 10  # ochre against green
    winter, summer = (ground(lat=57.0, lon=90.0, captured_at=f"2020-{month}-15") for month in ("01", "07"))
    assert winter.mean() > summer.mean() + 20


def test_signs_differ_by_script_and_colour_and_repeat():
    boards = {code: sign_board(country(code), np.random.default_rng(0)) for code in ("US", "CN", "SA", "RU", "IN")}
    for code, board in boards.items():
        assert board.shape == (3, 64, 96)
        np.testing.assert_array_equal(board, sign_board(country(code), np.random.default_rng(0)))
    codes = list(boards)
    assert all(np.abs(boards[a] - boards[b]).mean() > 10 for i, a in enumerate(codes) for b in codes[:i])


def test_paste_wraps_over_the_seam_and_keeps_the_rest():
    canvas = np.zeros((3, 8, 32), np.float32)
    sprite = np.concatenate([np.full((3, 4, 4), 200.0), np.ones((1, 4, 4))]).astype(np.float32)
    paste(canvas, sprite, 0.0, (2.0, 6.0), 6.0, np.zeros(4, np.float32))
    painted = np.flatnonzero(canvas[0].any(axis=0))
    np.testing.assert_array_equal(painted, [0, 1, 2, 29, 30, 31])
    np.testing.assert_array_equal(np.flatnonzero(canvas[0].any(axis=1)), [2, 3, 4, 5])
    paste(canvas, sprite, 10.0, (-9.0, -2.0), 6.0, np.zeros(4, np.float32))
    assert np.count_nonzero(canvas[0]) == 24


def test_unknown_values_have_defaults_and_impossible_ones_reasons():
    bare = {"pano_id": "x", "lat": 1.0, "lon": 2.0, "heading": 3.0}
    full = {**bare, "country": None, "captured_at": None, "population": float("nan")}
    np.testing.assert_array_equal(render_panorama(bare, width=64), render_panorama(full, width=64))
    with pytest.raises(ValueError, match="finite lat, lon and heading"):
        render_panorama({**bare, "lat": float("nan")}, width=64)
    with pytest.raises(ValueError, match="ISO date"):
        render_panorama({**bare, "captured_at": "last summer"}, width=64)
    with pytest.raises(ValueError, match="width is 31"):
        render_panorama(bare, width=31)


def test_every_corner_of_the_world_can_be_drawn():
    for index, (lat, lon) in enumerate([(90, 0), (-90, 0), (0, 180), (0, -180), (78.2, 15.6), (-54.8, -68.3)]):
        image = render_panorama(row(pano_id=f"c{index}", lat=lat, lon=lon, population=10**7 * (index % 2)), width=64)
        assert image.std() > 10


def test_the_stage_draws_jpegs_and_keeps_reasons():
    rows = [row(), row(pano_id="b", heading=float("nan")), row(pano_id="c")]
    batch = {name: np.array([one[name] for one in rows], object) for name in rows[0]}
    made = PanoramaRenderer(width=128, quality=80)(batch)
    assert set(made) == {*batch, "image_bytes", "failure"}
    assert [reason is None for reason in made["failure"]] == [True, False, True]
    assert made["image_bytes"][1] == b""
    picture = simplejpeg.decode_jpeg(made["image_bytes"][0])
    drawn = render_panorama(rows[0], width=128)
    assert np.abs(picture.astype(int) - drawn).mean() < 6
    assert encode_jpeg(drawn, 80) == made["image_bytes"][0]
    with pytest.raises(ValueError, match="quality is 0"):
        PanoramaRenderer(quality=0)


def test_mean_colours_already_tell_the_continent():
    # 12 centres, 30 panoramas each within a few hundred km; leave-one-out nearest neighbour on 4 x 8 mean colours.
    random = np.random.default_rng(0)
    spots = [(52, 0), (41, -3), (61, 90), (36, 138), (22, 78), (24, 45), (7, 2), (-27, 27), (-34, 147), (-8, -60),
             (40, -99), (4, 102)]  # fmt: skip
    codes = ["GB", "ES", "RU", "JP", "IN", "SA", "NG", "ZA", "AU", "BR", "US", "MY"]
    places = pd.DataFrame(
        [{"lat": lat + a, "lon": lon + b, "country": code, "population": 9000}
         for (lat, lon), code in zip(spots, codes, strict=True) for a, b in random.uniform(-3, 3, (20, 2))]
    )  # fmt: skip
    rows = World(places, 4).rows(len(places))
    features = []
    for one in rows.to_dict("records"):
        image = render_panorama(one, width=128)
        image = np.roll(image, round((one["heading"] - 180) / 360 * 128), axis=1)
        features.append(image.reshape(4, 16, 8, 16, 3).mean(axis=(1, 3)).ravel())
    values = np.array(features)
    values = (values - values.mean(axis=0)) / values.std(axis=0)
    gaps = ((values[:, None] - values[None]) ** 2).sum(axis=2)
    np.fill_diagonal(gaps, np.inf)
    lat, lon = rows["lat"].to_numpy(), rows["lon"].to_numpy()
    nearest = gaps.argmin(axis=1)
    assert np.median(haversine_km(lat, lon, lat[nearest], lon[nearest])) < 1500


def test_drawing_is_fast():
    rows = World(pd.DataFrame({"lat": [1.0, 50.0], "lon": [9.0, 8.0], "country": ["GA", "DE"], "population": 9**6}), 0)
    listing = rows.rows(12).to_dict("records")
    render_panorama(listing[0], width=512)
    start = time.process_time()
    for one in listing:
        encode_jpeg(render_panorama(one, width=512))
    assert (time.process_time() - start) / 12 < 0.045  # 10 ms on an idle core; three times that is a regression
