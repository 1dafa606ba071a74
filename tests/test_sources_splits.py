import numpy as np
import pytest

from hedwig.geo import haversine_km
from hedwig.sources import random_split, spatial_split
from hedwig.sources.splits import block_ids

SETTINGS = {"block_km": 200.0, "buffer_km": 0.0, "val_fraction": 0.1, "test_fraction": 0.2, "seed": 0}


def points(num, seed=0):
    rng = np.random.default_rng(seed)
    return np.degrees(np.arcsin(rng.uniform(-1, 1, num))), rng.uniform(-180, 180, num)


def test_shares_are_about_what_was_asked_and_blocks_stay_whole():
    lat, lon = points(20_000)
    split = spatial_split(lat, lon, [None] * len(lat), **SETTINGS)
    assert np.mean(split == "test") == pytest.approx(0.2, abs=0.02)
    assert np.mean(split == "val") == pytest.approx(0.1, abs=0.02)
    blocks = np.array(block_ids(lat, lon, 200.0))
    sides = {block: set() for block in blocks}
    for block, side in zip(blocks, split, strict=True):
        sides[block].add(side)
    assert all(len(s) == 1 for s in sides.values())


def test_blocks_are_about_as_large_as_asked_everywhere():
    for lat0 in (0.0, 45.0, 70.0, 85.0):
        lat, lon = np.full(2000, lat0), np.linspace(-180, 179.9, 2000)
        width_km = 2 * np.pi * 6371 * np.cos(np.radians(lat0)) / len(set(block_ids(lat, lon, 200.0)))
        assert 150 < width_km < 400


def test_the_split_of_a_point_does_not_depend_on_the_others():
    lat, lon = points(500)
    whole = spatial_split(lat, lon, [None] * 500, **SETTINGS)
    assert (spatial_split(lat[:50], lon[:50], [None] * 50, **SETTINGS) == whole[:50]).all()
    other = spatial_split(lat, lon, [None] * 500, **{**SETTINGS, "seed": 1})
    assert (other != whole).mean() > 0.2


def test_a_sequence_stays_together_across_a_block_border():
    lat, lon = np.linspace(0, 10, 200), np.zeros(200)
    assert len(set(spatial_split(lat, lon, [None] * 200, **SETTINGS))) > 1
    assert len(set(spatial_split(lat, lon, ["drive"] * 200, **SETTINGS))) == 1


def test_no_training_row_lies_within_the_buffer():
    rng = np.random.default_rng(1)
    lat, lon = rng.uniform(45, 50, 3000), rng.uniform(5, 12, 3000)
    split = spatial_split(lat, lon, [None] * 3000, **{**SETTINGS, "buffer_km": 10.0})
    train, test = split == "train", split == "test"
    assert 0 < (split == "buffer").sum() < train.sum()
    nearest = haversine_km(lat[test][:, None], lon[test][:, None], lat[train], lon[train]).min()
    assert nearest > 10.0
    without = spatial_split(lat, lon, [None] * 3000, **SETTINGS)
    close = haversine_km(
        lat[without == "test"][:, None],
        lon[without == "test"][:, None],
        lat[without == "train"],
        lon[without == "train"],
    ).min()
    assert close < 10.0  # the buffer did something


def test_random_split_is_by_id():
    ids = [f"p{i}" for i in range(5000)]
    split = random_split(ids, val_fraction=0.1, test_fraction=0.2, seed=0)
    assert np.mean(split == "test") == pytest.approx(0.2, abs=0.03)
    assert random_split(ids[:1], val_fraction=0.1, test_fraction=0.2, seed=0)[0] == split[0]
