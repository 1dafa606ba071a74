"""Quadtrees: OSV-5M's published partition made again from its own boxes, medians, fusing, and points in its gaps."""

from __future__ import annotations

import numpy as np
import pytest

from hedwig.geocells.quadtree import PublishedQuadtree, quadtree_membership


def slow_quadtree(points, most, depth):
    """Boxes by recursion, as sets of rows."""

    def cut(rows, south, west, north, east, level):
        if len(rows) <= most or level == depth:
            return [frozenset(rows)] if rows else []
        lat, lon = (south + north) / 2, (west + east) / 2
        found = []
        for up in (False, True):
            for right in (False, True):
                inside = [i for i in rows if (points[i][0] >= lat) == up and (points[i][1] >= lon) == right]
                box = (lat if up else south, lon if right else west, north if up else lat, east if right else lon)
                found += cut(inside, *box, level + 1)
        return found

    low, high = points.min(axis=0), points.max(axis=0)
    return cut(list(range(len(points))), *low, *high, 0)


def test_plain_tree_is_the_obvious_recursion():
    points = np.random.default_rng(0).normal([40, 10], [10, 30], (500, 2))
    points[:60] = np.array([40, 10]) + points[:60] / 1000
    labels = quadtree_membership(*points.T, max_panoramas=20, depth=4)
    cells = [frozenset(np.flatnonzero(labels == k).tolist()) for k in range(labels.max() + 1)]
    assert cells == slow_quadtree(points, 20, 4)
    assert max(map(len, cells)) > 20  # the depth is reached where it is crowded


def test_the_published_partition_comes_out_of_its_own_boxes(shared):
    published = PublishedQuadtree.read(str(shared / "data/osv5m/quadtree_10_1000.csv"))
    assert len(published) == 11_399
    south, west, north, east = published.box.T
    whole = (south.min(), west.min(), north.max(), east.max())
    cuts = np.round(np.log2((north.max() - south.min()) / (north - south)))
    assert cuts.max() == 10
    # a box that was not cut has at most 999 images or lies at depth 10: fill all of them that far
    counts = np.where(cuts == 10, 1000, 999)
    labels = quadtree_membership((south + north) / 2, (west + east) / 2, counts=counts, depth=10, box=whole)
    assert len(np.unique(labels)) == 11_399
    # a tree of another depth has other cells, so the number is not an accident of the boxes
    labels = quadtree_membership((south + north) / 2, (west + east) / 2, counts=counts, depth=9, box=whole)
    assert len(np.unique(labels)) < 9_000


def test_points_in_gaps_have_no_published_box(shared):
    published = PublishedQuadtree.read(str(shared / "data/osv5m/quadtree_10_1000.csv"))
    np.testing.assert_array_equal(published.assign(published.lat[:500], published.lon[:500]), np.arange(500))
    assert published.assign([-89.0, 85.0], [0.0, -140.0]).tolist() == [-1, -1]


def test_adaptive_cells_are_equally_full_and_hold_the_maximum():
    points = np.random.default_rng(1).normal([40, 10], [3, 9], (4000, 2))
    plain = np.bincount(quadtree_membership(*points.T, max_panoramas=100))
    even = np.bincount(quadtree_membership(*points.T, max_panoramas=100, adaptive=True))
    assert len(even) == 64
    assert set(even) <= {62, 63}
    assert plain.min() < 10


def test_small_boxes_join_their_siblings_unless_they_are_far():
    rng = np.random.default_rng(2)
    lat = np.r_[rng.uniform(0, 10, 400), -50.0]
    lon = np.r_[rng.uniform(0, 10, 400), 170.0]
    labels = quadtree_membership(lat, lon, min_panoramas=20, max_panoramas=60)
    sizes = np.bincount(labels)
    assert sorted(sizes)[0] == 1
    assert sizes[labels[400]] == 1
    assert sorted(sizes)[1] >= 20
    assert sizes.max() <= 60


def test_counts_weigh_and_refusals():
    assert quadtree_membership([0, 0, 1], [0, 1, 1], counts=[5, 5, 5], max_panoramas=9).max() == 2
    assert quadtree_membership([0, 0, 1], [0, 1, 1], max_panoramas=9).max() == 0
    assert len(quadtree_membership([], [])) == 0
    with pytest.raises(ValueError, match="min_panoramas <= max_panoramas"):
        quadtree_membership([0], [0], min_panoramas=9, max_panoramas=5)


def test_a_table_without_the_columns_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("min_lat,max_lat\n0,1\n")
    with pytest.raises(ValueError, match=r"lacks \['min_lon', 'max_lon', 'mean_lat', 'mean_lon'\]"):
        PublishedQuadtree.read(str(tmp_path / "a.csv"))
