"""The page's tables: every figure, the paired comparisons, the countries, what became of the rows, the definitions.

Each function returns a section of escaped HTML, or nothing where the content has nothing to say. Tables are made from
records as they come, because an evaluation may learn to measure more; the columns' names say how to write a value.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

from hedwig.report.content import ReportContent, plain
from hedwig.report.tables import grouped_methods, interval, number, percent

__all__ = ["accounting", "all_figures", "comparisons", "countries", "definitions", "judgement", "table_caption", "text"]


def text(value: Any) -> str:
    """Any value as escaped text."""
    return html.escape(value if isinstance(value, str) else number(value), quote=True)


def table_caption(content: ReportContent, words: str) -> str:
    """A table's caption; on made-up panoramas every one of them says so."""
    mark = '<span class="badge">synthetic</span> ' if content.synthetic else ""
    return f"<caption>{mark}{text(words)}</caption>"


def records_table(content: ReportContent, words: str, records: Iterable[Mapping[str, Any]]) -> str:
    """A table of records whatever their columns: shares as percentages, pairs as intervals, words to the left."""
    rows = [dict(plain(record)) for record in records]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return ""
    left = [any(isinstance(row.get(name), str) for row in rows) for name in names]
    mark = ["text" if is_left else "num" for is_left in left]
    head = "".join(f'<th scope="col" class="{m}">{text(_words(n))}</th>' for n, m in zip(names, mark, strict=True))
    body = ""
    for row in rows:
        cells = [text(_cell(name, row.get(name))) for name in names]
        tds = "".join(f'<td class="{m}">{c}</td>' for c, m in zip(cells[1:], mark[1:], strict=True))
        body += f'<tr><th scope="row">{cells[0]}</th>{tds}</tr>'
    return (
        f'<div class="wide"><table>{table_caption(content, words)}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _words(name: str) -> str:
    return name.replace("num_", "").replace("_", " ").replace(" ci", " 95 % CI").replace("accuracy at ", "< ")


def _cell(name: str, value: Any) -> str:
    share = name.startswith("accuracy") or "share" in name or "coverage" in name
    if isinstance(value, list):
        if len(value) == 2 and all(isinstance(v, int | float) for v in value):
            return f"[{percent(value[0])}, {percent(value[1])}]" if share else interval(value)
        return ", ".join(number(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{_words(k)} {_cell(k, v)}" for k, v in value.items()) or "–"
    return percent(value) if share and isinstance(value, float) else number(value)


def all_figures(content: ReportContent) -> str:
    """Every figure of every method, for whoever wants to compare with a paper."""
    methods = (content.evaluation or {}).get("methods") or {}
    names = ("num_queries", "q1_km", "median_km", "q3_km", "mean_km", "mean_km_ci", "trimmed_mean_km", "std_km")
    errors, shares = [], []
    for method in (m for members in grouped_methods(methods).values() for m in members):
        figures = dict(methods[method.name] or {})
        errors.append({"method": method.label, **{name: figures.get(name) for name in names}})
        accuracy = dict(figures.get("accuracy_at_km") or {})
        shares.append({"method": method.label, **{f"accuracy_at_{km}_km": v for km, v in accuracy.items()}})
    if not errors:
        return ""
    tables = records_table(content, "Errors, km", errors) + records_table(
        content, "Share of the queries that lie nearer than a distance", shares
    )
    return f"<h2>All figures</h2>{tables}"


def comparisons(content: ReportContent) -> str:
    """Hedwig against each method on the same queries, and the evaluation's single values."""
    evaluation = content.evaluation or {}
    records = [
        {"hedwig minus": method.label, **_flat(evaluation["paired"][method.name])}
        for members in grouped_methods(evaluation.get("paired") or {}).values()
        for method in members
    ]
    words = "Paired differences on the same queries (km below 0 and GeoScore above 0 favour hedwig)"
    table = f"<h2>Compared query by query</h2>{records_table(content, words, records)}" if records else ""
    skip = {"methods", "paired", "verdict", "better_than_floors", "countries", "per_country", "errors_km"}
    skip |= {"admin", "urban", "calibration", "checks"}
    single = {key: plain(value) for key, value in evaluation.items() if key not in skip}
    if not single:
        return table
    items = "".join(f"<dt>{text(_words(key))}</dt><dd>{text(_cell(key, value))}</dd>" for key, value in single.items())
    mark = ' <span class="badge">synthetic</span>' if content.synthetic else ""
    return f"{table}<h2>Cells, radius and split{mark}</h2><dl>{items}</dl>"


def judgement(content: ReportContent) -> str:
    """Right country or region, town or country, whether the confidence is true, and the checks of the evaluation."""
    evaluation = content.evaluation or {}
    calibration = evaluation.get("calibration") or {}
    parts = {
        "Right administrative unit": evaluation.get("admin"),
        "Town and country (within 10 km of a place of 50,000 or not)": evaluation.get("urban"),
        "Calibration": {k: v for k, v in calibration.items() if isinstance(v, Mapping) and k != "confidence"},
        "Checks that must fail on wrong data": evaluation.get("checks"),
    }
    tables = ""
    for words, rows in parts.items():
        named = {name: row for name, row in (rows or {}).items() if isinstance(row, Mapping)}
        records = [{"": _words(name), **_flat(row)} for name, row in named.items()]
        tables += records_table(content, words, records) if records else ""
    confidence = calibration.get("confidence")
    if isinstance(confidence, Mapping):
        shown = {"ece": "expected calibration error", "ece_if_calibrated": "of a calibrated one by chance"}
        items = {words: confidence[key] for key, words in shown.items() if confidence.get(key) is not None}
        tables += records_table(content, "Confidence", [items]) if items else ""
    return f"<h2>Where it was right, and whether it knew</h2>{tables}" if tables else ""


def _flat(record: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by a blank."""
    flat: dict[str, Any] = {}
    for key, value in dict(record or {}).items():
        name = f"{prefix} {key}".strip().removesuffix(" difference")
        flat |= _flat(value, name) if isinstance(value, Mapping) else {name: value}
    return flat


def countries(content: ReportContent) -> str:
    """How each country fared."""
    evaluation = content.evaluation or {}
    records = evaluation.get("countries") or evaluation.get("per_country") or []
    return (
        f"<h2>By country</h2>{records_table(content, 'Countries with the most queries first', records)}"
        if records
        else ""
    )


def accounting(content: ReportContent) -> str:
    """Rows in, out and rejected per stage; a stage that loses rows is marked."""
    if not content.accounting:
        return ""
    body = ""
    for row in map(plain, content.accounting):
        ins, outs, rejected = (row.get(name) for name in ("num_in", "num_out", "num_rejected"))
        lost = None not in (ins, outs, rejected) and ins != outs + rejected
        reasons = "; ".join(f"{reason} ({number(count)})" for reason, count in (row.get("reasons") or {}).items())
        reasons += f"{'; ' if reasons else ''}{ins - outs - rejected:+,} rows are unaccounted for" if lost else ""
        body += (
            f'<tr class="{"bad" if lost else "ok"}"><th scope="row">{text(str(row.get("stage", "")))}</th>'
            f"<td>{number(ins)}</td><td>{number(outs)}</td><td>{number(rejected)}</td>"
            f'<td class="text">{text(reasons) or "–"}</td></tr>'
        )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("stage", "in", "out", "rejected"))
    caption = table_caption(content, "in = out + rejected")
    return (
        f'<h2>What became of every row</h2><div class="wide"><table>{caption}<thead><tr>{heads}'
        f'<th scope="col" class="text">reasons</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def definitions(content: ReportContent) -> str:
    """What the figures mean; none is shown without its definition."""
    if not content.evaluation:
        return ""
    terms = {
        "error": "great-circle (haversine) distance between answer and truth on a sphere of 6371.0088 km radius",
        "< x km": "share of queries with a smaller error: 1 street, 25 city, 200 region, 750 country, 2500 continent",
        "GeoScore": "mean of 5000 · exp(−error / 1492.7 km); 5000 is perfect",
        "trimmed mean": "mean of the middle 80 % of the errors",
        "interval": "95 %, from a bootstrap over queries; shares of single groups after Wilson",
        "floor": "an answer that never saw the picture; a method that does not beat it has learnt nothing",
        "oracle": "an answer that was told the true cell, or the nearest training place: what is left to gain",
    }
    items = "".join(f"<dt>{text(term)}</dt><dd>{text(words)}</dd>" for term, words in terms.items())
    return f"<h2>What the figures mean</h2><dl>{items}</dl>"
