"""Two charts: how the errors of all methods are distributed, and whether radius and confidence may be believed.

The distribution is shown whole instead of at five thresholds, because two methods can agree at 200 km and differ
everywhere else. Confidence is judged by what it is for: answering only the surest queries ought to lower the error, and
among queries of like confidence the share of good answers ought to grow. Neither picture computes a metric that
`hedwig.evaluate` owns; they draw the errors that it measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from hedwig.metrics import wilson_interval
from hedwig.report.content import Floats, column
from hedwig.report.drawing import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PALE,
    PURPLE,
    VERMILLION,
    WIDTH_IN,
    new_figure,
    plain_axes,
    say_empty,
    title,
)  # fmt: skip
from hedwig.report.tables import KINDS, THRESHOLDS_KM, grouped_methods

__all__ = ["draw_calibration", "draw_error_cdf"]

FARTHEST_KM = 20_015.1
METHOD_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE)
FLOOR_GREYS = ("#66727f", "#8d98a3", "#aab4bd")
DASHES = {"method": "-", "floor": (0, (5, 2)), "oracle": (0, (1, 1.3))}
NUM_BINS = 10


def draw_error_cdf(errors_km: Mapping[str, Any], *, synthetic: bool = False) -> Figure:
    """For each method the share of queries with an error below x.

    Args:
        errors_km: method name -> (Q,) errors in km; NaN are left out, a method without any is not drawn.
        synthetic: say so in the picture.
    """
    errors = {name: column(errors_km, name) for name in errors_km}
    errors = {name: np.sort(e[np.isfinite(e)]) for name, e in errors.items()}
    errors = {name: e for name, e in errors.items() if len(e)}
    figure = new_figure(WIDTH_IN, 4.7)
    axes = figure.add_axes((0.07, 0.125, 0.615, 0.67))
    num_queries = max((len(e) for e in errors.values()), default=0)
    title(figure, "How far off the answers are", f"share of {num_queries:,} queries within a distance", synthetic)
    plain_axes(axes)
    axes.tick_params(axis="x", pad=6)
    # a thousandth of the queries may fall off the left end, but never a named threshold
    lowest = min((float(np.quantile(np.maximum(e, 1e-3), 0.02)) for e in errors.values()), default=1.0)
    start = float(np.clip(10 ** np.floor(np.log10(lowest)), 0.01, 0.5))
    axes.set_xscale("log")
    axes.set_xlim(start, FARTHEST_KM)
    axes.set_ylim(0, 1.005)
    _threshold_lines(axes)
    handles: list[Line2D] = []
    for kind, methods in grouped_methods(errors).items():
        handles.append(Line2D([], [], ls="", label=KINDS[kind]))
        for i, method in enumerate(methods):
            e = errors[method.name]
            colour = METHOD_COLOURS[i % 5] if kind == "method" else FLOOR_GREYS[i % 3] if kind == "floor" else INK
            width = 2.6 if method.name == "hedwig" else 1.5
            x = np.concatenate([[start], np.maximum(e, start), [FARTHEST_KM]])
            y = np.concatenate([[np.mean(e <= start)], np.maximum(np.arange(1, len(e) + 1) / len(e), 0), [1.0]])
            y[1:-1] = np.where(e <= start, y[0], y[1:-1])
            (line,) = axes.step(
                x, y, where="post", color=colour, linewidth=width, linestyle=DASHES[kind],
                zorder=6 if method.name == "hedwig" else 4, alpha=1.0 if i < 1 or kind != "oracle" else 0.55,
            )  # fmt: skip
            line.set_label(_ascii(method.label))
            handles.append(line)
    if errors:
        legend = figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.705, 0.81), frameon=False, fontsize=9.5,
            labelcolor=INK, handlelength=2.0, labelspacing=0.45, borderpad=0,
        )  # fmt: skip
        for handle, text in zip(handles, legend.get_texts(), strict=True):
            text.set_parse_math(False)
            if text.get_text() in KINDS.values() and not len(np.ravel(handle.get_xdata())):
                text.set(size=9, color=MUTED, x=-26)
    else:
        say_empty(axes, "No query has both a known position and an answer.")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda km, _: f"{km:,.0f}" if km >= 1 else f"{km:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("great-circle error, km", color=INK, size=9.5)
    return figure


def draw_calibration(queries: Mapping[str, Any], *, coverage: float | None = None, synthetic: bool = False) -> Figure:
    """Is the truth inside the stated radius, and does confidence tell good answers from bad ones?

    Args:
        queries: columns ``error_km``, ``radius_km`` and ``confidence``, each (Q,).
        coverage: share of queries inside their radius as `hedwig.evaluate` measured it; counted here without it.
        synthetic: say so in the picture.
    """
    names = ("error_km", "radius_km", "confidence")
    num_rows = max((len(np.ravel(queries[name])) for name in names if queries.get(name) is not None), default=0)
    error, radius, confidence = (column(queries, name, num_rows) for name in names)
    figure = new_figure(WIDTH_IN, 3.9)
    title(
        figure,
        "May radius and confidence be believed?",
        f"what {num_rows:,} queries said of themselves, and how they fared",
        synthetic,
    )
    panels = [figure.add_axes((left, 0.135, 0.24, 0.62)) for left in (0.075, 0.41, 0.745)]
    for axes in panels:
        plain_axes(axes)
        axes.tick_params(labelsize=8, pad=4)
    _radius_panel(panels[0], error, radius, coverage)
    _selection_panel(panels[1], error, confidence)
    _confidence_panel(panels[2], error, confidence)
    return figure


def _radius_panel(axes: Axes, error: Floats, radius: Floats, coverage: float | None) -> None:
    keep = np.isfinite(error) & np.isfinite(radius) & (radius > 0)
    if not keep.any():
        _heading(axes, "Error against stated radius")
        return say_empty(axes, "no radius was stated")
    error, radius = np.maximum(error[keep], 0.01), np.maximum(radius[keep], 0.01)
    inside = error <= radius
    share = float(inside.mean()) if coverage is None else coverage
    _heading(axes, f"{share:.0%} inside the stated radius")
    low = float(10 ** np.floor(np.log10(max(min(np.quantile(error, 0.01), radius.min()), 0.01))))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, FARTHEST_KM)
    axes.set_ylim(low, FARTHEST_KM)
    axes.fill_between([low, FARTHEST_KM], [low, low], [low, FARTHEST_KM], color=BLUE, alpha=0.06, linewidth=0)
    axes.plot([low, FARTHEST_KM], [low, FARTHEST_KM], color=MUTED, linewidth=1)
    size = float(np.clip(3000 / len(error), 4.0, 20.0))
    for mask, colour in ((inside, BLUE), (~inside, VERMILLION)):
        axes.scatter(radius[mask], error[mask], s=size, color=colour, alpha=0.6, linewidths=0)
    axes.text(0.96, 0.05, "inside", transform=axes.transAxes, ha="right", size=9, color=BLUE)
    axes.text(0.04, 0.95, "outside", transform=axes.transAxes, va="top", size=9, color=VERMILLION)
    ticks = [t for t in (0.01, 0.1, 1, 10, 100, 1_000, 10_000) if t >= low]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, labels=[f"{t:,}" for t in ticks])
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("stated radius, km")
    axes.set_ylabel("error, km", labelpad=1)


def _selection_panel(axes: Axes, error: Floats, confidence: Floats) -> None:
    """Median error of the surest share of the queries: El-Yaniv & Wiener's (2010) risk against coverage."""
    keep = np.isfinite(error) & np.isfinite(confidence)
    _heading(axes, "Answering only the surest")
    if keep.sum() < 5:
        return say_empty(axes, "too few queries with a confidence")
    error = np.maximum(error[keep][np.argsort(-confidence[keep], kind="stable")], 0.01)
    counts = np.unique(np.linspace(min(len(error), max(5, len(error) // 20)), len(error), 80).astype(int))
    medians = np.array([np.median(error[:n]) for n in counts])
    low, high = float(medians.min()) / 2, float(medians.max()) * 2
    axes.set_ylim(low, high)
    axes.set_yscale("log")
    axes.plot(counts / len(error), medians, color=BLUE, linewidth=2.2)
    axes.axhline(float(np.median(error)), color=MUTED, linewidth=1, linestyle=(0, (5, 2)))
    axes.annotate(
        "all queries", (0.0, float(np.median(error))), xytext=(3, 3), textcoords="offset points", size=8.5, color=MUTED
    )
    ticks = [t for p in range(-2, 5) for t in (10**p, 2 * 10**p, 5 * 10**p) if low <= t <= high]
    ticks = ticks if len(ticks) <= 8 else [t for t in ticks if f"{t:g}"[0] == "1" or f"{t:g}".strip("0.")[0] == "1"]
    axes.yaxis.set_ticks(ticks, labels=[f"{t:,g}" for t in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, 1.01)
    axes.set_xticks(np.linspace(0, 1, 5))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of queries answered")
    axes.set_ylabel("median error, km", labelpad=1)


def _confidence_panel(axes: Axes, error: Floats, confidence: Floats) -> None:
    """Share of good answers in equally filled bins of confidence, with Wilson's 95 % intervals."""
    keep = np.isfinite(error) & np.isfinite(confidence)
    _heading(axes, "Outcome by confidence")
    if keep.sum() < 5:
        return say_empty(axes, "too few queries with a confidence")
    order = np.argsort(confidence[keep], kind="stable")
    bins = np.array_split(order, min(NUM_BINS, max(1, len(order) // 10)))
    middle = np.array([confidence[keep][b].mean() for b in bins])
    for km, colour, marker in ((200, BLUE, "o"), (2500, GREEN, "s")):
        shares = np.array([np.mean(error[keep][b] <= km) for b in bins])
        low, high = np.array([wilson_interval(round(s * len(b)), len(b)) for s, b in zip(shares, bins, strict=True)]).T
        axes.vlines(middle, low, high, color=colour, linewidth=1.2, alpha=0.5)
        axes.plot(middle, shares, color=colour, linewidth=1.4, marker=marker, markersize=4.5, label=f"within {km:,} km")
    right = 1.0 if middle.max() > 0.2 else float(middle.max()) * 1.15 or 1.0
    axes.plot([0, 1], [0, 1], color=PALE, linewidth=1.2, zorder=1)
    axes.set_xlim(0, right)
    axes.set_ylim(0, 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.legend(loc="best", frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.4)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("stated confidence")
    axes.set_ylabel("share of queries", labelpad=1)


def _threshold_lines(axes: Axes) -> None:
    """Hairlines at the five thresholds, named above the axes."""
    for km, word in THRESHOLDS_KM.items():
        axes.axvline(float(km), color=PALE, linewidth=1, zorder=2)
        axes.annotate(
            f"{word}\n{int(km):,}", (float(km), 1.0), xycoords=("data", "axes fraction"), xytext=(0, 4),
            textcoords="offset points", ha="center", va="bottom", size=8, color=MUTED, linespacing=1.25,
        )  # fmt: skip


def _heading(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", size=9.5, color=INK, weight="bold", pad=8)


def _ascii(text: str) -> str:
    """A label that the font has glyphs for and that a legend does not take for hidden."""
    return text.encode("ascii", "replace").decode().lstrip("_")
