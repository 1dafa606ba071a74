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
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from hedwig.report.content import Floats, column
from hedwig.report.drawing import BLUE, INK, MUTED, VERMILLION, WIDTH_IN, error_scale, say_empty, title
from hedwig.report.ground import MARGIN_IN, clip_to, land_paths, new_map
from hedwig.report.tables import THRESHOLDS_KM
from hedwig.report.view import View, fit_view, great_circles, polygon_path

__all__ = ["draw_errors", "draw_geocells", "draw_panoramas", "error_bar"]

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
    figure, axes, clip = new_map(view, land)
    title(figure, "Where the panoramas are", _view_words(view), synthetic)
    styles = [("reference panoramas", BLUE, 0.7), ("queries", VERMILLION, 0.9)]
    handles = []
    for layer, ((lat, lon), (name, colour, alpha)) in enumerate(zip(sets, styles, strict=True)):
        size = float(np.clip(9000 / max(len(lat), 1), 2.0, 22.0))
        alpha *= float(np.clip((4000 / max(len(lat), 1)) ** 0.3, 0.35, 1.0))
        dots = axes.scatter(*_xy(view, lat, lon), s=size, c=colour, alpha=alpha, linewidths=0.25 if size > 5 else 0,
            edgecolors="white", zorder=5 + layer,
        )  # fmt: skip
        clip_to(dots, clip)
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
    figure, axes, clip = new_map(view, land)
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
    clip_to(cells, clip)
    coast = PathCollection(
        land_paths(view, land), facecolors="none", edgecolors=INK, linewidths=0.35, alpha=0.45, zorder=5
    )
    axes.add_collection(coast, autolim=False)
    clip_to(coast, clip)
    size = float(np.clip(1500 / len(drawn), 0.8, 10.0))
    dots = axes.scatter(*_xy(view, lat, lon), s=size, c="white", edgecolors=INK, linewidths=0.3, zorder=6)
    clip_to(dots, clip)
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
    figure, axes, clip = new_map(view, land)
    norm, scale = LogNorm(1.0, 20_000.0, clip=True), error_scale()
    order = np.argsort(-error, kind="stable")
    # the same lines for the same run: every k-th of the queries in order of error, so all sizes are shown
    shown = order[:: 1 + len(order) // MAX_WAYS] if len(order) > MAX_WAYS else order
    ways = great_circles(view, lat[shown], lon[shown], pred_lat[shown], pred_lon[shown])
    lines = LineCollection(
        [line for _, line in ways], colors=[scale(norm(error[shown[row]])) for row, _ in ways] or None,
        linewidths=0.8, alpha=float(np.clip(6 / np.sqrt(max(len(shown), 1)), 0.25, 0.9)), zorder=4,
    )  # fmt: skip
    axes.add_collection(lines, autolim=False)
    size = float(np.clip(6000 / max(len(lat), 1), 7.0, 36.0))
    dots = axes.scatter(*_xy(view, lat[order], lon[order]), s=size, c=error[order], cmap=scale, norm=norm,
        edgecolors="white", linewidths=0.4, zorder=6,
    )  # fmt: skip
    ends = axes.scatter(
        *_xy(view, pred_lat[shown], pred_lon[shown]), s=size / 3, facecolors="white", edgecolors=INK, linewidths=0.4,
        zorder=5,
    )  # fmt: skip
    clip_to(lines, clip)
    clip_to(ends, clip)
    clip_to(dots, clip)
    words = f"{len(lat):,} queries at their true place; a line leads to the answer (ring)"
    if len(shown) < len(lat):
        words += f" (drawn for {len(shown):,}, evenly over the errors)"
    title(figure, "Where the answers went", words, synthetic)
    if not len(lat):
        say_empty(axes, "No query has both a known position and an answer.")
        return figure
    error_bar(figure, dots, "error")
    return figure


def error_bar(figure: Figure, mappable: Any, words: str, ticks_km: Sequence[int] = ()) -> None:
    """The colour bar of errors, by default 1 to 20,000 km with the names of the thresholds."""
    bar = _bar(figure, mappable, words, width_in=5.6)
    if ticks_km:
        bar.set_ticks(list(ticks_km), labels=[f"{km:,} km" for km in ticks_km])
        return
    bar.set_ticks([int(km) for km in THRESHOLDS_KM] + [20_000])
    bar.set_ticklabels([f"{int(km):,} km\n{word}" for km, word in THRESHOLDS_KM.items()] + ["20,000 km\nantipode"])


def _bar(figure: Figure, mappable: Any, words: str, width_in: float = 3.0) -> Colorbar:
    """A slim horizontal colour bar under the map, its words at its left end."""
    total_in = figure.get_size_inches()[1]
    figure.text(MARGIN_IN / WIDTH_IN, 0.435 / total_in, words, size=9, color=INK, va="center", parse_math=False)
    start_in = MARGIN_IN + 0.12 + 0.068 * len(words)
    axes = figure.add_axes((start_in / WIDTH_IN, 0.38 / total_in, width_in / WIDTH_IN, 0.11 / total_in))
    bar = figure.colorbar(mappable, cax=axes, orientation="horizontal")
    bar.solids.set_alpha(1.0) if bar.solids is not None else None
    bar.outline.set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=MUTED, pad=2)
    axes.minorticks_off()
    return bar


def _legend(figure: Figure, handles: list[Line2D]) -> None:
    total_in = figure.get_size_inches()[1]
    figure.legend(
        handles=handles, loc="center right", bbox_to_anchor=(1 - MARGIN_IN / WIDTH_IN, 0.42 / total_in),
        ncols=len(handles), frameon=False, fontsize=9, labelcolor=INK, handletextpad=0.3,
        columnspacing=1.4, borderpad=0,
    )  # fmt: skip


def _dot(colour: str, label: str) -> Line2D:
    return Line2D([], [], ls="", marker="o", ms=5.5, color=colour, label=label)


def _xy(view: View, lat: Floats, lon: Floats) -> tuple[Floats, Floats]:
    x, y = view.points(lat, lon).T
    return x, y


def _finite(lat: ArrayLike, lon: ArrayLike) -> tuple[Floats, Floats]:
    lats, lons = (np.ravel(np.asarray(v, dtype=np.float64)) for v in (lat, lon))
    keep = np.isfinite(lats) & np.isfinite(lons)
    return lats[keep], lons[keep]


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
    return "Equal Earth projection: areas are true" + (
        "" if whole else f", centred on {abs(view.lon0):.0f}°{'E' if view.lon0 >= 0 else 'W'}"
    )
