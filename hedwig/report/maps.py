"""Three maps: where the panoramas are, how the land is cut into geocells, and where the answers went wrong.

Each function takes plain arrays and returns a figure; nothing is fetched, the land is whatever rings are handed in
(none is allowed: the graticule is then the only ground). What cannot be drawn is said in the picture instead of raised,
because a report of an empty run is still a report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import shapely
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from numpy.typing import ArrayLike

from hedwig.geo import EARTH_RADIUS_KM
from hedwig.report.content import Floats, column
from hedwig.report.drawing import (
    BLUE,
    COAST,
    INK,
    LAND,
    MUTED,
    PALE,
    SEA,
    VERMILLION,
    error_scale,
    new_figure,
    say_empty,
    title,
)  # fmt: skip
from hedwig.report.tables import THRESHOLDS_KM
from hedwig.report.view import View, fit_view, great_circles, polygon_path

__all__ = ["draw_errors", "draw_geocells", "draw_panoramas"]

WIDTH_IN, MARGIN_IN, TOP_IN, BOTTOM_IN = 10.0, 0.2, 0.7, 0.62
MAX_WAYS = 400


def draw_panoramas(
    train: tuple[ArrayLike, ArrayLike],
    queries: tuple[ArrayLike, ArrayLike],
    land: Sequence[Floats],
    *,
    synthetic: bool = False,
) -> Figure:
    """Where reference panoramas and queries lie; each a pair of lat (N,) and lon (N,) in degrees."""
    sets = [_finite(*train), _finite(*queries)]
    lat, lon = np.concatenate([s[0] for s in sets]), np.concatenate([s[1] for s in sets])
    view = fit_view(lat, lon)
    figure, axes, clip = _ground(view, land)
    title(figure, "Where the panoramas are", _view_words(view), synthetic)
    styles = [("reference panoramas", BLUE, 0.7), ("queries", VERMILLION, 0.9)]
    handles = []
    for layer, ((lat, lon), (name, colour, alpha)) in enumerate(zip(sets, styles, strict=True)):
        size = float(np.clip(9000 / max(len(lat), 1), 2.0, 22.0))
        alpha *= float(np.clip((4000 / max(len(lat), 1)) ** 0.3, 0.35, 1.0))
        dots = axes.scatter(
            *view.points(lat, lon).T, s=size, c=colour, alpha=alpha, linewidths=0.25 if size > 5 else 0,
            edgecolors="white", zorder=5 + layer,
        )  # fmt: skip
        _clip(dots, clip)
        handles.append(_dot(colour, f"{len(lat):,} {name}"))
    if not len(sets[0][0]) and not len(sets[1][0]):
        say_empty(axes, "No panorama of this run has a position.")
    _legend(figure, handles)
    return figure


def draw_geocells(geocells: Any, land: Sequence[Floats], *, synthetic: bool = False) -> Figure:
    """The geocells coloured by how many training panoramas each holds, with their centroids.

    Args:
        geocells: a GeoDataFrame with ``geometry`` (may be split at the antimeridian, with holes) and, where known,
            ``lat``, ``lon`` (degrees) and ``num_panoramas``; or None.
        land: country outlines, each (K, 2) of lat, lon.
        synthetic: say so in the picture.
    """
    num_cells = 0 if geocells is None else len(geocells)
    columns: dict[str, Any] = {} if geocells is None else {name: geocells[name] for name in geocells.columns}
    shapes = list(geocells.geometry) if num_cells else []
    lat, lon = column(columns, "lat", num_cells), column(columns, "lon", num_cells)
    count = column(columns, "num_panoramas", num_cells)
    view = fit_view(*_corners(shapes, lat, lon))
    figure, axes, clip = _ground(view, land)
    drawn = [(path, n) for path, n in ((polygon_path(view, s), n) for s, n in zip(shapes, count, strict=True)) if path]
    words = f"{num_cells:,} cells" + (f", {int(np.nansum(count)):,} training panoramas" if num_cells else "")
    title(figure, "Geocells", f"{words} · {_view_words(view)}", synthetic)
    if not drawn:
        say_empty(axes, "This run has no geocells to draw.")
        return figure
    seen = np.array([n for _, n in drawn])
    low, high = _range(seen)
    norm = LogNorm(max(low, 1.0), high) if high > 20 * max(low, 1.0) else Normalize(low, high)
    cells = PathCollection(
        [path for path, _ in drawn], array=np.ma.masked_invalid(seen), cmap="viridis", norm=norm, alpha=0.85,
        edgecolors="white", linewidths=float(np.clip(9.0 / np.sqrt(len(drawn)), 0.2, 0.9)), zorder=4,
    )  # fmt: skip
    axes.add_collection(cells, autolim=False)
    _clip(cells, clip)
    size = float(np.clip(1500 / len(drawn), 0.8, 10.0))
    dots = axes.scatter(*view.points(lat, lon).T, s=size, c="white", edgecolors=INK, linewidths=0.3, zorder=6)
    _clip(dots, clip)
    if np.isfinite(seen).any():
        bar = _bar(figure, cells, "training panoramas per cell")
        if isinstance(norm, LogNorm):
            ticks = [
                t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10**4, 10**5) if low <= t <= high
            ]
            bar.set_ticks(ticks[:: 1 + len(ticks) // 8], labels=[f"{t:,}" for t in ticks[:: 1 + len(ticks) // 8]])
    _legend(figure, [Line2D([], [], ls="", marker="o", ms=4, mfc="white", mec=INK, mew=0.6, label="mean position")])
    return figure


def draw_errors(queries: Mapping[str, Any], land: Sequence[Floats], *, synthetic: bool = False) -> Figure:
    """Queries coloured by their error on a log scale, with the great circle from the truth to the answer.

    Args:
        queries: columns ``lat, lon, pred_lat, pred_lon`` (degrees) and ``error_km``, each (Q,).
        land: country outlines, each (K, 2) of lat, lon.
        synthetic: say so in the picture.
    """
    names = ("lat", "lon", "pred_lat", "pred_lon", "error_km")
    num_rows = max((len(np.ravel(queries[name])) for name in names if queries.get(name) is not None), default=0)
    table = np.stack([column(queries, name, num_rows) for name in names])
    lat, lon, pred_lat, pred_lon, error = table[:, np.isfinite(table).all(axis=0)]
    view = fit_view(np.concatenate([lat, pred_lat]), np.concatenate([lon, pred_lon]))
    figure, axes, clip = _ground(view, land)
    norm, scale = LogNorm(1.0, 20_000.0, clip=True), error_scale()
    order = np.argsort(-error, kind="stable")
    # the same lines for the same run: every k-th of the queries in order of error, so all sizes are shown
    shown = order[:: 1 + len(order) // MAX_WAYS] if len(order) > MAX_WAYS else order
    ways = great_circles(view, lat[shown], lon[shown], pred_lat[shown], pred_lon[shown])
    lines = LineCollection(
        [line for _, line in ways], colors=[scale(norm(error[shown[row]])) for row, _ in ways] or None,
        linewidths=0.9, alpha=float(np.clip(12 / np.sqrt(max(len(shown), 1)), 0.3, 0.9)), zorder=4,
    )  # fmt: skip
    axes.add_collection(lines, autolim=False)
    size = float(np.clip(6000 / max(len(lat), 1), 7.0, 36.0))
    dots = axes.scatter(
        *view.points(lat[order], lon[order]).T, s=size, c=error[order], cmap=scale, norm=norm, edgecolors="white",
        linewidths=0.4, zorder=6,
    )  # fmt: skip
    _clip(lines, clip)
    _clip(dots, clip)
    words = f"{len(lat):,} queries at their true place; a line leads to the answer"
    if len(shown) < len(lat):
        words += f" (drawn for {len(shown):,}, evenly over the errors)"
    title(figure, "Where the answers went", words, synthetic)
    if not len(lat):
        say_empty(axes, "No query has both a known position and an answer.")
        return figure
    bar = _bar(figure, dots, "error", width_in=6.4)
    bar.set_ticks([int(km) for km in THRESHOLDS_KM] + [20_000])
    bar.set_ticklabels([f"{int(km):,} km\n{word}" for km, word in THRESHOLDS_KM.items()] + ["20,000 km\nantipode"])
    bar.ax.minorticks_off()
    return figure


def _ground(view: View, land: Sequence[Floats]) -> tuple[Figure, Axes, PathPatch | None]:
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
    globe = view.globe()
    ground = SEA if len(land) else "#f7f6f3"
    clip: PathPatch | None = None
    if globe is None:
        axes.set_facecolor(ground)
        _region_frame(axes, view)
    else:
        axes.axis("off")
        clip = PathPatch(globe, facecolor=ground, edgecolor=PALE, linewidth=0.8, zorder=0)
        axes.add_patch(clip)
        _graticule(axes, view, clip)
    paths = _land_paths(view, land)
    if paths:
        shapes = PathCollection(paths, facecolors=LAND, edgecolors=COAST, linewidths=0.5, zorder=2)
        axes.add_collection(shapes, autolim=False)
        _clip(shapes, clip)
    return figure, axes, clip


def _land_paths(view: View, land: Sequence[Floats]) -> list[Outline]:
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
    _clip(grid, clip)


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
        names = [f"{abs(v):.{digits}f}°{'' if abs(v) < step / 9 else marks[0 if v > 0 else 1]}" for v in wrapped]
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


def _bar(figure: Figure, mappable: Any, words: str, width_in: float = 3.6) -> Colorbar:
    """A slim horizontal colour bar under the map, its words at its left end."""
    total_in = figure.get_size_inches()[1]
    figure.text(MARGIN_IN / WIDTH_IN, 0.435 / total_in, words, size=9, color=INK, va="center", parse_math=False)
    start_in = MARGIN_IN + 0.12 + 0.068 * len(words)
    axes = figure.add_axes((start_in / WIDTH_IN, 0.38 / total_in, width_in / WIDTH_IN, 0.11 / total_in))
    bar = figure.colorbar(mappable, cax=axes, orientation="horizontal")
    bar.solids.set_alpha(1.0) if bar.solids is not None else None
    bar.outline.set_visible(False)  # type: ignore[operator]
    axes.tick_params(length=0, labelsize=8, labelcolor=MUTED, pad=2)
    return bar


def _legend(figure: Figure, handles: list[Line2D]) -> None:
    total_in = figure.get_size_inches()[1]
    figure.legend(
        handles=handles, loc="center right", bbox_to_anchor=(1 - MARGIN_IN / WIDTH_IN, 0.42 / total_in),
        ncols=len(handles), frameon=False, fontsize=9, labelcolor=INK, handletextpad=0.3, columnspacing=1.4, borderpad=0,
    )  # fmt: skip


def _dot(colour: str, label: str) -> Line2D:
    return Line2D([], [], ls="", marker="o", ms=5.5, color=colour, label=label)


def _clip(artist: Any, clip: PathPatch | None) -> None:
    if clip is not None:
        artist.set_clip_path(clip)


def _finite(lat: ArrayLike, lon: ArrayLike) -> tuple[Floats, Floats]:
    lat, lon = (np.ravel(np.asarray(v, dtype=np.float64)) for v in (lat, lon))
    keep = np.isfinite(lat) & np.isfinite(lon)
    return lat[keep], lon[keep]


def _corners(shapes: list[Any], lat: Floats, lon: Floats) -> tuple[Floats, Floats]:
    """Positions that a view of the cells must hold: the corners of their boxes part by part, and their centroids."""
    parts = shapely.get_parts(np.array([s for s in shapes if s is not None], dtype=object))
    boxes = shapely.bounds(parts).reshape(-1, 4)
    # a box wider than half the globe crosses the antimeridian undivided: its centroid must do
    boxes = boxes[boxes[:, 2] - boxes[:, 0] < 180.0]
    return np.concatenate([boxes[:, 1], boxes[:, 3], lat]), np.concatenate([boxes[:, 0], boxes[:, 2], lon])


def _range(values: Floats) -> tuple[float, float]:
    """Lowest and highest finite value, apart from each other even where they are one."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return low, max(high, low + 1.0)


def _view_words(view: View) -> str:
    if view.regional:
        return "equirectangular, true to scale in the middle"
    whole = view.extent[1] - view.extent[0] > 5.3
    return "Equal Earth projection: areas are true" + ("" if whole else f", turned to {view.lon0:.0f}° of longitude")
