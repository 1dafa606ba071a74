"""The paper's Tables 1, 3 and 4 in their own shape, from the records of our runs, with the floors that it lacks.

Table 1 has a column per experiment and says which is better; Tables 3 and 4 have two rows per experiment: the *base
model* answers by the nearest neighbour of the raw embedding, the *fine-tuned* one by the trained head. Below each
table stand the floors of the same queries, and below Tables 3 and 4 the expected error of a random guess, which the
paper took from a rectangle. Rows in, text, CSV and HTML out; nothing is computed here but formatting.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PaperTable", "Scored", "paper_table", "to_csv", "to_html", "to_text"]

TABLE_1 = (
    ("Average Top-1 Distance", "mean_km", None),
    ("Q1 (25th percentile)", "q1_km", None),
    ("Median", "median_km", None),
    ("Q3 (75th percentile)", "q3_km", None),
    ("% below 1 km", "accuracy_at_km", "1"),
    ("% below 25 km", "accuracy_at_km", "25"),
    ("% below 200 km", "accuracy_at_km", "200"),
    ("% below 750 km", "accuracy_at_km", "750"),
    ("% below 2500 km", "accuracy_at_km", "2500"),
)
TABLE_4_KM = ("10", "100", "500", "1000", "5000", "10000")
STAGES = {"viclip_1nn": "Base Model", "hedwig": "Fine Tuned Model"}
FLOORS = {"constant": "best constant answer", "random": "random training place"}
EXPECTED = "expected error of a random guess (Monte Carlo)"
TITLES = {
    1: "Table 1: Top-1 retrieval distance. All values in kilometres.",
    3: "Table 3: Mean, median and standard deviation",
    4: "Table 4: Share of answers under distances",
}


@dataclass(frozen=True)
class Scored:
    """One experiment of a matrix and the methods of its record.

    Attributes:
        labels: axis -> label.
        methods: the record's ``methods``.
        note: what a reader must know of its encoder.
        expected: the record's ``expected_error`` of a random training place; None in records made before there was one.
    """

    labels: Mapping[str, str]
    methods: Mapping[str, Mapping[str, Any]]
    note: str
    expected: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PaperTable:
    """Cells as text; a row under `num_rows` is a floor."""

    title: str
    header: list[str]
    rows: list[list[str]]
    num_rows: int
    notes: list[str]


def paper_table(number: int, runs: Sequence[Scored]) -> PaperTable:
    """One of the paper's tables (1, 3 or 4) of these runs."""
    notes = [f"{' · '.join(run.labels.values())}: {run.note}" for run in runs]
    if number == 1:
        return _table_1(runs, notes)
    axes = list(runs[0].labels)
    heads = {
        3: ["Mean Distance (km)", "Median Distance (km)", "Standard Deviation (km)"],
        4: [f"Under {int(km)} km (%)" for km in TABLE_4_KM],
    }[number]
    values = _distances if number == 3 else _shares
    rows = [
        [*run.labels.values(), stage, *values(run.methods[method])]
        for run in runs
        for method, stage in STAGES.items()
        if method in run.methods
    ]
    floors = [
        [label, *[""] * len(axes), *values(runs[0].methods[name])]
        for name, label in FLOORS.items()
        if name in runs[0].methods
    ]
    expected = runs[0].expected
    if expected is not None:
        floors.append([EXPECTED, *[""] * len(axes), *values(expected)])
        notes.append(
            f"E{EXPECTED[1:]}: mean {expected['mean_km']:,.1f} km, standard error "
            f"{expected['standard_error_km']:.1f} km, of {expected['num_pairs']:,} pairs of a query and a training "
            "place. The paper's, of two uniform points in a rectangle of 4,500 x 2,500 km, is 1,863 km."
        )
    header = [*axes, "Base Model/Fine Tuned Model", *heads]
    return PaperTable(TITLES[number], header, rows + floors, len(rows), notes)


def _distances(method: Mapping[str, Any]) -> list[str]:
    return [f"{method[name]:,.2f}" for name in ("mean_km", "median_km", "std_km")]


def _shares(method: Mapping[str, Any]) -> list[str]:
    return [f"{100 * method['accuracy_at_km'][km]:.2f}" for km in TABLE_4_KM]


def _table_1(runs: Sequence[Scored], notes: list[str]) -> PaperTable:
    names = [" · ".join(run.labels.values()) for run in runs]
    columns = [run.methods["hedwig"] for run in runs]
    floors = {label: runs[0].methods[name] for name, label in FLOORS.items() if name in runs[0].methods}
    rows = []
    for title, key, km in TABLE_1:
        values = [method[key] if km is None else method[key][km] for method in [*columns, *floors.values()]]
        own = [round(value, 6) for value in values[: len(columns)]]
        best = min(own) if km is None else max(own)
        winners = [name for name, value in zip(names, own, strict=True) if value == best]
        better = "Equal" if len(winners) > 1 else winners[0]
        cells = [f"{value:,.2f}" if km is None else f"{100 * value:.4f}%" for value in values]
        rows.append([title, *cells[: len(columns)], better if len(columns) > 1 else "", *cells[len(columns) :]])
    return PaperTable(TITLES[1], ["Metric", *names, "Better", *floors], rows, len(rows), notes)


def to_text(table: PaperTable) -> str:
    """The table for a terminal: text left, numbers right, floors below a line."""
    cells = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.header))]
    numeric = [all(_is_number(row[i]) for row in table.rows if row[i]) for i in range(len(widths))]

    def line(row: Sequence[str]) -> str:
        parts = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True))
        return "  ".join(parts).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [table.title, line(table.header), rule]
    for number, row in enumerate(table.rows):
        if number == table.num_rows:
            lines.append(rule)
        lines.append(line(row))
    return "\n".join([*lines, rule, *table.notes])


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").rstrip("%").isdigit()


def to_csv(table: PaperTable) -> str:
    """The table as CSV, numbers without thousands separators."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.header)
    for row in table.rows:
        writer.writerow([cell.replace(",", "") if _is_number(cell) else cell for cell in row])
    return out.getvalue()


def to_html(tables: Sequence[PaperTable], title: str, remarks: Sequence[str]) -> str:
    """All tables on one page that needs nothing from elsewhere."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>body{{font:15px/1.5 system-ui,sans-serif;color:#1f2937;"
        "margin:2rem auto;max-width:76rem;padding:0 1rem}table{border-collapse:collapse;margin:.5rem 0 1.5rem}"
        "caption{text-align:left;font-weight:600;padding:.5rem 0}th,td{padding:.3rem .8rem;border-bottom:1px solid "
        "#e5e7eb;text-align:left}td.n{text-align:right;font-variant-numeric:tabular-nums}tr.floor{color:#6b7280}"
        "li,p{color:#4b5563}.wrap{overflow-x:auto}</style>",
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(remark)}</p>" for remark in remarks),
    ]
    for table in tables:
        head = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in table.header)
        body = []
        for number, row in enumerate(table.rows):
            cells = "".join(f"<td{' class=n' if _is_number(c) else ''}>{html.escape(c)}</td>" for c in row)
            body.append(f"<tr{' class=floor' if number >= table.num_rows else ''}>{cells}</tr>")
        parts.append(
            f"<div class=wrap><table><caption>{html.escape(table.title)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>"
        )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in dict.fromkeys(n for t in tables for n in t.notes))
    return "\n".join([*parts, f"<ul>{notes}</ul>", "</html>"]) + "\n"
