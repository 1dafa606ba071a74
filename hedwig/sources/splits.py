"""Divide panoramas into train, val and test by place, so that no test panorama has its street in the training set.

The Earth is cut into blocks of equal height in latitude and about equal width in km; a block belongs to one split as a
whole, by a hash of its number: adding panoramas never moves old ones. Panoramas of one sequence follow the first of
them. Training rows nearer than the buffer to a held-out row are set aside as 'buffer': embedded, and neither trained on
nor scored.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hedwig.geo import EARTH_RADIUS_KM, km_to_chord, unit_vectors

__all__ = ["random_split", "spatial_split"]

Floats = NDArray[np.float64]


def _share(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on `key` and `seed` alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def _side(share: float, val_fraction: float, test_fraction: float) -> str:
    return "test" if share < test_fraction else "val" if share < test_fraction + val_fraction else "train"


def block_ids(lat: Floats, lon: Floats, block_km: float) -> list[str]:
    """The name of the block that each of (N,) points lies in; blocks narrow in longitude towards the poles' circles."""
    step = np.degrees(block_km / EARTH_RADIUS_KM)
    row = np.floor((lat + 90.0) / step)
    around = np.maximum(1, np.floor(360.0 * np.cos(np.radians(np.clip((row + 0.5) * step - 90.0, -90, 90))) / step))
    column = np.floor((lon + 180.0) % 360.0 / 360.0 * around)
    return [f"{int(r)}/{int(c)}" for r, c in zip(row, column, strict=True)]


def spatial_split(
    lat: Floats,
    lon: Floats,
    sequence: list[str | None],
    *,
    block_km: float,
    buffer_km: float,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> NDArray[np.str_]:
    """'train', 'val', 'test' or 'buffer' for each of (N,) points in degrees; `sequence` is None where there is none."""
    first_block: dict[str, str] = {}
    sides = []
    for block, name in zip(block_ids(lat, lon, block_km), sequence, strict=True):
        home = block if name is None else first_block.setdefault(name, block)
        sides.append(_side(_share(home, seed), val_fraction, test_fraction))
    split = np.array(sides, dtype="<U6")
    held_out, outside = np.flatnonzero(split != "train"), np.flatnonzero(split == "train")
    if buffer_km > 0 and len(held_out) and len(outside):
        vectors = unit_vectors(lat, lon)
        reach = float(km_to_chord(buffer_km))
        distance, _ = cKDTree(vectors[held_out]).query(vectors[outside], distance_upper_bound=reach)
        split[outside[np.isfinite(distance)]] = "buffer"
    return split


def random_split(pano_ids: list[str], *, val_fraction: float, test_fraction: float, seed: int) -> NDArray[np.str_]:
    """A split by row, blind to place: neighbours end up on both sides, so scores are too good. For comparison only."""
    return np.array([_side(_share(i, seed), val_fraction, test_fraction) for i in pano_ids], dtype="<U5")
