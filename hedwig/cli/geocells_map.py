"""The picture of `hedwig geocells`: one row for each partition, the Earth at its left and a dense part at its right.

Cells are drawn on land only, because the Voronoi region of a coast reaches across the sea and would hide everything
else; all rows share one scale of panoramas per cell, so that two partitions can be compared by eye.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from numpy.typing import NDArray

from hedwig.report.drawing import INK, MUTED, PALE, SEA, new_figure
from hedwig.report.view import View, fit_view, polygon_path, ring_copies

__all__ = ["Panel", "draw_partitions"]

Floats = NDArray[np.float64]

WIDTH_IN, MARGIN_IN, GAP_IN, TOP_IN, CAPTION_IN, BOTTOM_IN = 12.0, 0.25, 0.2, 0.75, 0.42, 0.6
WINDOW_DEG = (11.0, 7.4)  # half of the latitudes, of the detail is half its height
EMPTY = "#e9e6df"
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, 100_000)


@dataclass(frozen=True)
class Panel:
    """One partition to draw.

    Attributes:
        title: its name and settings.
        words: its numbers, on a line of their own.
        polygons: (C,) object array of lon/lat polygons.
        sizes: (C,) panoramas of each cell.
    """

    title: str
    words: str
    polygons: NDArray[np.object_]
    sizes: NDArray[np.int64]


def draw_partitions(
    panels: Sequence[Panel], lat: Floats, lon: Floats, land: Sequence[Floats], detail_land: Sequence[Floats]
) -> Figure:
    """Partitions below each other.

    Args:
        panels: what to draw, at least one.
        lat: degrees (N,) of the panoramas, for the view and the densest part.
        lon: degrees (N,).
        land: closed rings (K, 2) of lat, lon for the whole view.
        detail_land: the same, finer, for the detail.
    """
    whole, detail = fit_view(lat, lon), _densest(lat, lon)
    detail_height = 2 * WINDOW_DEG[1]
    detail_ratio = (detail.extent[1] - detail.extent[0]) / detail_height
    room = WIDTH_IN - 2 * MARGIN_IN - GAP_IN
    height_in = room / (whole.ratio + detail_ratio)
    total_in = TOP_IN + BOTTOM_IN + len(panels) * (height_in + CAPTION_IN)
    figure = new_figure(WIDTH_IN, total_in)
    low = max(1, min(int(panel.sizes.min()) for panel in panels))
    high = max(low + 1, max(int(panel.sizes.max()) for panel in panels))
    norm = LogNorm(low, high)
    figure.text(MARGIN_IN / WIDTH_IN, 1 - 0.16 / total_in, "Geocells", size=15, weight="bold", color=INK, va="top")
    figure.text(
        MARGIN_IN / WIDTH_IN, 1 - 0.46 / total_in, f"{len(lat):,} points; cells drawn on land only; at the right "
        f"{_degrees(detail)}, where the points are densest", size=9.5, color=MUTED, va="top",
    )  # fmt: skip
    drawn: Any = None
    for row, panel in enumerate(panels):
        top = total_in - TOP_IN - row * (height_in + CAPTION_IN)
        figure.text(
            MARGIN_IN / WIDTH_IN, (top - 0.06) / total_in, panel.title, size=11, weight="bold", color=INK, va="top"
        )
        figure.text(
            1 - MARGIN_IN / WIDTH_IN, (top - 0.08) / total_in, panel.words, size=9.5, color=INK, va="top", ha="right"
        )
        left = MARGIN_IN
        for view, ratio, rings in ((whole, whole.ratio, land), (detail, detail_ratio, detail_land)):
            width_in = height_in * ratio
            spot = (
                left / WIDTH_IN,
                (top - CAPTION_IN - height_in + 0.1) / total_in,
                width_in / WIDTH_IN,
                height_in / total_in,
            )
            axes = figure.add_axes(spot)
            drawn = _draw(axes, view, panel, rings, norm)
            left += width_in + GAP_IN
    bar_axes = figure.add_axes(((MARGIN_IN + 1.75) / WIDTH_IN, 0.34 / total_in, 4.2 / WIDTH_IN, 0.13 / total_in))
    figure.text(MARGIN_IN / WIDTH_IN, 0.405 / total_in, "panoramas per cell", size=9.5, color=INK, va="center")
    bar = figure.colorbar(drawn, cax=bar_axes, orientation="horizontal")
    ticks = [tick for tick in TICKS if low <= tick <= high]
    bar.set_ticks(ticks[:: 1 + len(ticks) // 9], labels=[f"{tick:,}" for tick in ticks[:: 1 + len(ticks) // 9]])
    bar.outline.set_visible(False)
    bar_axes.minorticks_off()
    bar_axes.tick_params(length=0, labelsize=8.5, labelcolor=MUTED, pad=2)
    return figure


def _densest(lat: Floats, lon: Floats) -> View:
    """The window of fixed size around the points of that box of 12° by 18° which holds most."""
    boxes = np.stack([np.floor(lat / 12), np.floor(((lon + 180) % 360) / 18)], axis=1)
    _, box, counts = np.unique(boxes, axis=0, return_inverse=True, return_counts=True)
    inside = box.reshape(-1) == np.argmax(counts)
    lat0, lon0 = float(np.clip(np.median(lat[inside]), -75, 75)), float(np.median(lon[inside]))
    extent = (-WINDOW_DEG[0], WINDOW_DEG[0], lat0 - WINDOW_DEG[1], lat0 + WINDOW_DEG[1])
    return View(lon0, lat0, extent, True)


def _degrees(view: View) -> str:
    lat, lon = round(view.lat0), round(view.lon0)
    return f"the surroundings of {abs(lat)}°{'N' if lat >= 0 else 'S'} {abs(lon)}°{'E' if lon >= 0 else 'W'}"


def _draw(axes: Axes, view: View, panel: Panel, land: Sequence[Floats], norm: LogNorm) -> PathCollection:
    left, right, bottom, top = view.extent
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=PALE, linewidth=0.8, visible=view.regional)
    globe = view.globe()
    axes.set_facecolor(SEA)
    if globe is not None:
        # what touches the antimeridian is drawn on both sides of the map; hide what lies beyond its edge
        corners = np.array([[left, bottom], [left, top], [right, top], [right, bottom], [left, bottom]])
        frame = Outline(corners, [Outline.MOVETO] + 3 * [Outline.LINETO] + [Outline.CLOSEPOLY])
        around = Outline.make_compound_path(frame, globe)
        axes.add_patch(PathPatch(around, facecolor="white", edgecolor="none", zorder=8))
        axes.add_patch(PathPatch(globe, facecolor="none", edgecolor=PALE, linewidth=0.8, zorder=9))
    ground = _outline(view, land)
    if ground is not None:
        axes.add_patch(PathPatch(ground, facecolor=EMPTY, edgecolor="none", zorder=1))
    seen = [(polygon_path(view, polygon), size) for polygon, size in zip(panel.polygons, panel.sizes, strict=True)]
    shown = [(path, size) for path, size in seen if path is not None]
    cells = PathCollection(
        [path for path, _ in shown], array=np.array([size for _, size in shown]), cmap="viridis", norm=norm,
        edgecolors="white", linewidths=0.7 if view.regional else float(np.clip(6 / np.sqrt(len(seen)), 0.06, 0.6)),
        zorder=3,
    )  # fmt: skip
    axes.add_collection(cells, autolim=False)
    if ground is not None:
        shore = PathPatch(ground, facecolor="none", edgecolor="#8b97a3", linewidth=0.35, zorder=5)
        axes.add_patch(shore)
        cells.set_clip_path(shore)
    return cells


def _outline(view: View, land: Sequence[Floats]) -> Outline | None:
    """All land of the view as one path."""
    rings = [ring for ring in land if len(ring) >= 4 and max(np.ptp(ring, axis=0)) > view.pixel_deg]
    rings = [ring for ring in rings if ring_copies(view, ring[:, 0], ring[:, 1])]
    polygons = np.array([shapely.polygons(ring[:, ::-1]) for ring in rings], dtype=object)
    if len(polygons) == 0:
        return None
    return polygon_path(view, shapely.union_all(shapely.make_valid(polygons)))
