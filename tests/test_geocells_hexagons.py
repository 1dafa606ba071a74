"""H3 cells: parents on arrays against the library's own, bounds, and resolutions that follow the points."""

from __future__ import annotations

import h3.api.numpy_int as h3
import numpy as np
import pytest

from hedwig.geocells.hexagons import h3_membership, h3_parent


def test_parents_are_those_of_the_library():
    rng = np.random.default_rng(0)
    cells = np.array(
        [h3.latlng_to_cell(y, x, 10) for y, x in zip(rng.uniform(-90, 90, 50), rng.uniform(-180, 180, 50), strict=True)]
    )
    for resolution in (0, 1, 5, 9, 10):
        ours = h3_parent(cells.astype(np.uint64), np.full(50, resolution))
        assert ours.tolist() == [h3.cell_to_parent(int(cell), resolution) for cell in cells]


def test_bounds_hold_and_dense_parts_have_smaller_cells():
    rng = np.random.default_rng(1)
    town, country = rng.normal([48, 11], 0.05, (500, 2)), rng.uniform([40, 0], [55, 20], (500, 2))
    points = np.concatenate([town, country])
    labels = h3_membership(*points.T, min_panoramas=20, max_panoramas=100)
    sizes = np.bincount(labels)
    assert sizes.min() >= 20
    assert sizes.max() <= 100
    spread = [np.ptp(points[labels == label], axis=0).max() for label in (labels[0], labels[-1])]
    assert spread[0] < 1 < spread[1]


def test_without_a_minimum_every_cell_is_one_hexagon():
    points = np.random.default_rng(2).uniform([0, 0], [20, 20], (300, 2))
    labels = h3_membership(*points.T, min_panoramas=1, max_panoramas=5)
    assert np.bincount(labels).max() <= 5
    for label in np.unique(labels):
        rows = points[labels == label]
        levels = [len({h3.cell_to_parent(h3.latlng_to_cell(y, x, 10), r) for y, x in rows}) for r in range(11)]
        assert levels[0] == 1


def test_a_remote_island_stays_small_and_a_crowded_place_whole():
    points = np.concatenate([np.random.default_rng(3).uniform([45, 5], [50, 10], (200, 2)), [[-27.1, -109.4]]])
    sizes = np.bincount(h3_membership(*points.T, min_panoramas=20, max_panoramas=80))
    assert sorted(sizes)[0] == 1
    assert sorted(sizes)[1] >= 20
    assert np.bincount(h3_membership([1, 1.5], [1, 1.5], min_panoramas=1, max_panoramas=3, counts=[9, 1])).tolist() == [
        1, 1,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="1 <= min <= max"):
        h3_membership([0], [0], min_panoramas=5, max_panoramas=3)
