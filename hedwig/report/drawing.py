"""The look shared by every picture: palette, type sizes, an empty figure, and a PNG of bounded size.

Figures go through matplotlib's object interface with the Agg canvas: no window, no global state, safe in a thread.
Blue, vermillion and green are from Okabe & Ito's palette, which survives the common colour blindnesses and grey
printing; scales are viridis. Pictures stay light on a dark page: a map whose land turns dark reads as a night map.
"""

from __future__ import annotations

import io

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

__all__ = [
    "BLUE", "COAST", "GREEN", "INK", "LAND", "MAX_PNG_BYTES", "MUTED", "ORANGE", "PALE", "PURPLE", "SEA", "VERMILLION",
    "error_scale", "new_figure", "plain_axes", "png_bytes", "say_empty", "title",
]  # fmt: skip

INK, MUTED, PALE = "#1f2933", "#66727f", "#cbd2d9"
LAND, SEA, COAST = "#e3e0d8", "#f3f7fa", "#ffffff"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE = "#0072b2", "#d55e00", "#009e73", "#a0568a", "#e69f00"
MAX_PNG_BYTES, WIDTH_IN = 400_000, 8.4


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty white figure on an Agg canvas; sizes in inches."""
    figure = Figure(figsize=(width_in, height_in), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def title(figure: Figure, text: str, subtitle: str, synthetic: bool) -> None:
    """A left-aligned title, a quiet line under it, and the word synthetic at the right where it applies."""
    width, height = figure.get_size_inches()
    left = 0.2 / width
    figure.text(left, 1 - 0.14 / height, text, size=13, weight="bold", color=INK, va="top", parse_math=False)
    figure.text(left, 1 - 0.40 / height, subtitle, size=9, color=MUTED, va="top", parse_math=False)
    if synthetic:
        badge = {"boxstyle": "round,pad=0.35", "facecolor": "#fff4e5", "edgecolor": ORANGE, "linewidth": 0.8}
        figure.text(
            1 - left, 1 - 0.18 / height, "synthetic world", size=9, color="#8a4b00", ha="right", va="top", bbox=badge
        )


def plain_axes(axes: Axes) -> None:
    """Take the box and the tick marks away; leave hairlines and legible numbers."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PALE)
    axes.tick_params(length=0, labelsize=9, labelcolor=MUTED)
    axes.grid(True, color="#e9edf0", linewidth=0.8)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(size=9.5, color=INK)


def say_empty(axes: Axes, text: str) -> None:
    """Write into the middle of the axes why nothing is drawn there."""
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", size=11, color=MUTED, wrap=True,
        parse_math=False, zorder=20,
        bbox={"boxstyle": "round,pad=0.6", "facecolor": "white", "edgecolor": PALE},
    )  # fmt: skip


def error_scale() -> LinearSegmentedColormap:
    """Viridis turned round and without its pale end: a small error is green, a large one dark violet."""
    viridis = colormaps["viridis"]
    return LinearSegmentedColormap.from_list("error_km", [viridis(0.86 * (1 - i / 15)) for i in range(16)])


def png_bytes(figure: Figure, *, dpi: int = 160, max_bytes: int = MAX_PNG_BYTES) -> bytes:
    """The figure as PNG: all its colours if they fit in `max_bytes`, else 256 of them, at last fewer pixels."""
    for step_dpi in (dpi, int(dpi * 0.75), int(dpi * 0.5), int(dpi * 0.35)):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=step_dpi, metadata={"Software": "hedwig"})
        if buffer.tell() <= max_bytes:
            break
        image = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        smaller = io.BytesIO()
        image.save(smaller, format="PNG")
        buffer = min(buffer, smaller, key=lambda b: b.tell())
        if buffer.tell() <= max_bytes:
            break
    return buffer.getvalue()
