"""The map of countries by their median error: where the answers are good, and where nobody can say yet.

A country is coloured by the median of its queries, on a scale no wider than the medians; with few queries it is paler,
since a median of five says little. A dot marks the middle of the queries, because an island or a city state has no
visible area. The counts and intervals behind it stand in the page's table of countries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from hedwig.geo import spherical_mean
from hedwig.report.content import Floats, column
from hedwig.report.drawing import INK, error_scale, say_empty, title
from hedwig.report.ground import clip_to, new_map
from hedwig.report.maps import error_bar
from hedwig.report.view import fit_view, polygon_path

__all__ = ["FEW_QUERIES", "draw_countries"]

FEW_QUERIES = 10
STEPS_KM = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)


def draw_countries(
    records: Sequence[Mapping[str, Any]],
    shapes: Any,
    queries: Mapping[str, Any],
    land: Sequence[Floats],
    *,
    synthetic: bool = False,
) -> Figure:
    """Countries coloured by their median error.

    Args:
        records: rows of ``country, num_queries, median_km``.
        shapes: a GeoDataFrame of ``country, geometry``; a country without a shape has its dot alone. Or None.
        queries: columns ``lat, lon`` (degrees) and ``country``, each (Q,).
        land: country outlines, each (K, 2) of lat, lon.
        synthetic: say so in the picture.
    """
    lat, lon = column(queries, "lat"), column(queries, "lon")
    told = np.asarray(queries.get("country", ()), dtype=object).astype(str)
    known = np.isfinite(lat) & np.isfinite(lon)
    view = fit_view(lat[known], lon[known])
    figure, axes, clip = new_map(view, land)
    outline = {} if shapes is None else dict(zip(shapes["country"], shapes.geometry, strict=True))
    rows = [row for row in records if row.get("median_km") is not None and np.isfinite(row["median_km"])]
    steps = _steps([float(row["median_km"]) for row in rows])
    norm, scale = LogNorm(steps[0], steps[-1], clip=True), error_scale()
    paths, colours, middles, sizes = [], [], [], []
    for row in rows:
        colour = scale(norm(max(float(row["median_km"]), 1.0)))
        alpha = 0.9 if row["num_queries"] >= FEW_QUERIES else 0.5
        path = polygon_path(view, outline.get(row["country"]))
        if path is not None:
            paths.append(path)
            colours.append((*colour[:3], alpha))
        own = known & (told == str(row["country"])) if len(told) == len(lat) else np.zeros(len(lat), dtype=bool)
        if own.any():
            middles.append((*spherical_mean(lat[own], lon[own]), float(row["median_km"])))
            sizes.append(float(np.clip(2.2 * np.sqrt(row["num_queries"]), 5.0, 40.0)))
    if paths:
        areas = PathCollection(paths, facecolors=colours, edgecolors="white", linewidths=0.5, zorder=4)
        axes.add_collection(areas, autolim=False)
        clip_to(areas, clip)
    words = f"{len(rows):,} countries; dots grow with the number of queries; pale: fewer than {FEW_QUERIES} queries"
    title(figure, "Median error by country", words, synthetic)
    if not middles and not paths:
        say_empty(axes, "No query has both a known country and an answer.")
        return figure
    places = np.array(middles).reshape(-1, 3)
    x, y = view.points(places[:, 0], places[:, 1]).T
    dots = axes.scatter(
        x, y, s=sizes, c=np.maximum(places[:, 2], 1.0), cmap=scale, norm=norm, edgecolors=INK, linewidths=0.5, zorder=6
    )
    clip_to(dots, clip)
    error_bar(figure, dots, "median error", steps)
    return figure


def _steps(medians_km: list[float]) -> tuple[int, ...]:
    """Round distances from below the smallest median to above the largest, at least two."""
    low, high = (min(medians_km), max(medians_km)) if medians_km else (1.0, 20_000.0)
    first = max((i for i, km in enumerate(STEPS_KM[:-1]) if km <= low), default=0)
    last = min((i for i, km in enumerate(STEPS_KM) if km >= high and i > first), default=len(STEPS_KM) - 1)
    return STEPS_KM[first : last + 1]
