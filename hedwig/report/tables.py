"""The figures as text: the order and the words for the methods, how a number is written, and the console's table.

The page and the console show the same cells, so both take them from here. Floors (answers that never saw the picture)
and oracles (answers that were told something about the truth) stand apart from methods, because a median error says
nothing until it is compared with them.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hedwig.report.content import plain

__all__ = ["METHODS", "THRESHOLDS_KM", "Method", "console_table", "grouped_methods", "method_cells", "number"]

THRESHOLDS_KM = {"1": "street", "25": "city", "200": "region", "750": "country", "2500": "continent"}


@dataclass(frozen=True)
class Method:
    """How a method is called and in which company it stands: ``method``, ``floor`` or ``oracle``."""

    name: str
    label: str
    kind: str


METHODS = (
    Method("hedwig", "hedwig", "method"),
    Method("top_cell", "top cell only", "method"),
    Method("viclip_1nn", "ViCLIP nearest neighbour", "method"),
    Method("clip_mean", "CLIP mean of frames", "method"),
    Method("constant", "best constant (median km)", "floor"),
    Method("constant_geoscore", "best constant (GeoScore)", "floor"),
    Method("random", "random training place", "floor"),
    Method("perfect_cell", "perfect cell", "oracle"),
    Method("nearest_training", "nearest training place", "oracle"),
)
KINDS = {
    "method": "Methods",
    "floor": "Floors: never saw the picture",
    "oracle": "Oracles: know the answer's cell",
}


def grouped_methods(names: Any) -> dict[str, list[Method]]:
    """The given method names as kind -> methods, in the order of `METHODS`; an unknown name counts as a method."""
    names = list(names)
    known = {method.name: method for method in METHODS}
    ordered = [m for m in METHODS if m.name in names]
    ordered += [Method(n, str(n).replace("_", " "), "method") for n in names if n not in known]
    groups = {kind: [m for m in ordered if m.kind == kind] for kind in KINDS}
    return {kind: methods for kind, methods in groups.items() if methods}


def number(value: Any, *, unit: str = "") -> str:
    """A figure with about three digits and thin thousands; a dash where there is none."""
    value = plain(value)
    if isinstance(value, str):
        return value
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}{unit}".replace("-", "−")
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2
    return f"{value:,.{digits}f}{unit}".replace("-", "−")


def percent(value: Any) -> str:
    """A share in [0, 1] as a percentage with one decimal."""
    value = plain(value)
    return "–" if not isinstance(value, int | float) else f"{100 * value:.1f} %"


def interval(bounds: Any) -> str:
    """``[lo, hi]``, or nothing where there is no interval."""
    bounds = plain(bounds)
    if not isinstance(bounds, list) or len(bounds) != 2 or None in bounds:
        return ""
    return f"[{number(bounds[0])}, {number(bounds[1])}]"


def method_cells(figures: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The cells of one method's row: heading -> (value, interval or '')."""
    accuracy = figures.get("accuracy_at_km") or {}
    cells = {
        "median km": (number(figures.get("median_km")), interval(figures.get("median_km_ci"))),
        "mean km": (number(figures.get("mean_km")), ""),
        "GeoScore": (number(figures.get("geoscore")), interval(figures.get("geoscore_ci"))),
    }
    for km in ("25", "200", "750", "2500"):
        cells[f"@{km}"] = (percent(accuracy.get(km)), "")
    cells["n"] = (number(figures.get("num_queries")), "")
    return cells


def console_table(evaluation: Mapping[str, Any] | None, synthetic: bool, encoder_note: str) -> str:
    """The table the command line prints: one line per method, floors and oracles below a rule each.

    Args:
        evaluation: the record of `hedwig.evaluate`, or None.
        synthetic: the panoramas were made up; the header says so.
        encoder_note: what the encoder's weights are.

    Returns:
        Lines without a trailing newline; intervals are those of the evaluation (95 %).
    """
    about = ["SYNTHETIC world" if synthetic else "", f"encoder: {encoder_note}" if encoder_note else ""]
    header = "Great-circle error of the queries" + "".join(f" · {part}" for part in about if part)
    groups = grouped_methods((evaluation or {}).get("methods") or {})
    if evaluation is None or not groups:
        return f"{header}\nNo query has a known position, so there is nothing to evaluate."
    blocks: list[list[list[str]]] = []
    headings: list[str] = []
    for kind, methods in groups.items():
        rows = []
        for method in methods:
            cells = method_cells(evaluation["methods"][method.name] or {})
            label = f"{method.label} (oracle)" if kind == "oracle" else method.label
            headings = ["method", *(f"{h} [95 % CI]" if h in ("median km", "GeoScore") else h for h in cells)]
            rows.append([label, *(" ".join(part for part in cell if part) for cell in cells.values())])
        blocks.append(rows)
    widths = [
        max(len(row[i]) for row in [headings, *(r for rows in blocks for r in rows)]) for i in range(len(headings))
    ]

    def line(row: list[str]) -> str:
        return "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [header, line(headings)]
    for rows in blocks:
        lines += [rule, *(line(row) for row in rows)]
    if "oracle" in groups:
        lines += [rule, "oracle: knows the answer's cell, or its nearest training place; an upper bound."]
    verdict = evaluation.get("verdict")
    return "\n".join([*lines, *textwrap.wrap(str(verdict), width=max(60, len(rule)))] if verdict else lines)


def seconds(value: Any) -> str:
    """A duration in the unit that suits it."""
    value = plain(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return number(value)
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
