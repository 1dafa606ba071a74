"""PIGEON's fuse and split on memberships: bounds, hierarchy, determinism, and OPTICS against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import OPTICS

from hedwig.geocells import admin as admin_module
from hedwig.geocells.admin import admin_membership, optics_order
from hedwig.geocells.geography import AdminTable


def table(country, admin1, admin2):
    columns = [np.array(column, dtype=object) for column in (country, admin1, admin2)]
    return AdminTable(*columns, np.zeros(len(country)), np.zeros(len(country)))


def blocks(spec):
    """Places from (country, admin1, admin2, number, lat, lon) rows, each block a small cloud."""
    rng = np.random.default_rng(0)
    rows = [row for row in spec for _ in range(row[3])]
    lat = np.array([row[4] for row in rows]) + rng.normal(0, 0.01, len(rows))
    lon = np.array([row[5] for row in rows]) + rng.normal(0, 0.01, len(rows))
    return lat, lon, table([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]), rows


def cells_of(spec, low, high):
    lat, lon, names, rows = blocks(spec)
    labels = admin_membership(lat, lon, names, min_panoramas=low, max_panoramas=high)
    return {frozenset(rows[i][2] for i in np.flatnonzero(labels == k)) for k in range(labels.max() + 1)}


def test_areas_of_the_right_size_stay_as_they_are():
    assert cells_of([("A", "x", "p", 5, 0, 0), ("A", "x", "q", 6, 0, 1), ("A", "y", "r", 7, 0, 2)], 5, 10) == {
        frozenset("p"), frozenset("q"), frozenset("r"),
    }  # fmt: skip


def test_a_small_area_prefers_its_own_admin1_to_a_nearer_stranger():
    spec = [("A", "x", "p", 2, 0, 0), ("A", "x", "q", 6, 0, 3), ("A", "y", "r", 6, 0, 1)]
    assert cells_of(spec, 5, 20) == {frozenset("pq"), frozenset("r")}


def test_a_small_area_prefers_a_small_neighbour_unless_it_is_far():
    near = [("A", "x", "p", 3, 0, 0), ("A", "x", "q", 6, 0, 1.0), ("A", "x", "r", 3, 0, -1.5)]
    assert cells_of(near, 5, 20) == {frozenset("pr"), frozenset("q")}
    far = [("A", "x", "p", 3, 0, 0), ("A", "x", "q", 6, 0, 1.0), ("A", "x", "r", 4, 0, -9.0)]
    assert cells_of(far, 5, 20) == {frozenset("pqr")}


def test_the_last_small_area_of_an_admin1_joins_another_of_its_country():
    spec = [("A", "x", "p", 2, 0, 0), ("A", "y", "q", 6, 0, 3), ("A", "z", "r", 6, 0, 9)]
    assert cells_of(spec, 5, 20) == {frozenset("pq"), frozenset("r")}


def test_countries_never_fuse_and_a_small_one_is_one_cell():
    spec = [("A", "x", "p", 1, 0, 0), ("A", "y", "q", 1, 5, 0), ("B", "x", "r", 8, 0, 0.1)]
    assert cells_of(spec, 5, 20) == {frozenset("pq"), frozenset("r")}


def test_optics_finds_two_towns_in_one_area():
    rng = np.random.default_rng(0)
    lat = np.r_[rng.normal(10, 0.02, 40), rng.normal(10, 0.02, 25)]
    lon = np.r_[rng.normal(10, 0.02, 40), rng.normal(11, 0.02, 25)]
    labels = admin_membership(lat, lon, table(["A"] * 65, ["x"] * 65, ["p"] * 65), min_panoramas=20, max_panoramas=40)
    assert np.bincount(labels).tolist() == [40, 25]  # halving would give 33 and 32
    assert len(set(labels[:40])) == 1


@pytest.mark.parametrize("cap", [5000, 100])
def test_bounds_hold_on_a_single_shapeless_area(cap, monkeypatch):
    monkeypatch.setattr(admin_module, "OPTICS_CAP", cap)
    rng = np.random.default_rng(0)
    lat, lon = rng.uniform(0, 3, 700), rng.uniform(0, 3, 700)
    labels = admin_membership(
        lat, lon, table(["A"] * 700, ["x"] * 700, ["p"] * 700), min_panoramas=30, max_panoramas=60
    )
    sizes = np.bincount(labels)
    assert sizes.min() >= 30
    assert sizes.max() <= 60


def test_counts_weigh_places_and_a_crowded_place_is_never_divided():
    lat, lon = np.linspace(0, 1, 10), np.zeros(10)
    counts = np.r_[50, np.full(9, 4)]
    names = table(["A"] * 10, ["x"] * 10, ["p"] * 10)
    labels = admin_membership(lat, lon, names, min_panoramas=5, max_panoramas=20, counts=counts)
    sizes = np.bincount(labels, weights=counts)
    assert sizes.max() == 50
    assert sorted(sizes)[-2] <= 20
    assert sizes.min() >= 5


def test_the_order_of_rows_does_not_matter():
    rng = np.random.default_rng(3)
    lat, lon = rng.uniform(-60, 60, 400), rng.uniform(-180, 180, 400)
    country, admin1, admin2 = (rng.choice(list("abcdefgh"[:k]), 400) for k in (2, 4, 8))
    first = admin_membership(lat, lon, table(country, admin1, admin2), min_panoramas=8, max_panoramas=20)
    p = rng.permutation(400)
    names = table(country[p], admin1[p], admin2[p])
    again = admin_membership(lat[p], lon[p], names, min_panoramas=8, max_panoramas=20)
    same = first[:, None] == first[None]
    np.testing.assert_array_equal(same[np.ix_(p, p)], again[:, None] == again[None])


@pytest.mark.parametrize("min_samples", [3, 8])
def test_optics_order_is_that_of_scikit_learn(min_samples):
    points = np.random.default_rng(0).normal(size=(300, 2))
    points[:100] *= 0.1
    slow = OPTICS(min_samples=min_samples).fit(points)
    order, reachability, predecessor = optics_order(points, min_samples)
    np.testing.assert_array_equal(order, slow.ordering_)
    np.testing.assert_allclose(reachability, slow.reachability_)
    np.testing.assert_array_equal(predecessor, slow.predecessor_)


def test_refuses_bounds_without_room_to_halve():
    with pytest.raises(ValueError, match=r"max_panoramas >= 2 \* min_panoramas"):
        admin_membership([0], [0], table(["A"], ["x"], ["p"]), min_panoramas=30, max_panoramas=50)
