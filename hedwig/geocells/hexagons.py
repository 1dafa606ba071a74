"""H3 cells of a resolution that follows the panoramas: hexagons divided where there are many, joined where few.

Every place has a path in Uber's H3 tree (a base cell, then one digit of seven per resolution). A cell above the maximum
is divided into its children until none is, those below the minimum are fused with cells of the same parent, then of
its parent, then with a neighbour. The tree is that of H3's indexes, in which a child may stick out of its parent by
some of its width: a partition all the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedwig.geo import unit_vectors
from hedwig.geocells.merging import merge_small

__all__ = ["h3_membership", "h3_parent"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FINEST = 10  # resolution with edges of 76 m; places closer than that stay together
_RESOLUTION_BITS, _DIGIT_BITS, _DIGITS = 52, 3, 15


def h3_membership(
    lat: ArrayLike,
    lon: ArrayLike,
    *,
    min_panoramas: int = 30,
    max_panoramas: int = 300,
    counts: ArrayLike | None = None,
) -> Ints:
    """Cell of each place: labels (N,) int64, 0 to C-1, in the order of H3's indexes.

    Args:
        lat: degrees (N,), distinct places.
        lon: degrees (N,).
        min_panoramas: a cell below this is fused with a near one, see `merge_small`.
        max_panoramas: a cell above this is divided, down to resolution 10.
        counts: panoramas at each place (N,); 1 if not given.

    Raises:
        ValueError: bounds that contradict each other.
    """
    if not 1 <= min_panoramas <= max_panoramas:
        raise ValueError(f"H3 cells need 1 <= min <= max panoramas; they are {min_panoramas} and {max_panoramas}.")
    import h3.api.numpy_int as h3

    lats, lons = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    weights = np.ones(len(lats), dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
    if len(lats) == 0:
        return np.zeros(0, dtype=np.int64)
    finest = np.array([h3.latlng_to_cell(y, x, FINEST) for y, x in zip(lats, lons, strict=True)], dtype=np.uint64)
    chosen = h3_parent(finest, np.zeros(len(finest), dtype=np.int64))
    resolution = np.zeros(len(finest), dtype=np.int64)
    for _ in range(FINEST):
        _, cell = np.unique(chosen, return_inverse=True)
        crowded = np.bincount(cell, weights=weights)[cell] > max_panoramas
        crowded &= resolution < FINEST
        resolution[crowded] += 1
        chosen[crowded] = h3_parent(finest[crowded], resolution[crowded])
    _, first, labels = np.unique(chosen, return_index=True, return_inverse=True)
    own = resolution[first]
    ancestors = [
        h3_parent(chosen[first], np.minimum(own, level)).astype(np.int64) for level in range(int(own.max()) - 1, -1, -1)
    ]
    return merge_small(
        labels.astype(np.int64), unit_vectors(lats, lons), weights, ancestors, min_panoramas, max_panoramas
    )


def h3_parent(cells: NDArray[np.uint64], resolution: Ints) -> NDArray[np.uint64]:
    """Ancestors (N,) uint64 of H3 indexes at resolutions (N,) not finer than theirs; h3.cell_to_parent on arrays.

    An index holds its resolution in bits 52 to 55 and a digit of three bits per resolution below; unused digits are 7.
    """
    level = resolution.astype(np.uint64)
    unused = (np.uint64(1) << (np.uint64(_DIGIT_BITS) * (np.uint64(_DIGITS) - level))) - np.uint64(1)
    cleared = cells & ~(np.uint64(15) << np.uint64(_RESOLUTION_BITS))
    return np.asarray(cleared | unused | (level << np.uint64(_RESOLUTION_BITS)), dtype=np.uint64)
