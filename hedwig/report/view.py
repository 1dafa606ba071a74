"""Which part of the Earth a map shows, and how rings and great circles come to lie on it.

Three views, chosen by the data alone: the whole Earth in Equal Earth; a continent in the same projection, turned to the
data's own meridian and cropped; and a region under 40° wide as latitude against longitude, shortened by the cosine of
its middle latitude. Whatever crosses the antimeridian is unwrapped to run on beyond ±180°, drawn once for every copy
that touches the view, and clipped to it. Shapely's (x=lon, y=lat) order stays inside `polygon_path`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from matplotlib.path import Path as Outline
from numpy.typing import ArrayLike, NDArray

from hedwig.geo import EARTH_RADIUS_KM, equal_earth, haversine_km, lat_lon, unit_vectors

__all__ = ["View", "densify", "fit_view", "great_circles", "polygon_path", "ring_copies", "smallest_arc", "unwrap"]

Floats = NDArray[np.float64]

REGION_DEG = 40.0
CONTINENT_DEG = 150.0
RATIO = (1.62, 2.05)
MIN_EXTENT_DEG = 0.03


@dataclass(frozen=True)
class View:
    """A window on the map.

    Attributes:
        lon0: the middle meridian, degrees.
        lat0: the latitude whose cosine shortens a region, degrees; unused by Equal Earth.
        extent: left, right, bottom, top in map coordinates.
        regional: equirectangular instead of Equal Earth.
    """

    lon0: float
    lat0: float
    extent: tuple[float, float, float, float]
    regional: bool

    @property
    def ratio(self) -> float:
        """Width over height."""
        left, right, bottom, top = self.extent
        return (right - left) / (top - bottom)

    @property
    def half_width_deg(self) -> float:
        """Longitudes further than this from `lon0` are outside."""
        if not self.regional:
            return 180.0
        return float(min(180.0, max(-self.extent[0], self.extent[1]) / max(np.cos(np.radians(self.lat0)), 0.05)))

    @property
    def pixel_deg(self) -> float:
        """About one pixel of a 1,500 pixel wide picture, in degrees: what is smaller need not be drawn."""
        width = self.extent[1] - self.extent[0]
        return width / 1500 if self.regional else float(np.degrees(width / 1500))

    def project(self, lat: ArrayLike, lon_from_middle: ArrayLike) -> Floats:
        """Map coordinates (..., 2) of latitudes and of longitudes counted from `lon0`, which may exceed ±180."""
        lat, lon = np.asarray(lat, dtype=np.float64), np.asarray(lon_from_middle, dtype=np.float64)
        if self.regional:
            return np.stack([lon * np.cos(np.radians(self.lat0)), lat], axis=-1)
        return np.stack(equal_earth(np.clip(lat, -90.0, 90.0), lon), axis=-1)

    def points(self, lat: ArrayLike, lon: ArrayLike) -> Floats:
        """Map coordinates (N, 2) of positions in degrees."""
        return self.project(lat, (np.asarray(lon, dtype=np.float64) - self.lon0 + 180.0) % 360.0 - 180.0)

    def globe(self) -> Outline | None:
        """The edge of the Earth, to clip with; None for a region, which the axes clip."""
        if self.regional:
            return None
        lat = np.linspace(-90.0, 90.0, 91)
        edge = np.concatenate([self.project(lat, np.full(91, 180.0)), self.project(lat[::-1], np.full(91, -180.0))])
        return Outline(np.concatenate([edge, edge[:1]]), closed=True)


def smallest_arc(lon: ArrayLike) -> tuple[float, float]:
    """Middle (degrees in [-180, 180)) and width (degrees) of the shortest arc that holds all (N >= 1) longitudes."""
    lon = np.unique(np.asarray(lon, dtype=np.float64) % 360.0)
    gaps = np.diff(np.append(lon, lon[0] + 360.0))
    widest = int(np.argmax(gaps))
    width = 360.0 - float(gaps[widest])
    return float((lon[(widest + 1) % len(lon)] + width / 2 + 180.0) % 360.0 - 180.0), width


def fit_view(lat: ArrayLike, lon: ArrayLike) -> View:
    """The view that shows all the (N,) positions; NaN are left out, and no position at all gives the whole Earth."""
    lats, lons = np.ravel(np.asarray(lat, dtype=np.float64)), np.ravel(np.asarray(lon, dtype=np.float64))
    keep = np.isfinite(lats) & np.isfinite(lons)
    lats, lons = lats[keep], lons[keep]
    right, top = float(equal_earth(0.0, 180.0)[0]), float(equal_earth(90.0, 0.0)[1])
    world = View(0.0, 0.0, (-right * 1.01, right * 1.01, -top * 1.02, top * 1.02), False)
    if len(lats) == 0:
        return world
    lon0, width = smallest_arc(lons)
    if max(width, float(np.ptp(lats))) < REGION_DEG:
        lat0 = float(lats.min() + lats.max()) / 2
        turned = View(lon0, lat0, world.extent, True)
        minimum = MIN_EXTENT_DEG
    elif width < CONTINENT_DEG:
        turned = View(lon0, 0.0, world.extent, False)
        minimum = 0.1
    else:
        return world
    corners = turned.points(lats, lons)
    middle = (corners.min(axis=0) + corners.max(axis=0)) / 2
    size = np.maximum(1.14 * np.ptp(corners, axis=0), minimum)
    size = np.array([max(size[0], RATIO[0] * size[1]), max(size[1], size[0] / RATIO[1])])
    left, bottom = middle - size / 2
    return View(turned.lon0, turned.lat0, (left, left + size[0], bottom, bottom + size[1]), turned.regional)


def unwrap(lat: Floats, lon: Floats) -> Floats:
    """Longitudes (K,) of a ring or line made continuous, running on beyond ±180 where it crosses the antimeridian.

    A step of more than half the globe is a crossing, unless it runs along the frame of the flat map itself: between
    -180 and 180 exactly, or along a pole, as in polygons that were split or that hold a pole.
    """
    step = np.diff(lon)
    frame = (np.abs(lon[:-1]) == 180.0) & (np.abs(lon[1:]) == 180.0)
    frame |= (np.abs(lat[:-1]) >= 89.9) & (np.abs(lat[1:]) >= 89.9)
    turns = np.where((np.abs(step) > 180.0) & ~frame, -360.0 * np.sign(step), 0.0)
    return np.asarray(lon + np.concatenate([[0.0], np.cumsum(turns)]), dtype=np.float64)


def densify(lat: Floats, lon: Floats, step_deg: float = 3.0) -> tuple[Floats, Floats]:
    """The same line (K,) with points no further than `step_deg` apart, so that a long edge bends with the map."""
    if len(lat) < 2:
        return lat, lon
    pieces = np.maximum(np.ceil(np.maximum(np.abs(np.diff(lat)), np.abs(np.diff(lon))) / step_deg), 1).astype(int)
    start = np.repeat(np.arange(len(pieces)), pieces)
    share = (np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)) / pieces[start]
    dense = [np.append(v[start] + share * (v[start + 1] - v[start]), v[-1]) for v in (lat, lon)]
    return dense[0], dense[1]


def ring_copies(view: View, lat: Floats, lon: Floats) -> list[float]:
    """By how many degrees the unwrapped line (K,) must be moved to be seen: none, one or several multiples of 360."""
    west, east = float(lon.min()) - view.lon0, float(lon.max()) - view.lon0
    reach = view.half_width_deg
    if view.regional and (lat.max() < view.extent[2] or lat.min() > view.extent[3]):
        return []
    first, last = int(np.ceil((-reach - east) / 360.0)), int(np.floor((reach - west) / 360.0))
    return [360.0 * k - view.lon0 for k in range(first, last + 1)]


def polygon_path(view: View, geometry: Any) -> Outline | None:
    """One compound path of a Polygon or MultiPolygon, holes included; None where nothing of it is seen.

    Exteriors turn one way and holes the other, which is how Agg's non-zero rule leaves holes open.
    """
    if geometry is None or shapely.is_empty(geometry):
        return None
    geometry = shapely.simplify(geometry, view.pixel_deg / 2)
    vertices: list[Floats] = []
    codes: list[NDArray[np.uint8]] = []
    for part in shapely.get_parts(shapely.get_parts(geometry)):
        if part.geom_type != "Polygon" or part.is_empty:
            continue
        part = shapely.geometry.polygon.orient(part)
        middle, moves = 0.0, []
        for number, ring in enumerate([part.exterior, *part.interiors]):
            lon, lat = np.asarray(ring.coords, dtype=np.float64)[:, :2].T
            lat, lon = densify(lat, unwrap(lat, lon))
            if number == 0:
                middle, moves = float(lon.min() + lon.max()) / 2, ring_copies(view, lat, lon)
            else:
                lon = lon + 360.0 * np.round((middle - (lon.min() + lon.max()) / 2) / 360.0)
            for move in moves:
                vertices.append(view.project(lat, lon + move))
                code = np.full(len(lat), Outline.LINETO, dtype=np.uint8)
                code[0], code[-1] = Outline.MOVETO, Outline.CLOSEPOLY
                codes.append(code)
    return Outline(np.concatenate(vertices), np.concatenate(codes)) if vertices else None


def great_circles(
    view: View, lat1: Floats, lon1: Floats, lat2: Floats, lon2: Floats, num_points: int = 33
) -> list[tuple[int, Floats]]:
    """The shortest ways between (N,) pairs of positions as lines on the map.

    Returns:
        (row, (num_points, 2)) pairs; a way across the map's edge comes twice, each to be clipped to the view.
        Points between two antipodes follow no way in particular.
    """
    start, end = unit_vectors(lat1, lon1), unit_vectors(lat2, lon2)
    angle = (haversine_km(lat1, lon1, lat2, lon2) / EARTH_RADIUS_KM)[:, None, None]
    share = np.linspace(0.0, 1.0, num_points)[None, :, None]
    sine = np.sin(angle)
    flat = sine < 1e-9
    safe = np.where(flat, 1.0, sine)
    # slerp (Shoemake 1985); a plain mean where both ends are one point
    near = np.where(flat, 1 - share, np.sin((1 - share) * angle) / safe)
    far = np.where(flat, share, np.sin(share * angle) / safe)
    lat, lon = lat_lon(near * start[:, None] + far * end[:, None])
    lines = []
    for row in np.flatnonzero(np.isfinite(lat).all(axis=1)):
        way = unwrap(lat[row], lon[row])
        lines += [(int(row), view.project(lat[row], way + move)) for move in ring_copies(view, lat[row], way)]
    return lines
