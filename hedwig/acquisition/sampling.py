"""Random points on the sphere: uniform by area in any shape, around places, and apart from one another.

Area is measured where it is flat: in longitude and the sine of latitude, which Lambert's cylinder maps with true areas.
A shape is covered by a quadtree of equal cells there, one is drawn, a point in it is drawn, and kept if the shape
contains it: exactly uniform however thin the shape is, and no edge is approximated. Every region has a random stream of
its own, from the seed and its id, so the order of the regions does not matter and, without a minimum distance, nor does
which others there are. Positions are rounded to 6 decimals (0.1 m) *before* they are tested: what is written is inside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hedwig.acquisition.regions import area_km2
from hedwig.geo import EARTH_RADIUS_KM, km_to_chord, lat_lon, unit_vectors

__all__ = ["DECIMALS", "AreaSampler", "CapSampler", "Drawn", "Sampler", "shares", "spread"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DECIMALS = 6
MAX_CELLS = 4096
MAX_IDLE = 300_000  # proposals in a row outside: the shape is thinner than a rounded position
# This many rejected in a row: with 95 % confidence less than 0.1 % of the shape is still free (rule of three).
MAX_MISSES = 3000


class Sampler(Protocol):
    """Something that draws positions from a stream of random numbers."""

    def draw(self, rng: np.random.Generator, num: int) -> tuple[Floats, Floats, Ints]:
        """Up to `num` positions: lat, lon (degrees) and a row number of what each belongs to, (N,) each."""
        ...


class AreaSampler:
    """Uniform by area within a Polygon or MultiPolygon of EPSG:4326; parts may touch but not overlap."""

    def __init__(self, geometry: Any) -> None:
        self._geometry = geometry
        shapely.prepare(geometry)
        self.area_km2 = area_km2(geometry)
        if not self.area_km2 > 0:
            raise ValueError("The shape has no area; give a polygon that is not a line.")
        self._cells = _cover(geometry, self.area_km2)

    def draw(self, rng: np.random.Generator, num: int) -> tuple[Floats, Floats, Ints]:
        """`num` positions; fewer if the shape is thinner than 0.1 m everywhere."""
        west, low, width, height = self._cells.T
        expected = self.area_km2 / (len(west) * width[0] * height[0] * _UNIT_KM2)
        lats, lons, found, idle = [np.empty(0)], [np.empty(0)], 0, 0
        while found < num and idle < MAX_IDLE:
            batch = min(int((num - found) / max(expected, 0.01) * 1.1) + 16, 500_000)
            cell = np.minimum((rng.random(batch) * len(west)).astype(np.int64), len(west) - 1)
            lon = west[cell] + rng.random(batch) * width[cell]
            z = low[cell] + rng.random(batch) * height[cell]
            lat, lon = np.degrees(np.arcsin(np.clip(z, -1, 1))).round(DECIMALS), lon.round(DECIMALS)
            inside = shapely.contains_xy(self._geometry, lon, lat)
            lats.append(lat[inside])
            lons.append(lon[inside])
            found += int(inside.sum())
            idle = 0 if inside.any() else idle + batch
        lat, lon = np.concatenate(lats)[:num], np.concatenate(lons)[:num]
        return lat, lon, np.zeros(len(lat), dtype=np.int64)


class CapSampler:
    """Around places: one is drawn by weight, then a point uniform by area in the disc around it, on land.

    A place keeps its weight however much of its disc is sea: only the point is drawn again, up to `TRIES` times.
    """

    TRIES = 60

    def __init__(self, lat: Floats, lon: Floats, weight: Floats, radius_km: float, land: Any | None = None) -> None:
        if not (len(weight) and np.isfinite(weight).all() and weight.min() >= 0 and weight.sum() > 0):
            raise ValueError(f"{len(weight)} weights with no positive sum; places need weights of 0 or more.")
        self._vectors = unit_vectors(lat, lon)
        self._cumulative = np.cumsum(weight) / np.sum(weight)
        self._radius_km = radius_km
        self._land = land
        if land is not None:
            shapely.prepare(land)

    def draw(self, rng: np.random.Generator, num: int) -> tuple[Floats, Floats, Ints]:
        """Up to `num` positions and the row of the place of each; those that found no land are left out."""
        place = np.minimum(np.searchsorted(self._cumulative, rng.random(num), side="right"), len(self._cumulative) - 1)
        lat, lon = np.full(num, np.nan), np.full(num, np.nan)
        missing = np.arange(num)
        for _ in range(self.TRIES):
            lat[missing], lon[missing] = self._around(self._vectors[place[missing]], rng)
            if self._land is None:
                missing = missing[:0]
            else:
                missing = missing[~shapely.contains_xy(self._land, lon[missing], lat[missing])]
            if not len(missing):
                break
        kept = np.setdiff1d(np.arange(num), missing)
        return lat[kept], lon[kept], place[kept].astype(np.int64)

    def _around(self, centre: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """One point of each cap: 1 - cos(angle) is uniform, as a cap's area is 2π (1 - cos(angle))."""
        drop = rng.random(len(centre)) * 2 * np.sin(self._radius_km / EARTH_RADIUS_KM / 2) ** 2
        turn = rng.random(len(centre)) * 2 * np.pi
        sideways = np.sqrt(drop * (2 - drop))
        helper = np.where(np.abs(centre[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
        east = np.cross(helper, centre)
        east /= np.linalg.norm(east, axis=1, keepdims=True)
        north = np.cross(centre, east)
        across = np.cos(turn)[:, None] * east + np.sin(turn)[:, None] * north
        lat, lon = lat_lon((1 - drop)[:, None] * centre + sideways[:, None] * across)
        return lat.round(DECIMALS), lon.round(DECIMALS)


@dataclass(frozen=True)
class Drawn:
    """What `spread` found.

    Attributes:
        lat: (N,) degrees.
        lon: (N,) degrees.
        owner: (N,) object array of str, the id of the region; sorted.
        row: (N,) int64, what the sampler says that the point belongs to.
        shortfall: how many points each region lacks; only those that lack some.
    """

    lat: Floats
    lon: Floats
    owner: NDArray[np.object_]
    row: Ints
    shortfall: dict[str, int]


def spread(
    samplers: Mapping[str, Sampler], num: Mapping[str, int], *, min_distance_km: float = 0.0, seed: int = 0
) -> Drawn:
    """Points of every region, none nearer than `min_distance_km` to another one of any region.

    Dart throwing in a fixed order: the regions, sorted by id, throw in turns, and a dart that lands too near to an
    earlier one is lost. A region that loses `MAX_MISSES` darts in a row is full: it keeps what it has, and what it
    lacks is in the shortfall. No position is taken twice, whatever the distance: a plan's ids come from positions.

    Args:
        samplers: one per region id.
        num: points wanted per region id.
        min_distance_km: 0 or more.
        seed: any integer.

    Raises:
        ValueError: a negative number or distance.
    """
    if not (min_distance_km >= 0 and all(n >= 0 for n in num.values())):
        raise ValueError(f"min_distance_km={min_distance_km} and the numbers of points must be 0 or more.")
    names = sorted(samplers)
    streams = [np.random.default_rng(_seed(seed, name)) for name in names]
    chord = float(km_to_chord(min_distance_km))
    missing = np.array([num[name] for name in names], dtype=np.int64)
    misses = np.zeros(len(names), dtype=np.int64)
    full = missing == 0
    seen: set[tuple[float, float]] = set()
    kept: list[NDArray[Any]] = []  # per round: (K, 4) of lat, lon, region number, row
    first = True
    while not full.all():
        darts = []
        for region in np.flatnonzero(~full):
            wanted = int(missing[region]) if first else max(64, 2 * int(missing[region]))
            lat, lon, row = samplers[names[region]].draw(streams[region], wanted)
            if not len(lat):
                full[region] = True
                continue
            darts.append(np.stack([lat, lon, np.full(len(lat), region), row, np.arange(len(lat))], axis=1))
        first = False
        if not darts:
            break
        thrown = np.concatenate(darts)
        thrown = thrown[np.lexsort((thrown[:, 2], thrown[:, 4]))]
        taken = _accept(thrown, np.concatenate(kept) if kept else None, chord, missing, misses, seen)
        kept.append(thrown[taken, :4])
        full |= (missing == 0) | (misses >= MAX_MISSES)
    points = np.concatenate(kept) if kept else np.empty((0, 4))
    points = points[np.argsort(points[:, 2], kind="stable")]
    owner = np.array([names[int(region)] for region in points[:, 2]], dtype=object)
    lacking = {names[region]: int(missing[region]) for region in np.flatnonzero(missing)}
    return Drawn(points[:, 0], points[:, 1], owner, points[:, 3].astype(np.int64), lacking)


def _accept(
    thrown: NDArray[Any],
    kept: NDArray[Any] | None,
    chord: float,
    missing: Ints,
    misses: Ints,
    seen: set[tuple[float, float]],
) -> NDArray[np.bool_]:
    """Which darts (N, 5) stand, judged one after the other; `missing`, `misses` and `seen` are brought up to date."""
    vectors = unit_vectors(thrown[:, 0], thrown[:, 1])
    lost = np.zeros(len(thrown), dtype=bool)
    earlier: dict[int, list[int]] = {}
    if chord > 0:
        if kept is not None and len(kept):
            near, _ = cKDTree(unit_vectors(kept[:, 0], kept[:, 1])).query(vectors, distance_upper_bound=chord)
            lost = np.isfinite(near)
        alive = np.flatnonzero(~lost)
        if len(alive):
            for a, b in cKDTree(vectors[alive]).query_pairs(chord * (1 - 1e-12), output_type="ndarray").tolist():
                earlier.setdefault(int(alive[max(a, b)]), []).append(int(alive[min(a, b)]))
    taken = np.zeros(len(thrown), dtype=bool)
    places = list(map(tuple, thrown[:, :2].tolist()))
    for i, region in enumerate(thrown[:, 2].astype(np.int64).tolist()):
        if missing[region] == 0:
            continue
        if lost[i] or places[i] in seen or any(taken[j] for j in earlier.get(i, ())):
            misses[region] += 1
            continue
        taken[i] = True
        seen.add(places[i])
        missing[region] -= 1
        misses[region] = 0
    return taken


def shares(keys: list[str], seed: int) -> Floats:
    """A number in [0, 1) for each of (N,) keys that depends on the key and the seed alone."""
    return np.array([_seed(seed, key) / 2**128 for key in keys], dtype=np.float64)


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:16], "big")


_UNIT_KM2 = float(np.radians(1.0) * EARTH_RADIUS_KM**2)  # km² of one degree of longitude times one of sin(latitude)


def _cover(geometry: Any, area: float) -> Floats:
    """Equal cells (K, 4) of west, sin(south), width, height that hold the shape, of which it fills 60 % or more."""
    west, south, east, north = shapely.bounds(geometry)
    low, high = np.sin(np.radians([south, north]))
    cells = np.array([[west, low, east - west, high - low]])
    while len(cells) < MAX_CELLS and area < 0.6 * len(cells) * cells[0, 2] * cells[0, 3] * _UNIT_KM2:
        half = cells[:, 2:] / 2
        corners = [cells[:, :2] + half * [i, j] for i in (0, 1) for j in (0, 1)]
        cells = np.concatenate([np.concatenate([corner, half], axis=1) for corner in corners])
        bottom, top = (np.degrees(np.arcsin(np.clip(z, -1, 1))) for z in (cells[:, 1], cells[:, 1] + cells[:, 3]))
        boxes = shapely.box(cells[:, 0], bottom, cells[:, 0] + cells[:, 2], top)
        cells = cells[shapely.intersects(geometry, boxes)]
    return cells
