"""The ground of every map: sea, land, graticule or degrees along the edge, a scale bar, and the globe's outline.

It draws rings that it is handed, simplified to the pixel, and knows no country. The figure is as wide as every other
picture; its height follows the view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import shapely
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

from hedwig.geo import EARTH_RADIUS_KM
from hedwig.report.content import Floats
from hedwig.report.drawing import COAST, INK, LAND, MUTED, PALE, SEA, WIDTH_IN, new_figure
from hedwig.report.view import View, polygon_path

__all__ = ["MARGIN_IN", "clip_to", "globe_patch", "land_paths", "new_map"]

MARGIN_IN, TOP_IN, BOTTOM_IN = 0.2, 0.68, 0.6


def new_map(view: View, land: Sequence[Floats]) -> tuple[Figure, Axes, PathPatch | None]:
    """A figure with sea, land and graticule, its axes filling the view, and the patch that clips to the globe."""
    left_in = MARGIN_IN + (0.45 if view.regional else 0.0)
    bottom_in = BOTTOM_IN + (0.25 if view.regional else 0.0)
    width_in = WIDTH_IN - left_in - MARGIN_IN
    height_in = width_in / view.ratio
    total_in = height_in + TOP_IN + bottom_in
    figure = new_figure(WIDTH_IN, total_in)
    axes = figure.add_axes(
        (left_in / WIDTH_IN, bottom_in / total_in, width_in / WIDTH_IN, height_in / total_in), facecolor="white"
    )
    axes.set_xlim(view.extent[0], view.extent[1])
    axes.set_ylim(view.extent[2], view.extent[3])
    ground = SEA if len(land) else "#f7f6f3"
    clip = globe_patch(axes, view, ground)
    if clip is None:
        axes.set_facecolor(ground)
        _region_frame(axes, view)
    else:
        axes.axis("off")
        _graticule(axes, view, clip)
    paths = land_paths(view, land)
    if paths:
        shapes = PathCollection(paths, facecolors=LAND, edgecolors=COAST, linewidths=0.5, zorder=2)
        axes.add_collection(shapes, autolim=False)
        clip_to(shapes, clip)
    return figure, axes, clip


def globe_patch(axes: Axes, view: View, ground: str) -> PathPatch | None:
    """The globe in the colour of the ground, added to the axes, to clip with; None for a region."""
    globe = view.globe()
    if globe is None:
        return None
    patch = PathPatch(globe, facecolor=ground, edgecolor=PALE, linewidth=0.8, zorder=0)
    axes.add_patch(patch)
    return patch


def land_paths(view: View, land: Sequence[Floats]) -> list[Outline]:
    """Rings as paths in the view, simplified to a pixel; what is smaller than a pixel is left out."""
    rings = [np.asarray(ring, dtype=np.float64) for ring in land]
    rings = [r for r in rings if r.ndim == 2 and len(r) >= 3 and max(np.ptp(r, axis=0)) > view.pixel_deg]
    if not rings:
        return []
    lines = shapely.linestrings(
        np.concatenate(rings)[:, ::-1], indices=np.repeat(np.arange(len(rings)), [len(r) for r in rings])
    )
    polygons = [shapely.polygons(r) for r in map(_closed, shapely.simplify(lines, view.pixel_deg / 2)) if len(r) >= 4]
    return [path for path in (polygon_path(view, p) for p in polygons) if path is not None]


def _closed(line: Any) -> Floats:
    coords = shapely.get_coordinates(line)
    return coords if (coords[0] == coords[-1]).all() else np.concatenate([coords, coords[:1]])


def _graticule(axes: Axes, view: View, clip: PathPatch) -> None:
    """Meridians and parallels: every 30° of the Earth, every 10° of a part."""
    step = 30 if view.extent[1] - view.extent[0] > 3 else 10
    along = np.linspace(-180.0, 180.0, 121)
    lines = [view.project(along / 2, np.full(121, float(m) - view.lon0)) for m in range(-360, 361, step)]
    lines += [view.project(np.full(121, float(p)), along) for p in range(-90 + step, 90, step)]
    grid = LineCollection(lines, colors="#dfe6eb", linewidths=0.6, zorder=1)
    axes.add_collection(grid, autolim=False)
    clip_to(grid, clip)


def _region_frame(axes: Axes, view: View) -> None:
    """Degrees along the edges and a scale bar, drawn with the shortened longitudes of the view."""
    left, right, bottom, top = view.extent
    shorten = float(np.cos(np.radians(view.lat0)))
    for axis, low, high, factor, marks in (
        (axes.xaxis, left, right, shorten, "EW"),
        (axes.yaxis, bottom, top, 1.0, "NS"),
    ):
        shift = view.lon0 if marks == "EW" else 0.0
        step = _round_step((high - low) / factor / (7 if marks == "EW" else 5))
        values = np.arange(np.ceil((low / factor + shift) / step), np.floor((high / factor + shift) / step) + 1) * step
        digits = max(0, -int(np.floor(np.log10(step) + 1e-9)))
        wrapped = (values + 180.0) % 360.0 - 180.0 if marks == "EW" else values
        # neither the equator, nor Greenwich, nor the antimeridian is on one side
        sides = ["" if min(abs(v), 180.0 - abs(v)) < step / 9 else marks[0 if v > 0 else 1] for v in wrapped]
        names = [f"{abs(v):.{digits}f}°{side}" for v, side in zip(wrapped, sides, strict=True)]
        axis.set_ticks((values - shift) * factor, labels=names)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=MUTED)
    axes.grid(True, color="#dfe6eb", linewidth=0.6, zorder=1)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(PALE)
    km_per_unit = float(np.radians(EARTH_RADIUS_KM))
    bar_km = _round_step((right - left) * km_per_unit / 7)
    x, y = left + 0.03 * (right - left), bottom + 0.05 * (top - bottom)
    axes.plot([x, x + bar_km / km_per_unit], [y, y], color=INK, linewidth=2, solid_capstyle="butt", zorder=15)
    axes.text(x, y + 0.015 * (top - bottom), f"{bar_km:g} km", size=8.5, color=INK, va="bottom", zorder=15)


def _round_step(value: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten not above `value`."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(max(s for s in (1, 2, 5) if s <= value / power + 1e-9) * power)


def clip_to(artist: Any, clip: PathPatch | None) -> None:
    """Cut an artist off at the edge of the globe; a region is cut off by its axes."""
    if clip is not None:
        artist.set_clip_path(clip)
