"""The map of a plan or a table: positions over the outlines of their regions, as in the paper's Figure 1.

One drawing for both, in Equal Earth (areas are true, so density is what it looks like), turned to the data's own
meridian and cropped to it. A few regions far from the rest (Alaska, Hawaii) would shrink everything else: they get a
strip of their own below. The look is that of the report's maps, whose module is on the same floor and not imported.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from numpy.typing import ArrayLike, NDArray

from hedwig.geo import equal_earth, haversine_km, spherical_mean

__all__ = ["draw_positions", "png_bytes", "shortest_arc"]

Floats = NDArray[np.float64]

INK, MUTED, PALE, BLUE = "#1f2933", "#66727f", "#cbd2d9", "#0072b2"
LAND, SEA, GRID, REGION, BORDER = "#e3e0d8", "#f3f7fa", "#dfe6eb", "#faf8f3", "#b5aea2"
WIDTH_IN, MARGIN_IN, TOP_IN, BOTTOM_IN, STRIP_IN = 8.4, 0.2, 0.68, 0.2, 1.35
WORLD_DEG, FAR_KM, MAIN_SHARE, MAX_INSETS = 150.0, 1500.0, 0.9, 4


@dataclass(frozen=True)
class _View:
    """A window on the map: its middle meridian in degrees, and left, right, bottom, top in map coordinates."""

    lon0: float
    extent: tuple[float, float, float, float]
    whole: bool

    @property
    def ratio(self) -> float:
        left, right, bottom, top = self.extent
        return (right - left) / (top - bottom)

    @property
    def pixel_deg(self) -> float:
        return float(np.degrees(self.extent[1] - self.extent[0]) / 1700)

    def points(self, lat: ArrayLike, lon: ArrayLike) -> Floats:
        """(N, 2) map coordinates."""
        away = (np.asarray(lon, dtype=np.float64) - self.lon0 + 180.0) % 360.0 - 180.0
        return np.stack(equal_earth(lat, away), axis=-1)


def draw_positions(
    lat: ArrayLike,
    lon: ArrayLike,
    land: Sequence[Floats],
    *,
    title: str,
    subtitle: str = "",
    outlines: Sequence[Any] = (),
    region: Sequence[str] | None = None,
    names: Sequence[str] = (),
) -> Figure:
    """Positions (N,) in degrees over land and the outlines of regions.

    Args:
        lat: degrees; rows that are not finite are left out.
        lon: degrees.
        land: closed rings (K, 2) of lat, lon, as `Geography.land_rings` gives them.
        title: the heading.
        subtitle: a quiet line under it.
        outlines: shapes of the regions, longitudes in [-180, 180].
        region: the region of each position; with it, few regions far from the rest are drawn in insets.
        names: the region of each outline, for the insets.
    """
    lats, lons = (np.ravel(np.asarray(v, dtype=np.float64)) for v in (lat, lon))
    keep = np.isfinite(lats) & np.isfinite(lons)
    owner = np.asarray([""] * len(lats) if region is None else [str(r) for r in region], dtype=object)
    lats, lons, owner = lats[keep], lons[keep], owner[keep]
    shapes = np.array([*outlines, None], dtype=object)[:-1]
    named = np.array([str(name) for name in names] if len(names) == len(shapes) else [""] * len(shapes), dtype=object)
    parts = _groups(lats, lons, owner)
    views = [
        _fit(lats[here], lons[here], shapes[np.isin(named.astype(str), groups)] if region is not None else shapes)
        for here, groups in parts
    ]
    strip_in = STRIP_IN if len(parts) > 1 else 0.0
    width_in = WIDTH_IN - 2 * MARGIN_IN
    height_in = width_in / views[0].ratio
    total_in = TOP_IN + height_in + BOTTOM_IN + strip_in
    figure = Figure(figsize=(WIDTH_IN, total_in), facecolor="white")
    FigureCanvasAgg(figure)
    left = MARGIN_IN / WIDTH_IN
    figure.text(left, 1 - 0.14 / total_in, title, size=13, weight="bold", color=INK, va="top", parse_math=False)
    figure.text(left, 1 - 0.40 / total_in, subtitle, size=9, color=MUTED, va="top", parse_math=False)
    bottom_in = BOTTOM_IN + strip_in
    main = figure.add_axes((left, bottom_in / total_in, width_in / WIDTH_IN, height_in / total_in))
    size = float(np.clip(7_000 / max(len(lats), 1), 1.4, 13.0))
    _draw(main, views[0], lats, lons, land, shapes, size)
    if not len(lats):
        main.text(0.5, 0.5, "No row has a position.", transform=main.transAxes, ha="center", va="center", color=MUTED)
    x_in, inset_in = MARGIN_IN, strip_in - 0.32
    for view, (_, groups) in zip(views[1:], parts[1:], strict=True):
        wide_in = min(inset_in * view.ratio, (width_in - 0.15 * (len(parts) - 2)) / (len(parts) - 1))
        axes = figure.add_axes(
            (x_in / WIDTH_IN, (BOTTOM_IN + 0.02) / total_in, wide_in / WIDTH_IN, inset_in / total_in)
        )
        _draw(axes, view, lats, lons, land, shapes, size * 1.6)
        words = ", ".join(groups) if len(groups) <= 3 else f"{len(groups)} regions"
        figure.text(x_in / WIDTH_IN, (BOTTOM_IN + inset_in + 0.07) / total_in, words, size=8, color=MUTED)
        x_in += wide_in + 0.15
    return figure


def png_bytes(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": "hedwig"})
    return buffer.getvalue()


def _groups(lat: Floats, lon: Floats, owner: NDArray[np.object_]) -> list[tuple[NDArray[np.bool_], list[str]]]:
    """Which positions to draw together: the main body first, then far groups of regions, if they are few."""
    names = sorted(set(owner.tolist()))
    everything = [(np.ones(len(lat), dtype=bool), names)]
    if not 1 < len(names) <= 5000:
        return everything
    rows = [np.flatnonzero(owner == name) for name in names]
    try:
        middles = np.array([spherical_mean(lat[r], lon[r]) for r in rows])
    except ValueError:  # a region of antipodes has no middle
        return everything
    group = np.full(len(names), -1)
    for start in range(len(names)):
        if group[start] >= 0:
            continue
        group[start], queue = start, [start]
        while queue:
            i = queue.pop()
            km = haversine_km(middles[i, 0], middles[i, 1], middles[:, 0], middles[:, 1])
            near = np.flatnonzero((km < FAR_KM) & (group < 0))
            group[near] = start
            queue += near.tolist()
    members = [[names[i] for i in np.flatnonzero(group == g)] for g in np.unique(group)]
    found = [(np.isin(owner.astype(str), m), m) for m in members]
    found.sort(key=lambda pair: (-int(pair[0].sum()), pair[1]))
    few = 1 < len(found) <= MAX_INSETS + 1 and found[0][0].mean() >= MAIN_SHARE
    return found if few and shortest_arc(lon[found[0][0]])[1] < WORLD_DEG else everything


def shortest_arc(lon: Floats) -> tuple[float, float]:
    """Middle and width in degrees of the shortest arc that holds all longitudes."""
    turned = np.unique(lon % 360.0)
    gaps = np.diff(np.append(turned, turned[0] + 360.0))
    widest = int(np.argmax(gaps))
    width = 360.0 - float(gaps[widest])
    return float((turned[(widest + 1) % len(turned)] + width / 2 + 180.0) % 360.0 - 180.0), width


def _fit(lat: Floats, lon: Floats, shapes: NDArray[np.object_]) -> _View:
    right, top = float(equal_earth(0.0, 180.0)[0]), float(equal_earth(90.0, 0.0)[1])
    world = _View(0.0, (-right * 1.01, right * 1.01, -top * 1.02, top * 1.02), True)
    if not len(lat):
        return world
    if len(shapes):
        corners = shapely.get_coordinates(shapely.simplify(shapes, 0.02))
        lat, lon = np.concatenate([lat, corners[:, 1]]), np.concatenate([lon, corners[:, 0]])
    lon0, width = shortest_arc(lon)
    if width >= WORLD_DEG:
        return world
    turned = _View(lon0, world.extent, False)
    seen = turned.points(lat, lon)
    middle = (seen.min(axis=0) + seen.max(axis=0)) / 2
    size = np.maximum(1.06 * np.ptp(seen, axis=0), 0.01)
    size = np.array([max(size[0], 1.35 * size[1]), max(size[1], size[0] / 2.2)])
    (left, bottom), (right, top) = middle - size / 2, middle + size / 2
    return _View(lon0, (float(left), float(right), float(bottom), float(top)), False)


def _draw(
    axes: Axes, view: _View, lat: Floats, lon: Floats, land: Sequence[Floats], shapes: NDArray[np.object_], size: float
) -> None:
    axes.set_xlim(view.extent[0], view.extent[1])
    axes.set_ylim(view.extent[2], view.extent[3])
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(PALE)
        spine.set_visible(not view.whole)
    clip: Any = None
    if view.whole:
        edge_lat = np.linspace(-90.0, 90.0, 91)
        ends = [np.stack(equal_earth(edge_lat[::s], np.full(91, 180.0 * s)), axis=-1) for s in (1, -1)]
        clip = PathPatch(Outline(np.concatenate([*ends, ends[0][:1]])), facecolor=SEA, edgecolor=PALE, linewidth=0.8)
        axes.add_patch(clip)
    else:
        axes.set_facecolor(SEA)
    step = 30 if view.whole else 10
    along = np.linspace(-180.0, 180.0, 121)
    meridians = [np.stack(equal_earth(along / 2, np.full(121, m - view.lon0)), axis=-1) for m in range(-360, 361, step)]
    parallels = [np.stack(equal_earth(np.full(121, float(p)), along), axis=-1) for p in range(-90 + step, 90, step)]
    layers: list[Any] = [LineCollection([*meridians, *parallels], colors=GRID, linewidths=0.6, zorder=1)]
    # rings may be slightly crossed after simplification: drawing does not mind
    countries = [shapely.Polygon(ring[:, ::-1]) for ring in land if len(ring) >= 4]
    coast = 0.3 if view.whole else 0.5
    ground = [path for path in (_path(view, shape) for shape in countries) if path is not None]
    regions = [path for path in (_path(view, shape) for shape in shapes) if path is not None]
    layers.append(PathCollection(ground, facecolors=LAND, edgecolors="white", linewidths=coast, zorder=2))
    layers.append(PathCollection(regions, facecolors=REGION, edgecolors=BORDER, linewidths=0.3, zorder=3))
    for layer in layers:
        axes.add_collection(layer, autolim=False)
    x, y = view.points(lat, lon).T
    dots = axes.scatter(
        x, y, s=size, c=BLUE, alpha=float(np.clip((6000 / max(len(lat), 1)) ** 0.3, 0.35, 0.85)),
        linewidths=0.25 if size > 6 else 0, edgecolors="white", zorder=5,
    )  # fmt: skip
    if clip is not None:
        for artist in (*layers, dots):
            artist.set_clip_path(clip)


def _path(view: _View, shape: Any) -> Outline | None:
    """One compound path of the parts of a shape that the view may show, moved to the view's side of the Earth."""
    vertices: list[Floats] = []
    codes: list[NDArray[np.uint8]] = []
    for part in shapely.get_parts(shapely.get_parts(shapely.simplify(shape, view.pixel_deg / 2))):
        if part.geom_type != "Polygon" or part.is_empty:
            continue
        west, south, east, north = part.bounds
        if max(east - west, north - south) < view.pixel_deg:
            continue
        part = shapely.geometry.polygon.orient(part)
        move = -view.lon0 - 360.0 * round(((west + east) / 2 - view.lon0) / 360.0)
        if not view.whole and _outside(view, south, north, west + move, east + move):
            continue
        for ring in (part.exterior, *part.interiors):
            dense = shapely.get_coordinates(shapely.segmentize(ring, 2.0))
            vertices.append(np.stack(equal_earth(dense[:, 1], dense[:, 0] + move), axis=-1))
            code = np.full(len(dense), Outline.LINETO, dtype=np.uint8)
            code[0], code[-1] = Outline.MOVETO, Outline.CLOSEPOLY
            codes.append(code)
    return Outline(np.concatenate(vertices), np.concatenate(codes)) if vertices else None


def _outside(view: _View, south: float, north: float, west: float, east: float) -> bool:
    """Whether a box in degrees from the middle meridian lies beside the view."""
    x, y = equal_earth(np.array([south, south, north, north, 0.0, 0.0]), np.array([west, east] * 3))
    if not south < 0 < north:
        x, y = x[:4], y[:4]
    left, right, bottom, top = view.extent
    return bool(x.max() < left or x.min() > right or y.max() < bottom or y.min() > top)
