"""Fusing small cells: siblings before strangers, the nearest first, never above the maximum or across an ocean."""

from __future__ import annotations

import numpy as np

from hedwig.geo import unit_vectors
from hedwig.geocells.merging import merge_small


def merged(lon, sizes, parents, low, high):
    labels = np.arange(len(lon))
    result = merge_small(labels, unit_vectors(np.zeros(len(lon)), lon), np.array(sizes), [np.array(parents)], low, high)
    return {frozenset(np.flatnonzero(result == k).tolist()) for k in range(result.max() + 1)}


def test_a_sibling_before_a_nearer_stranger():
    assert merged([0, 1, 3], [2, 9, 9], [7, 8, 7], 5, 20) == {frozenset({0, 2}), frozenset({1})}
    assert merged([0, 1, 3], [2, 9, 9], [7, 8, 9], 5, 20) == {frozenset({0, 1}), frozenset({2})}


def test_never_above_the_maximum_and_never_far():
    assert merged([0, 1, 3], [2, 9, 9], [0, 0, 0], 5, 10) == {frozenset({i}) for i in range(3)}
    assert merged([0, 1, 3], [2, 9, 7], [0, 0, 0], 5, 10) == {frozenset({0, 2}), frozenset({1})}
    assert merged([0, 9.1], [2, 9], [0, 0], 5, 20) == {frozenset({0}), frozenset({1})}  # 1,012 km
    assert merged([0, 8.9], [2, 9], [0, 0], 5, 20) == {frozenset({0, 1})}


def test_small_ones_gather_until_they_are_large_enough():
    assert merged([0, 1, 2, 6, 7, 9], [1] * 6, [0] * 6, 3, 4) == {frozenset({0, 1, 2}), frozenset({3, 4, 5})}
