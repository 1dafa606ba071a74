"""The listing: distinct, balanced, repeatable places, and the geography behind the pictures."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from hedwig.geo import haversine_km
from hedwig.synthetic import World
from hedwig.synthetic.climate import TREE_KINDS, nature, smooth_field, sun_position
from hedwig.synthetic.countries import LEFT_DRIVING, country


def table(num=600):
    random = np.random.default_rng(3)
    names = np.array(["AA", "BB", "CC", "DD", "EE", "FF"])
    share = np.array([0.7, 0.2, 0.05, 0.02, 0.02, 0.01])
    return pd.DataFrame(
        {
            "lat": random.uniform(-55, 70, num),
            "lon": random.uniform(-180, 180, num),
            "country": names[random.choice(6, num, p=share)],
            "population": np.exp(random.uniform(6, 16, num)).astype(int),
            "name": [f"place {i}" for i in range(num)],
        }
    )


def test_rows_are_repeatable_and_a_short_listing_begins_a_long_one():
    places = table()
    long, short = World(places, 5).rows(900, width=256), World(places, 5).rows(100, width=256)
    pd.testing.assert_frame_equal(long.head(100), short)
    assert not World(places, 6).rows(100)["lat"].equals(short["lat"])
    assert (long["width"] == 256).all()
    assert (long["height"] == 128).all()


def test_positions_are_distinct_near_their_places_and_ids_are_opaque():
    places = table()
    rows = World(places, 1).rows(1500)
    assert rows["pano_id"].is_unique
    assert len(rows[["lat", "lon"]].drop_duplicates()) == 1500
    distance = haversine_km(
        rows["lat"].to_numpy()[:, None], rows["lon"].to_numpy()[:, None], places["lat"], places["lon"]
    ).min(axis=1)
    assert 0.2 < distance.mean() < 6
    assert distance.max() <= 8.01
    assert rows.loc[7, "pano_id"] == "synth-1-000007"
    assert rows.loc[7, "image_uri"] == "images/synth-1-000007.jpg"
    # every place once before any twice: the first 600 have 600 sequences, and the second round repeats them
    assert rows["sequence"].head(600).is_unique
    assert set(rows["sequence"].tail(900)) == set(rows["sequence"].head(600))


def test_columns_dates_and_headings():
    rows = World(table(), 2).rows(800)
    assert list(rows.columns) == [
        "pano_id", "lat", "lon", "heading", "projection", "captured_at", "country", "sequence", "image_uri", "source",
        "licence", "width", "height", "population",
    ]  # fmt: skip
    assert set(rows["licence"]) == {"CC0-1.0"}
    assert rows["heading"].between(0, 360, inclusive="left").all()
    assert np.histogram(rows["heading"], bins=4, range=(0, 360))[0].min() > 140
    months = pd.to_datetime(rows["captured_at"]).dt.month
    assert set(months) == set(range(1, 13))


def test_small_countries_are_lifted_and_large_places_preferred():
    places = table(6000)
    rows = World(places, 0).rows(600)
    drawn = rows["country"].value_counts(normalize=True)
    there = places["country"].value_counts(normalize=True)
    assert drawn["FF"] > 3 * there["FF"]
    assert drawn["AA"] < 0.8 * there["AA"]
    assert drawn["AA"] > drawn["FF"]
    assert rows["population"].median() > 1.5 * places["population"].median()


def test_bad_tables_and_sizes_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="lacks \\['population'\\]"):
        World(table().drop(columns="population"), 0)
    with pytest.raises(ValueError, match="empty"):
        World(table().head(0), 0)
    with pytest.raises(ValueError, match="num is -1"):
        World(table(), 0).rows(-1)
    with pytest.raises(ValueError, match="even width"):
        World(table(), 0).rows(1, width=333)
    assert len(World(table(), 0).rows(0)) == 0


@pytest.mark.parametrize(("lat", "azimuth"), [(50, 180), (-35, 0), (65, 180), (-50, 0)])
def test_noon_sun_stands_towards_the_equator_at_the_height_of_the_season(lat, azimuth):
    for day, declination in ((172, 23.45), (355, -23.45)):
        height, side = sun_position(lat, day, 12.0)
        assert height == pytest.approx(90 - abs(lat - declination), abs=0.1)
        assert abs((side - azimuth + 180) % 360 - 180) < 0.5
    assert 90 < sun_position(lat, 80, 8.0)[1] + (90 if lat < 0 else 0) < 180  # mornings in the east


def test_fields_are_smooth_seamless_and_standard():
    random = np.random.default_rng(0)
    lat, lon = np.degrees(np.arcsin(random.uniform(-1, 1, 4000))), random.uniform(-180, 180, 4000)
    values = smooth_field("any", lat, lon)
    assert abs(values.mean()) < 0.3
    assert 0.7 < values.std() < 1.3
    assert np.abs(smooth_field("any", lat + 0.5, lon) - values).max() < 0.4  # 55 km
    assert smooth_field("any", 10.0, 180.0) == pytest.approx(smooth_field("any", 10.0, -180.0))
    assert np.abs(smooth_field("other", lat, lon) - values).mean() > 0.5


def test_nature_is_alike_nearby_and_differs_across_continents():
    random = np.random.default_rng(1)
    spots = [(48, 10), (40, -100), (-15, -50), (5, 20), (25, 80), (35, 110), (-30, 140), (60, 100)]
    looks = lambda lat, lon: np.concatenate([getattr(nature(lat, lon, 105), n) for n in ("soil", "wall", "roof")])  # noqa: E731
    near = [
        np.abs(looks(a, b) - looks(a + d, b + e)).mean() for a, b in spots for d, e in random.uniform(-1, 1, (4, 2))
    ]
    far = [np.abs(looks(*a) - looks(*b)).mean() for i, a in enumerate(spots) for b in spots[:i]]
    assert max(near) < 0.5 * np.median(far)
    assert np.median(far) > 20  # grey levels


def test_climate_knows_winter_deserts_and_tropics():
    siberia, congo, sahara = (60.0, 100.0), (0.0, 21.0), (23.0, 8.0)
    assert nature(*siberia, 15).snow > 0.8
    assert nature(*siberia, 200).snow == 0
    assert max(nature(*congo, day).snow for day in range(1, 366, 30)) == 0
    assert nature(*sahara, 100).dryness > nature(*congo, 100).dryness + 0.5
    south, north = (nature(lat, 0.0, 200).temperature_c for lat in (-50.0, 50.0))
    assert south < north - 5
    assert nature(*siberia, 200).trees[TREE_KINDS.index("C")] > 0.5
    assert nature(*congo, 200).trees[TREE_KINDS.index("C")] < 0.05
    assert math.isclose(nature(10, 10, 5).trees.sum(), 1, abs_tol=1e-9)


def test_countries_keep_their_real_traits_and_their_look():
    assert all(country(code).drives_left for code in ("GB", "JP", "IN", "AU", "ZA", "TH", "KE", "CY"))
    assert not any(country(code).drives_left for code in ("US", "FR", "CN", "BR", "MM", "EG", "RU"))
    assert 70 < len(LEFT_DRIVING) < 80
    wanted = {"RU": "cyrillic", "JP": "kana", "KR": "hangul", "SA": "arabic", "TH": "southeast", "FR": "latin"}
    assert {code: country(code).script for code in wanted} == wanted
    assert country("US").centre_line != country("DE").centre_line
    assert country("ZA").edge_line != country("FR").edge_line
    assert country(" us") == country("US")
    styles = {
        (s.board, s.accent, s.stripes, s.pole, s.bollard) for s in map(country, ("US", "CA", "BR", "JP", "CN", "TR"))
    }
    assert len(styles) == 6  # one board, but no two alike


def test_a_folder_with_somebody_elses_files_is_left_alone(tmp_path):
    from hedwig.config import SyntheticConfig
    from hedwig.pipelines.world import render_world

    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="not a synthetic world's"):
        render_world(str(tmp_path), SyntheticConfig(num=1))
    assert (tmp_path / "mine.txt").read_text() == "precious"
