"""Spherical k-means: plain where the bounds are idle, within them always, no worse than it needs to be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hedwig.geo import unit_vectors
from hedwig.geocells.kmeans import _exchange, _nested_halves, spherical_kmeans


def clustered(n=600, seed=0):
    rng = np.random.default_rng(seed)
    lat, lon = rng.uniform(-60, 60, 12), rng.uniform(-180, 180, 12)
    pick = rng.choice(12, n, p=np.arange(1, 13) / 78)
    return unit_vectors(lat[pick] + rng.normal(0, 3, n), lon[pick] + rng.normal(0, 3, n))


def mean_cost(vectors, labels):
    centres = np.stack([vectors[labels == k].sum(axis=0) for k in range(labels.max() + 1)])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return float((1 - (vectors * centres[labels]).sum(axis=1)).mean()), centres


@pytest.mark.parametrize(("low", "high"), [(10, 25), (20, 20), (0, 21), (19, 600)])
def test_bounds_hold(low, high):
    labels = spherical_kmeans(clustered(), 30, low, high, seed=1)
    sizes = np.bincount(labels, minlength=30)
    assert labels.dtype == np.int32
    assert sizes.min() >= low
    assert sizes.max() <= high


def test_idle_bounds_leave_every_point_with_its_nearest_centre():
    vectors = clustered()
    labels = spherical_kmeans(vectors, 12, 0, 600, seed=0)
    _, centres = mean_cost(vectors, labels)
    np.testing.assert_array_equal(labels, np.argmax(vectors @ centres.T, axis=1))


def test_cost_is_near_the_best_assignment_of_a_tiny_set():
    vectors = unit_vectors([0, 1, 2, 3, 40, 41], [0, 2, 1, 3, 0, 1])
    labels = spherical_kmeans(vectors, 2, 3, 3, seed=0)
    best = min(
        mean_cost(vectors, np.isin(np.arange(6), group).astype(int))[0] for group in itertools.combinations(range(6), 3)
    )
    assert mean_cost(vectors, labels)[0] <= 1.05 * best


def test_bounded_cost_stays_near_the_unbounded_one():
    vectors = clustered()
    free = mean_cost(vectors, spherical_kmeans(vectors, 12, 0, 600))[0]
    bounded = mean_cost(vectors, spherical_kmeans(vectors, 12, 5, 120))[0]
    random = mean_cost(vectors, np.random.default_rng(0).permutation(np.arange(600) % 12))[0]
    assert bounded < free + 0.2 * (random - free)


def test_same_seed_same_labels():
    vectors = clustered()
    first, again = (spherical_kmeans(vectors, 20, 10, 50, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_identical_points_still_fill_their_cells():
    labels = spherical_kmeans(np.tile(unit_vectors(10, 20), (12, 1)), 4, 3, 3)
    assert np.bincount(labels).tolist() == [3, 3, 3, 3]


def test_works_beyond_three_dimensions():
    vectors = np.random.default_rng(0).normal(size=(200, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert set(np.bincount(spherical_kmeans(vectors, 10, 18, 22))) <= {18, 19, 20, 21, 22}


def test_refuses_bounds_that_cannot_hold():
    vectors = clustered(100)
    with pytest.raises(ValueError, match="100 points cannot fill 11 cells of 10 to 20"):
        spherical_kmeans(vectors, 11, 10, 20)
    with pytest.raises(ValueError, match="cannot fill 4 cells"):
        spherical_kmeans(vectors, 4, 1, 20)
    with pytest.raises(ValueError, match="unit vectors"):
        spherical_kmeans(vectors * 2, 4, 1, 100)
    with pytest.raises(ValueError, match="num_cells >= 1"):
        spherical_kmeans(vectors, 4, 30, 20)


@pytest.mark.parametrize(("low", "high"), [(18, 22), (15, 30)])
def test_tight_bounds_on_crowded_points_beat_equal_parts(low, high):
    """Most points in a few towns: nearest centres are far from the bounds, so cells start from nested halves."""
    rng = np.random.default_rng(0)
    lat = np.concatenate([rng.normal(40, 0.05, 1500), rng.uniform(-50, 60, 500)])
    lon = np.concatenate([rng.normal(10, 0.05, 1500), rng.uniform(-170, 170, 500)])
    vectors = unit_vectors(lat, lon)
    labels = spherical_kmeans(vectors, 100, low, high)
    sizes = np.bincount(labels, minlength=100)
    assert low <= sizes.min() <= sizes.max() <= high
    equal = _nested_halves(vectors, np.ones(2000, dtype=np.int64), 100, 20, 20)
    assert set(np.bincount(equal)) == {20}
    assert mean_cost(vectors, labels)[0] < 0.9 * mean_cost(vectors, equal)[0]


def test_an_exchange_lowers_the_cost_and_keeps_the_bounds():
    vectors, weights = clustered(), np.ones(600, dtype=np.int64)
    labels = np.random.default_rng(0).permutation(np.arange(600) % 20)
    costs = [mean_cost(vectors, labels)[0]]
    for _ in range(4):
        assert _exchange(vectors, weights, labels, mean_cost(vectors, labels)[1], 28, 32) > 0
        costs.append(mean_cost(vectors, labels)[0])
        assert 28 <= np.bincount(labels).min() <= np.bincount(labels).max() <= 32
    assert (np.diff(costs) < 0).all()
    assert costs[-1] < 0.7 * costs[0]


def test_places_of_several_members_exchange_only_with_their_like():
    vectors = clustered()
    weights = np.random.default_rng(1).integers(1, 4, 600)
    labels = spherical_kmeans(vectors, 20, 40, 80, counts=weights)
    sizes = np.bincount(labels, weights=weights, minlength=20)
    assert sizes.min() >= 40
    assert sizes.max() <= 80
