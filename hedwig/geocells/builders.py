"""The ways to partition the Earth behind one function: same points in, same table out, whatever the row order.

| method | made from | bounds | whose |
|---|---|---|---|
| `admin` | admin-2, fused along the hierarchy, split by OPTICS | both | PIGEON 30/60, PIGEOTTO 1000/2000 |
| `kmeans` | spherical k-means with capacities | both | 100 cells: HEDWIG in the US |
| `quadtree`, `quadtree-adaptive` | boxes of degrees | upper; lower by fusing | OSV-5M 10/1000 |
| `h3` | hexagons of the resolution the points ask for | upper; lower by fusing | |

Every method decides memberships of distinct places; `Geocells.from_membership` draws, numbers and names the cells.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedwig.geo import unit_vectors
from hedwig.geocells.admin import admin_membership
from hedwig.geocells.cells import Geocells, places_of
from hedwig.geocells.geography import Geography, wrapped
from hedwig.geocells.hexagons import h3_membership
from hedwig.geocells.kmeans import spherical_kmeans
from hedwig.geocells.quadtree import quadtree_membership

__all__ = ["METHODS", "Method", "build_geocells"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Method = Literal["admin", "kmeans", "quadtree", "quadtree-adaptive", "h3"]
METHODS: tuple[str, ...] = get_args(Method)


def build_geocells(
    lat: ArrayLike,
    lon: ArrayLike,
    *,
    method: Method = "admin",
    min_panoramas: int = 30,
    max_panoramas: int = 60,
    num_cells: int | None = None,
    depth: int = 10,
    geography: Geography | None = None,
    levels: int = 3,
    seed: int = 0,
) -> Geocells:
    """Geocells of training panoramas; the same points in any order give the same cells with the same numbers.

    The bounds hold except where they cannot: a country or an island below the minimum, a place (panoramas within 1 cm)
    above the maximum, a box of the quadtree at its depth.

    Args:
        lat: degrees (N,) of the training panoramas.
        lon: degrees (N,).
        method: see the module.
        min_panoramas: fewest panoramas of a cell.
        max_panoramas: most panoramas of a cell.
        num_cells: for "kmeans": C; by default as many as make the mean size the middle of the bounds.
        depth: for "quadtree": most cuts from the whole to a cell.
        geography: hierarchy and country names; `Geography.default()` if not given.
        levels: 2 to 4 levels of the hierarchy, the cells included; see `hedwig.geocells.hierarchy`.
        seed: of the k-means seeding; the other methods have no random step.

    Raises:
        ValueError: an unknown method, bounds that cannot hold, num_cells without "kmeans", or bad coordinates.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}; use one of {', '.join(METHODS)}.")
    if method != "kmeans" and num_cells is not None:
        raise ValueError(f"num_cells={num_cells} does nothing with method {method!r}; set the bounds or use 'kmeans'.")
    lat, lon = wrapped(lat, lon)
    if len(lat) == 0:
        raise ValueError("There are no panoramas to build geocells from; check the split they were taken from.")
    place_lat, place_lon, _, counts = places_of(lat, lon)
    admin = (Geography.default() if geography is None else geography).lookup(place_lat, place_lon)
    bounds: dict[str, Any] = {"min_panoramas": min_panoramas, "max_panoramas": max_panoramas, "counts": counts}
    if method == "admin":
        label = admin_membership(place_lat, place_lon, admin, **bounds)
    elif method == "kmeans":
        if num_cells is None:
            num_cells = max(1, round(2 * int(counts.sum()) / max(1, min_panoramas + max_panoramas)))
        vectors = unit_vectors(place_lat, place_lon)
        label = spherical_kmeans(vectors, num_cells, min_panoramas, max_panoramas, seed, counts=counts).astype(np.int64)
    elif method == "h3":
        label = h3_membership(place_lat, place_lon, **bounds)
    else:
        adaptive = method == "quadtree-adaptive"
        label = quadtree_membership(place_lat, place_lon, depth=depth, adaptive=adaptive, **bounds)
    every = np.repeat(np.arange(len(counts)), counts)
    return Geocells.from_membership(place_lat[every], place_lon[every], label[every], admin.take(every), levels=levels)
