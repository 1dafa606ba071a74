"""The reliability diagram: do stated probabilities come true, for the confidence and for the 50 and 90 % regions?

Every point sets what was promised against what was kept, with Wilson's 95 % interval; on the diagonal a promise is
kept, below it the answers are surer of themselves than they should be. The shares are those of `hedwig.evaluate`;
nothing is counted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hedwig.report.content import Floats
from hedwig.report.drawing import BLUE, INK, MUTED, PALE, VERMILLION, WIDTH_IN, new_figure, plain_axes, say_empty, title

__all__ = ["draw_reliability"]


def draw_reliability(calibration: Mapping[str, Any], *, synthetic: bool = False) -> Figure:
    """Stated against observed shares.

    Args:
        calibration: the record's ``calibration``: ``confidence`` with its ``bins``, ``radius_50`` and ``radius_90``;
            what is None is said to be absent.
        synthetic: say so in the picture.
    """
    figure = new_figure(WIDTH_IN, 4.6)
    title(
        figure,
        "Are promises kept?",
        "what was stated against how often it was true, with 95 % intervals; on the line both agree",
        synthetic,
    )
    panels = [figure.add_axes((left, 0.15, 0.405, 0.625)) for left in (0.075, 0.555)]
    for axes in panels:
        plain_axes(axes)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, zorder=2)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _confidence(panels[0], calibration.get("confidence"))
    _regions(panels[1], calibration)
    return figure


def _confidence(axes: Axes, confidence: Mapping[str, Any] | None) -> None:
    bins = (confidence or {}).get("bins")
    if not confidence or not bins:
        axes.set_title("Confidence", loc="left", size=9.5, color=INK, weight="bold", pad=8)
        return say_empty(axes, "no confidence was stated")
    words = f"Confidence: off by {100 * confidence['ece']:.1f} points on average"
    axes.set_title(words, loc="left", size=9.5, color=INK, weight="bold", pad=8)
    stated, kept, low, high, num = (
        np.asarray(bins[name], dtype=np.float64)
        for name in ("confidence", "correct", "ci_low", "ci_high", "num_queries")
    )
    right = min(1.0, 1.2 * float(stated.max())) if stated.max() < 0.5 else 1.0
    axes.set_xlim(0, right)
    axes.vlines(stated, low, high, color=BLUE, linewidth=1.4, alpha=0.55, zorder=3)
    axes.plot(stated, kept, color=BLUE, linewidth=1.4, marker="o", markersize=5.5, zorder=4)
    note = f"{len(num)} bins of {_span(num)} queries"
    if confidence.get("ece_if_calibrated") is not None:
        note += f"; {100 * confidence['ece_if_calibrated']:.1f} points by chance alone"
    axes.set_xlabel(f"stated confidence\n{note}", linespacing=1.4)
    axes.set_ylabel("share that was right", labelpad=1)


def _regions(axes: Axes, calibration: Mapping[str, Any]) -> None:
    axes.set_title("Regions of 50 and 90 %", loc="left", size=9.5, color=INK, weight="bold", pad=8)
    axes.set_xlim(0, 1.0)
    drawn = False
    for name in ("radius_50", "radius_90"):
        told = calibration.get(name)
        if not told:
            continue
        drawn = True
        low, high = (float(bound) for bound in told["ci"])
        colour = BLUE if low <= told["nominal"] <= high else VERMILLION
        axes.vlines(told["nominal"], low, high, color=colour, linewidth=2, alpha=0.6, zorder=3)
        axes.plot(told["nominal"], told["share"], marker="o", markersize=7, color=colour, zorder=4)
        words = f"{told['share']:.1%} inside\nmedian radius {told['median_radius_km']:,.0f} km"
        axes.annotate(
            words, (told["nominal"], told["share"]), xytext=(-10, 4), textcoords="offset points", ha="right",
            va="bottom", size=9, color=INK, linespacing=1.3,
        )  # fmt: skip
    if not drawn:
        return say_empty(axes, "no region was stated")
    axes.plot([0.5, 0.9], [0, 0], marker="|", markersize=9, linestyle="", color=PALE, zorder=1)
    axes.set_xlabel("promised share\nred: the interval leaves out the promise", linespacing=1.4)
    axes.set_ylabel("share of truths inside", labelpad=1)


def _span(num: Floats) -> str:
    low, high = int(num.min()), int(num.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
