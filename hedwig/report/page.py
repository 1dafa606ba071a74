"""The report as one HTML file: the verdict and the key figures first, then the pictures, then how it came about.

There is no script, no link that loads anything and no outside address: pictures are data URIs, the policy in the head
forbids all else, and every value is escaped, because captions, ids and reasons come from other people's files. Whatever
is absent from the content has no section, save queries without truth, of which the page says so.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from hedwig.report.content import Floats, ReportContent, column, plain
from hedwig.report.style import STYLE
from hedwig.report.tables import KINDS, grouped_methods, interval, method_cells, number, percent, seconds

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
        [_all_figures(content), _comparisons(content), _countries(content), _accounting(content), _definitions(content)]
    )
    colophon = _colophon(content)
    for widths in STRIP_WIDTHS:
        body = f"{head}<main>{key}{figures}{_gallery(content, *widths)}{rest}{colophon}</main>{_footer(content)}"
        page = _document(_title(content), body)
        if len(page.encode()) <= MAX_PAGE_BYTES:
            break
    return page


def text(value: Any) -> str:
    """Any value as escaped text."""
    return html.escape(value if isinstance(value, str) else number(value), quote=True)


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
    tone = {True: " good", False: " bad"}.get(evaluation.get("better_than_floors"), "")
    num_cells = 0 if content.geocells is None else len(content.geocells)
    num_queries = len(np.ravel(content.queries.get("pano_id", column(content.queries, "lat"))))
    facts = [
        f"{number(num_queries)} queries",
        f"{number(len(np.ravel(content.train[0])))} reference panoramas",
        f"{number(num_cells)} geocells" if num_cells else "",
        f"encoder: {content.encoder_note}" if content.encoder_note else "",
    ]
    line = " · ".join(text(f) for f in facts if f)
    return (
        f"<header><h1>{text(content.title)}{badge}</h1>"
        f'<p class="verdict{tone}">{text(verdict)}</p><p class="quiet">{line}</p></header>'
    )


def _caption(content: ReportContent, words: str) -> str:
    """A table's caption; on made-up panoramas every one of them says so."""
    mark = '<span class="badge">synthetic</span> ' if content.synthetic else ""
    return f"<caption>{mark}{text(words)}</caption>"


