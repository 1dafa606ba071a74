"""The report as one HTML file: the verdict and the key figures first, then the pictures, then how it came about.

There is no script, no link that loads anything and no outside address: pictures are data URIs, the policy in the head
forbids all else, and every value is escaped, because captions, ids and reasons come from other people's files. Whatever
is absent from the content has no section, save queries without truth, of which the page says so.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hedwig.report.content import ReportContent, column, plain
from hedwig.report.gallery import example_maps, examples
from hedwig.report.sections import (
    accounting,
    all_figures,
    comparisons,
    countries,
    definitions,
    judgement,
    table_caption,
    text,
)  # fmt: skip
from hedwig.report.style import STYLE
from hedwig.report.tables import KINDS, grouped_methods, method_cells, number, seconds

__all__ = ["MAX_PAGE_BYTES", "Picture", "render_page"]

MAX_PAGE_BYTES = 4_000_000
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# widths of example and neighbour strips, in px, from the finest that one may hope for to none at all
STRIP_WIDTHS = ((960, 240), (720, 180), (480, 120), (320, 0), (0, 0))


@dataclass(frozen=True)
class Picture:
    """A PNG with the words that stand for it and under it."""

    png: bytes
    alt: str
    caption: str


def render_page(content: ReportContent, pictures: Mapping[str, Picture]) -> str:
    """The whole page; strips are made smaller, at last left out, until it fits in `MAX_PAGE_BYTES`.

    Args:
        content: what to show.
        pictures: by file stem: ``map_errors`` stands beside the key table, the others follow in their order.
    """
    head = _header(content)
    key = _key_figures(content, pictures.get("map_errors"))
    figures = _figures([p for name, p in pictures.items() if name != "map_errors"])
    rest = "".join(
        [
            all_figures(content),
            comparisons(content),
            judgement(content),
            countries(content),
            accounting(content),
            definitions(content),
        ]
    )
    colophon = _colophon(content)
    maps = example_maps(content)
    for widths in STRIP_WIDTHS:
        body = f"{head}<main>{key}{figures}{examples(content, maps, *widths)}{rest}{colophon}</main>{_footer(content)}"
        page = _document(_title(content), body)
        if len(page.encode()) <= MAX_PAGE_BYTES:
            break
    return page


def _document(title: str, body: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">\n<meta name="referrer" '
        f'content="no-referrer">\n<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n'
        "</body>\n</html>\n"
    )


def _title(content: ReportContent) -> str:
    synthetic = content.synthetic and "synthetic" not in content.title.lower()
    return content.title + (" (synthetic)" if synthetic else "")


def _header(content: ReportContent) -> str:
    evaluation = content.evaluation or {}
    badge = ' <span class="badge">synthetic</span>' if content.synthetic else ""
    verdict = evaluation.get("verdict") or (
        "No query has a known position, so nothing can be said about accuracy."
        if content.evaluation is None
        else "The evaluation gives no verdict."
    )
    first, stop, more = str(verdict).partition(". ")
    better = evaluation.get("better_than_floors")
    tone = "" if better is None else " good" if better else " bad"
    num_cells = 0 if content.geocells is None else len(content.geocells)
    num_queries = len(np.ravel(content.queries.get("pano_id", column(content.queries, "lat"))))
    facts = [
        f"{number(num_queries)} queries",
        f"{number(len(np.ravel(content.train[0])))} reference panoramas",
        f"{number(num_cells)} geocells" if num_cells else "",
        f"encoder: {content.encoder_note}" if content.encoder_note else "",
    ]
    line = " · ".join(text(f) for f in facts if f)
    rest = f"<span>{text(more)}</span>" if more else ""
    return (
        f"<header><h1>{text(content.title)}{badge}</h1>"
        f'<p class="verdict{tone}">{text(first + stop.rstrip())}{rest}</p><p class="quiet">{line}</p></header>'
    )


def _key_figures(content: ReportContent, picture: Picture | None) -> str:
    methods = (content.evaluation or {}).get("methods") or {}
    groups = grouped_methods(methods)
    shown = ("median km", "GeoScore", "@25", "@200", "@750", "@2500")
    titles = {"@25": "< 25 km", "@200": "< 200", "@750": "< 750", "@2500": "< 2500"}
    rows = []
    for kind, members in groups.items():
        if kind != "method":
            rows.append(
                f'</tbody><tbody><tr><th scope="rowgroup" colspan="{len(shown) + 1}">{text(KINDS[kind])}</th></tr>'
            )
        for method in members:
            cells = method_cells(methods[method.name] or {})
            style = "ours" if method.name == "hedwig" else kind
            tds = "".join(
                f"<td>{text(v)}{f'<small>{text(ci)}</small>' if ci else ''}</td>"
                for v, ci in (cells[name] for name in shown)
            )
            rows.append(f'<tr class="{style}"><th scope="row">{text(method.label)}</th>{tds}</tr>')
    head = "".join(f'<th scope="col">{text(titles.get(name, name))}</th>' for name in shown)
    table = (
        f'<div class="wide"><table>{table_caption(content, "Great-circle error; 95 % intervals in brackets")}'
        f'<thead><tr><th scope="col">method</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        if rows
        else '<p class="none">No figures: no query of this run has a known position.</p>'
    )
    return f'<section class="first">{table}{_figure(picture) if picture else ""}</section>'


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img alt="{text(picture.alt)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text(picture.caption)}</figcaption></figure>"
    )


def _figures(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    return f'<h2>Pictures</h2><section class="two">{"".join(_figure(p) for p in pictures)}</section>'


def _colophon(content: ReportContent) -> str:
    """How the report came about: commands, times, versions, the experiment."""
    commands = "\n".join(str(c) for c in content.commands)
    parts = [f"<h3>Again</h3><pre><code>{text(commands)}</code></pre>"] if commands else []
    for words, values in (
        ("Time", {k: seconds(v) for k, v in content.timings.items()}),
        ("Versions", content.versions),
    ):
        if values:
            items = "".join(f"<dt>{text(str(k))}</dt><dd>{text(str(v))}</dd>" for k, v in values.items())
            parts.append(f"<h3>{words}</h3><dl>{items}</dl>")
    if content.experiment:
        settings = json.dumps(plain(content.experiment), indent=2, ensure_ascii=False)
        parts.append(
            f"<details><summary>The experiment, as it ran</summary><pre><code>{text(settings)}</code></pre></details>"
        )
    return f"<h2>How it came about</h2>{''.join(parts)}" if parts else ""


def _footer(content: ReportContent) -> str:
    credits = "".join(f"<li>{text(str(line))}</li>" for line in content.credits)
    sources = f"<p>Sources</p><ul>{credits}</ul>" if credits else ""
    synthetic = (
        "<p>The panoramas are synthetic: these figures show that the software works, not how well it does on Earth.</p>"
        if content.synthetic
        else ""
    )
    return f"<footer>{synthetic}{sources}<p>Written by hedwig.</p></footer>"
