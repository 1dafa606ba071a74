"""Quadtree cells: the partition of OSV-5M (Astruc et al., CVPR 2024), plain and adaptive, and its published table.

Plain: the box of all points is cut into four equal boxes of degrees, and each of these again while it holds more than
the maximum and is not yet `depth` cuts deep; ``quadtree_10_1000`` is depth 10 and a cut from 1,000 points on. Adaptive:
the cut is at the median latitude, then in each half at its median longitude, so that cells are equally full instead of
equally large. Boxes without a point are no cells. A tree of longitudes is cut at the antimeridian: no cell crosses it.
Published cells are boxes, with gaps where OSV-5M has no image; `PublishedQuadtree` reads and compares them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from hedwig import storage
from hedwig.geo import unit_vectors
from hedwig.geocells.merging import merge_small

__all__ = ["PublishedQuadtree", "quadtree_membership"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

OSV5M_COLUMNS = ("min_lat", "min_lon", "max_lat", "max_lon", "mean_lat", "mean_lon")
ADAPTIVE_DEPTH = 40


def quadtree_membership(
    lat: ArrayLike,
    lon: ArrayLike,
    *,
    min_panoramas: int = 1,
    max_panoramas: int = 999,
    depth: int = 10,
    adaptive: bool = False,
    counts: ArrayLike | None = None,
    box: tuple[float, float, float, float] | None = None,
) -> Ints:
    """Cell of each place: labels (N,) int64, 0 to C-1, in the order of the tree (south before north, west before east).

    Args:
        lat: degrees (N,), distinct places.
        lon: degrees (N,).
        min_panoramas: a cell below this is fused with a near one, see `merge_small`; 1 fuses nothing, as OSV-5M.
        max_panoramas: a box above this is cut; OSV-5M cuts from 1,000 on, which is 999 here.
        depth: most cuts from the whole to a cell; a crowded box at this depth stays above the maximum. The adaptive
            tree goes on until the maximum holds, because its cells cost nothing where nothing is.
        adaptive: cut at medians instead of middles.
        counts: panoramas at each place (N,); 1 if not given.
        box: south, west, north, east of the plain tree; by default those of the places.

    Raises:
        ValueError: bounds or a depth that contradict each other.
    """
    if not 1 <= min_panoramas <= max_panoramas or depth < 1:
        raise ValueError(
            f"A quadtree needs 1 <= min_panoramas <= max_panoramas and depth >= 1; they are {min_panoramas}, "
            f"{max_panoramas} and {depth}."
        )
    places = np.stack([np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)], axis=1)
    weights = np.ones(len(places), dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
    labels = np.zeros(len(places), dtype=np.int64)
    if len(places) == 0:
        return labels
    south, west, north, east = box or (*places.min(axis=0), *places.max(axis=0))
    limit = ADAPTIVE_DEPTH if adaptive else depth
    stack = [(np.arange(len(places)), np.array([[south, west], [north, east]]), 0, "")]
    paths: list[str] = []
    while stack:
        rows, bounds, level, path = stack.pop()
        if weights[rows].sum() <= max_panoramas or level >= limit or len(rows) == 1:
            labels[rows] = len(paths)
            paths.append(path)
            continue
        if adaptive:
            quarters = _median_quarters(places[rows], weights[rows])
            parts = [(quarters == q, bounds) for q in range(4)]
        else:
            middle = bounds.mean(axis=0)
            above = places[rows] >= middle
            quarters = 2 * above[:, 0] + above[:, 1]
            parts = [(quarters == q, _quarter(bounds, middle, q)) for q in range(4)]
        for q in (3, 2, 1, 0):  # the last pushed comes first
            inside, part = parts[q]
            if inside.any():
                stack.append((rows[inside], part, level + 1, path + str(q)))
    if min_panoramas == 1:
        return labels
    deepest = max(map(len, paths))
    ancestors = [
        np.unique(np.array([path[:cut] for path in paths]), return_inverse=True)[1] for cut in range(deepest - 1, 0, -1)
    ]
    return merge_small(labels, unit_vectors(*places.T), weights, ancestors, min_panoramas, max_panoramas)


def _quarter(bounds: Floats, middle: Floats, q: int) -> Floats:
    low, high = bounds
    upper = np.array([q >= 2, q % 2 == 1])
    return np.stack([np.where(upper, middle, low), np.where(upper, high, middle)])


def _median_quarters(places: Floats, weights: Ints) -> Ints:
    """Quarter (N,) of each place: below or above the median latitude, then of the median longitude of that half."""
    quarters = np.zeros(len(places), dtype=np.int64)
    upper = _above_median(places[:, 0], weights)
    quarters[upper] = 2
    for half in (~upper, upper):
        quarters[half] += _above_median(places[half, 1], weights[half])
    return quarters


def _above_median(values: Floats, weights: Ints) -> NDArray[np.bool_]:
    """Which values (N,) lie above the cut that halves the weight best; equal values stay together."""
    distinct, index = np.unique(values, return_inverse=True)
    if len(distinct) < 2:
        return np.zeros(len(values), dtype=bool)
    below = np.cumsum(np.bincount(index, weights=weights))[:-1]
    return np.asarray(index > int(np.argmin(np.abs(below - weights.sum() / 2))))


@dataclass(frozen=True)
class PublishedQuadtree:
    """The boxes of OSV-5M's ``quadtree_10_1000.csv``.

    Attributes:
        box: (C, 4) float64, south, west, north, east in degrees.
        lat: (C,) float64 degrees, mean of the training images in each box.
        lon: (C,) float64 degrees.
    """

    box: Floats
    lat: Floats
    lon: Floats

    @classmethod
    def read(cls, path: str) -> PublishedQuadtree:
        """The table at a path or address.

        Raises:
            ValueError: a column is missing.
        """
        import io

        table = pd.read_csv(io.BytesIO(storage.read_bytes(path)))
        missing = [name for name in OSV5M_COLUMNS if name not in table.columns]
        if missing:
            raise ValueError(f"{path} lacks {missing}; OSV-5M's quadtree has the columns {list(OSV5M_COLUMNS)}.")
        values = table[list(OSV5M_COLUMNS)].to_numpy(dtype=np.float64)
        return cls(values[:, :4], values[:, 4].copy(), values[:, 5].copy())

    def __len__(self) -> int:
        return len(self.box)

    def assign(self, lat: ArrayLike, lon: ArrayLike) -> Ints:
        """Box of each point (N,) int64, the first where edges meet; -1 in the gaps."""
        import shapely

        south, west, north, east = self.box.T
        points = shapely.points(np.asarray(lon, dtype=np.float64), np.asarray(lat, dtype=np.float64))
        boxes = shapely.box(west, south, east, north)
        rows = np.full(len(points), len(boxes), dtype=np.int64)
        which, point = shapely.STRtree(points).query(boxes, predicate="covers")
        np.minimum.at(rows, point, which)
        return np.where(rows == len(boxes), -1, rows)