def _key_figures(content: ReportContent, picture: Picture | None) -> str:
    methods = (content.evaluation or {}).get("methods") or {}
    groups = grouped_methods(methods)
    shown = ("median km", "GeoScore", "@25", "@200", "@750", "@2500")
    titles = {"@25": "≤ 25 km", "@200": "≤ 200", "@750": "≤ 750", "@2500": "≤ 2500"}
    rows = []
    for kind, members in groups.items():
        if kind != "method":
            rows.append(f'<tr><th scope="rowgroup" colspan="{len(shown) + 1}">{text(KINDS[kind])}</th></tr>')
        for method in members:
            cells = method_cells(methods[method.name] or {})
            style = "ours" if method.name == "hedwig" else kind
            tds = "".join(
                f"<td>{text(v)}{f'<small>{text(ci)}</small>' if ci else ''}</td>"
                for v, ci in (cells[name] for name in shown)
            )
            note = (
                "<small>oracle: knows the answer's cell</small>"
                if method.name == "perfect_cell"
                else ("<small>oracle: knows the answer</small>" if kind == "oracle" else "")
            )
            rows.append(f'<tr class="{style}"><th scope="row">{text(method.label)}{note}</th>{tds}</tr>')
    head = "".join(f'<th scope="col">{text(titles.get(name, name))}</th>' for name in shown)
    table = (
        f'<div class="wide"><table>{_caption(content, "Great-circle error; 95 % intervals in brackets")}'
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


def _gallery(content: ReportContent, width_px: int, neighbour_px: int) -> str:
    """The examples: the strip, what was said of it, and the neighbours that the answer rests on."""
    if not content.gallery:
        return ""
    errors = column(content.queries, "error_km")
    blocks = []
    for example in content.gallery:
        name = text(str(example.get("pano_id", "")))
        strip = _strip(example.get("strip"), width_px, f"panorama {example.get('pano_id', '')}")
        near = "".join(_neighbour(n, neighbour_px) for n in example.get("neighbours") or [])
        caption = example.get("caption")
        blocks.append(
            f'<article class="example"><h3>{_rank(example, errors)}</h3><div>{strip}'
            f'<p class="quiet"><code>{name}</code>{f" · “{text(str(caption))}”" if caption else ""}</p></div>'
            f"<div><dl><dt>truth</dt><dd>{_place(example.get('truth'))}</dd>"
            f"<dt>answer</dt><dd>{_place(example.get('prediction'))}</dd></dl>"
            f'{f"""<p class="quiet">nearest references</p><ul class="near">{near}</ul>""" if near else ""}</div></article>'
        )
    return f"<h2>Examples, from the best to the worst</h2>{''.join(blocks)}"


def _rank(example: Mapping[str, Any], errors: Floats) -> str:
    """How far off an example is, and how that compares with the other queries."""
    error = plain(example.get("error_km"))
    kind = f"{text(str(example['kind']).capitalize())}: " if example.get("kind") else ""
    if error is None:
        return f"{kind}error unknown"
    errors = errors[np.isfinite(errors)]
    share = (
        f' <span class="quiet">nearer than {np.mean(errors > error):.0%} of the queries</span>' if len(errors) else ""
    )
    return f"{kind}{text(number(float(error)))} km off{share}"


def _neighbour(neighbour: Mapping[str, Any], width_px: int) -> str:
    name = str(neighbour.get("pano_id", ""))
    place = _place((neighbour.get("lat"), neighbour.get("lon")))
    score = neighbour.get("score")
    return (
        f"<li>{_strip(neighbour.get('strip'), width_px, f'neighbour {name}')}<span><code>{text(name)}</code><br>{place}"
        f"{f' · {text(number(score))}' if score is not None else ''}</span></li>"
    )


def _strip(pixels: Any, width_px: int, alt: str) -> str:
    """(H, W, 3) uint8 as a JPEG no wider than `width_px`; a frame with words where there is none."""
    if pixels is None or width_px == 0 or np.ndim(pixels) != 3 or 0 in np.shape(pixels):
        return '<span class="none">no picture</span>'
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8)).convert("RGB")
    if image.width > width_px:
        image = image.resize((width_px, max(1, round(image.height * width_px / image.width))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="strip" alt="{text(alt)}" src="data:image/jpeg;base64,{data}">'


def _place(position: Any) -> str:
    """A position in degrees with its hemispheres."""
    position = plain(position)
    if not isinstance(position, list) or len(position) != 2 or None in position:
        return "–"
    lat, lon = (float(v) for v in position)
    return f"{abs(lat):.4f}° {'N' if lat >= 0 else 'S'}, {abs(lon):.4f}° {'E' if lon >= 0 else 'W'}"


def _records(content: ReportContent, words: str, records: Iterable[Mapping[str, Any]]) -> str:
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
        f'<div class="wide"><table>{_caption(content, words)}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _words(name: str) -> str:
    return name.replace("num_", "").replace("_ci", " 95 % CI").replace("_", " ").replace("accuracy at ", "≤ ")


def _cell(name: str, value: Any) -> str:
    share = name.startswith("accuracy") or "share" in name or "coverage" in name
    if isinstance(value, list):
        if len(value) == 2 and all(isinstance(v, int | float) for v in value):
            return f"[{percent(value[0])}, {percent(value[1])}]" if share else interval(value)
        return ", ".join(number(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{_words(k)} {_cell(k, v)}" for k, v in value.items()) or "–"
    return percent(value) if share and isinstance(value, float) else number(value)


def _all_figures(content: ReportContent) -> str:
    """Every figure of every method, for whoever wants to compare with a paper."""
    methods = (content.evaluation or {}).get("methods") or {}
    records = []
    for members in grouped_methods(methods).values():
        for method in members:
            figures = dict(methods[method.name] or {})
            record: dict[str, Any] = {"method": method.label}
            for name in (
                "num_queries",
                "q1_km",
                "median_km",
                "q3_km",
                "mean_km",
                "mean_km_ci",
                "trimmed_mean_km",
                "std_km",
            ):
                record[name] = figures.get(name)
            for km, share in (figures.get("accuracy_at_km") or {}).items():
                record[f"accuracy_at_{km}_km"] = share
            records.append(record)
    if not records:
        return ""
    return (
        f"<h2>All figures</h2>{_records(content, 'Errors in km, and the share of queries within a distance', records)}"
    )


def _comparisons(content: ReportContent) -> str:
    """Hedwig against each method on the same queries, and the evaluation's single values."""
    evaluation = content.evaluation or {}
    records = [
        {"hedwig minus": method.label, **_flat(evaluation["paired"][method.name])}
        for members in grouped_methods(evaluation.get("paired") or {}).values()
        for method in members
    ]
    words = "Paired differences on the same queries (km below 0 and GeoScore above 0 favour hedwig)"
    table = f"<h2>Compared query by query</h2>{_records(content, words, records)}" if records else ""
    skip = {"methods", "paired", "verdict", "better_than_floors", "countries", "per_country", "errors_km"}
    single = {key: plain(value) for key, value in evaluation.items() if key not in skip}
    if not single:
        return table
    items = "".join(f"<dt>{text(_words(key))}</dt><dd>{text(_cell(key, value))}</dd>" for key, value in single.items())
    mark = ' <span class="badge">synthetic</span>' if content.synthetic else ""
    return f"{table}<h2>Cells, radius and split{mark}</h2><dl>{items}</dl>"


def _flat(record: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by a blank."""
    flat: dict[str, Any] = {}
    for key, value in dict(record or {}).items():
        name = f"{prefix} {key}".strip().removesuffix(" difference")
        flat |= _flat(value, name) if isinstance(value, Mapping) else {name: value}
    return flat


def _countries(content: ReportContent) -> str:
    evaluation = content.evaluation or {}
    records = evaluation.get("countries") or evaluation.get("per_country") or []
    return (
        f"<h2>By country</h2>{_records(content, 'Countries with the most queries first', records)}" if records else ""
    )


def _accounting(content: ReportContent) -> str:
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
    return (
        f'<h2>What became of every row</h2><div class="wide"><table>{_caption(content, "in = out + rejected")}<thead><tr>'
        f'{heads}<th scope="col" class="text">reasons</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def _definitions(content: ReportContent) -> str:
    """What the figures mean; none is shown without its definition."""
    if not content.evaluation:
        return ""
    terms = {
        "error": "great-circle (haversine) distance between answer and truth on a sphere of 6371.0088 km radius",
        "≤ x km": "share of queries with a smaller error: 1 street, 25 city, 200 region, 750 country, 2500 continent",
        "GeoScore": "mean of 5000 · exp(−error / 1492.7 km); 5000 is perfect",
        "trimmed mean": "mean of the middle 80 % of the errors",
        "interval": "95 %, from a bootstrap over queries; shares of single groups after Wilson",
        "floor": "an answer that never saw the picture; a method that does not beat it has learnt nothing",
        "oracle": "an answer that was told the true cell, or the nearest training place: what is left to gain",
    }
    items = "".join(f"<dt>{text(term)}</dt><dd>{text(words)}</dd>" for term, words in terms.items())
    return f"<h2>What the figures mean</h2><dl>{items}</dl>"


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
