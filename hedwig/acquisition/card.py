"""A data card: what a table of panoramas consists of, said beside it before anybody trains on it.

Counts per source, country, year, licence and author (whom the open licences want credited); what is missing; what is
there twice (the same bytes, the same id, or two panoramas under 10 m apart of the same time); and a map. It describes
and judges nothing, removes nothing, and needs no image: the table is enough.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hedwig import storage
from hedwig.acquisition.maps import draw_positions, png_bytes, shortest_arc
from hedwig.geo import km_to_chord, unit_vectors
from hedwig.geocells import Geography

__all__ = ["data_card", "read_card_table", "write_card"]

Texts = list[str | None]

FIELDS = (
    "pano_id", "lat", "lon", "heading", "captured_at", "country", "source", "licence", "author", "sha256", "image_uri"
)  # fmt: skip
COUNTED = ("source", "country", "year", "licence", "author", "projection", "split")
SYNONYMS = {
    "latitude": "lat", "lng": "lon", "longitude": "lon", "compass_angle": "heading", "bearing": "heading",
    "license": "licence", "creator": "author", "attribution": "author", "credit": "author", "uploader": "author",
    "content_hash": "sha256", "image_sha256": "sha256", "datetime": "captured_at", "datetime_local": "captured_at",
}  # fmt: skip
NEAR_KM = 0.01
SHOWN = 20
UNKNOWN = "unknown"


def read_card_table(path: str) -> pd.DataFrame:
    """A listing (CSV, TSV, Parquet) or an artefact's folder of Parquet, with the column names of hedwig.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is of another type.
    """
    path = storage.resolve(path)
    if not storage.exists(path):
        raise FileNotFoundError(f"No table at {path!r}; give a .csv, .tsv or .parquet file, or a folder of Parquet.")
    lower = path.lower()
    if lower.endswith((".parquet", ".geoparquet")):
        frame = pd.read_parquet(io.BytesIO(storage.read_bytes(path)))
    elif lower.endswith((".csv", ".tsv")):
        separator = "\t" if lower.endswith(".tsv") else ","
        frame = pd.read_csv(
            io.BytesIO(storage.read_bytes(path)), sep=separator, dtype=str, keep_default_na=False, skipinitialspace=True
        )
    elif storage.is_folder(path):
        frame = storage.read_table(path).to_pandas()
    else:
        raise ValueError(f"{path} is no table: give a .csv, .tsv or .parquet file, or a folder of Parquet.")
    frame = frame.rename(columns={name: str(name).strip().lower() for name in frame.columns})
    return frame.rename(columns={k: v for k, v in SYNONYMS.items() if k in frame.columns and v not in frame.columns})


def data_card(table: pd.DataFrame, *, geography: Geography | None = None) -> dict[str, Any]:
    """What a table of panoramas consists of.

    Args:
        table: one row per panorama, or per image of one (rows that share ``pano_id`` and differ in ``heading``); any
            of the columns ``pano_id, lat, lon, heading, captured_at, country, source, licence, author, sha256,
            projection, split`` may be absent.
        geography: names the country of rows that have a position and no country.

    Returns:
        Plain JSON values: ``num_rows, num_panoramas, num_positions, extent, counts, missing, duplicates`` and
        ``num_countries_looked_up``. A count's keys are ordered by number.
    """
    num = len(table)
    columns: dict[str, Texts] = {name: _texts(table, name) for name in (*FIELDS, "projection", "split")}
    lat, lon = (pd.to_numeric(pd.Series(columns[n], dtype=object), errors="coerce").to_numpy(np.float64)
                for n in ("lat", "lon"))  # fmt: skip
    located = np.isfinite(lat) & np.isfinite(lon) & (np.abs(lat) <= 90) & (np.abs(lon) <= 180)
    missing = {name: sum(value is None for value in columns[name]) for name in FIELDS}
    looked_up = _fill_countries(columns["country"], lat, lon, located, geography)
    columns["year"] = [_year(value) for value in columns["captured_at"]]
    first = _first_rows(columns["pano_id"])
    counts = {name: _count([columns[name][i] for i in first]) for name in COUNTED}
    return {
        "num_rows": num,
        "num_panoramas": len(first),
        "num_positions": int(located.sum()),
        "num_countries_looked_up": looked_up,
        "extent": _extent(lat[located], lon[located]),
        "counts": counts,
        "absent": [name for name in FIELDS if name not in table.columns],
        "missing": missing,
        "duplicates": {
            "same_sha256": _extra(columns["sha256"]),
            "same_pano_id": _extra(_keys(columns["pano_id"], columns["heading"])),
            "near_same_time": _near_same_time(lat, lon, columns["captured_at"], first, located),
        },
    }


def write_card(path: str, *, geography: Geography, out: str | None = None) -> dict[str, Any]:
    """Read a table and write its card as JSON, Markdown, HTML and a map; by default next to the table.

    Args:
        path: the table.
        geography: names countries and draws the land.
        out: the files' common beginning; by default the table's path without its ending.

    Returns:
        The card, with ``files`` in it.
    """
    frame = read_card_table(path)
    card = data_card(frame, geography=geography)
    resolved = storage.resolve(path).rstrip("/")
    start = storage.resolve(out) if out else re.sub(r"\.(csv|tsv|parquet|geoparquet)$", "", resolved, flags=re.I)
    name = resolved.rsplit("/", 1)[-1]
    empty = pd.Series(np.full(len(frame), np.nan))
    lat, lon = (pd.to_numeric(frame.get(n, empty), errors="coerce").to_numpy(np.float64) for n in ("lat", "lon"))
    figure = draw_positions(
        lat, lon, geography.land_rings(0.05),
        title=f"{card['num_panoramas']:,} panoramas", subtitle=f"{name}; Equal Earth projection: areas are true",
    )  # fmt: skip
    picture = png_bytes(figure)
    files = {ending: f"{start}.card.{ending}" for ending in ("json", "md", "html", "png")}
    card = {"table": name, **card}
    storage.write_bytes(files["png"], picture)
    storage.write_bytes(files["md"], _markdown(card, files["png"].rsplit("/", 1)[-1]).encode())
    storage.write_bytes(files["html"], _page(card, picture).encode())
    storage.write_bytes(files["json"], (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())
    return {**card, "files": files}


def _texts(table: pd.DataFrame, name: str) -> Texts:
    if name not in table.columns:
        return [None] * len(table)
    return [None if v is None or v is pd.NaT or v != v else str(v).strip() or None for v in table[name].tolist()]


def _fill_countries(
    country: Texts, lat: NDArray[np.float64], lon: NDArray[np.float64], located: NDArray[np.bool_],
    geography: Geography | None,
) -> int:  # fmt: skip
    rows = [int(i) for i in np.flatnonzero(located) if country[i] is None]
    if geography is None or not rows:
        return 0
    for row, code in zip(rows, geography.lookup(lat[rows], lon[rows]).country, strict=True):
        country[row] = str(code)
    return len(rows)


def _year(value: str | None) -> str | None:
    """The year of an ISO time, or of milliseconds since 1970 as Mapillary writes them."""
    if value is None:
        return None
    if re.fullmatch(r"\d{12,13}(\.0)?", value):
        return str(datetime.fromtimestamp(float(value) / 1000, UTC).year)
    found = re.match(r"(1[89]|20)\d\d(?!\d)", value)
    return found.group() if found else None


def _first_rows(pano_id: Texts) -> list[int]:
    """The first row of every panorama; a row without an id is one of its own."""
    seen: set[str] = set()
    rows = []
    for row, name in enumerate(pano_id):
        if name is None or name not in seen:
            rows.append(row)
        if name is not None:
            seen.add(name)
    return rows


def _count(values: Texts) -> dict[str, int]:
    counted = Counter(UNKNOWN if value is None else value for value in values)
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def _keys(pano_id: Texts, heading: Texts) -> Texts:
    return [None if p is None else f"{p}\n{h or ''}" for p, h in zip(pano_id, heading, strict=True)]


def _extra(values: Texts) -> int:
    """Rows beyond the first of each value."""
    known = [value for value in values if value is not None]
    return len(known) - len(set(known))


def _near_same_time(
    lat: NDArray[np.float64], lon: NDArray[np.float64], captured_at: Texts, first: list[int], located: NDArray[np.bool_]
) -> int:
    """Panoramas that have another one of exactly the same time under 10 m away."""
    rows = np.array([i for i in first if located[i] and captured_at[i] is not None], dtype=np.int64)
    if len(rows) < 2:
        return 0
    times = np.unique([str(captured_at[i]) for i in rows], return_inverse=True)[1]
    # a fourth coordinate that sets different times an Earth's radius apart
    space = np.concatenate([unit_vectors(lat[rows], lon[rows]), times[:, None].astype(np.float64)], axis=1)
    nearest, _ = cKDTree(space).query(space, k=2, distance_upper_bound=float(km_to_chord(NEAR_KM)))
    return int(np.isfinite(nearest[:, 1]).sum())


def _extent(lat: NDArray[np.float64], lon: NDArray[np.float64]) -> dict[str, float] | None:
    if not len(lat):
        return None
    west, east = lon.min(), lon.max()
    middle, width = shortest_arc(lon)
    if width < east - west - 1e-6:  # across the antimeridian, where west is the greater one
        west, east = ((middle + side * width / 2 + 180) % 360 - 180 for side in (-1, 1))
    bounds = {"south": lat.min(), "north": lat.max(), "west": west, "east": east}
    return {name: round(float(value), 6) for name, value in bounds.items()}


def _sections(card: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The card's tables: a heading, and rows of a name and a number."""
    whole = [
        ("rows", f"{card['num_rows']:,}"),
        ("panoramas", f"{card['num_panoramas']:,}"),
        ("rows with a position", f"{card['num_positions']:,}"),
    ]
    duplicates = card["duplicates"]
    twice = [
        ("further rows of the same image bytes (sha256)", f"{duplicates['same_sha256']:,}"),
        ("further rows of the same pano_id and heading", f"{duplicates['same_pano_id']:,}"),
        ("panoramas under 10 m from one of the same time", f"{duplicates['near_same_time']:,}"),
    ]
    for row, column in ((0, "sha256"), (1, "pano_id"), (2, "captured_at")):
        if card["missing"][column] == card["num_rows"]:
            twice[row] = (twice[row][0], f"not known: no {column}")
    gaps = [
        (name, "no such column" if name in card["absent"] else f"{n:,}") for name, n in card["missing"].items() if n
    ]
    sections = [("Whole", whole)]
    for name, counted in card["counts"].items():
        if set(counted) <= {UNKNOWN}:
            continue
        rows = [(key, f"{n:,}") for key, n in list(counted.items())[:SHOWN]]
        if len(counted) > SHOWN:
            rest = sum(list(counted.values())[SHOWN:])
            rows.append((f"{len(counted) - SHOWN:,} more (all in the JSON)", f"{rest:,}"))
        sections.append((f"Panoramas per {name}", rows))
    return [*sections, ("There twice", twice), ("Rows without a value", gaps or [("none", "0")])]


def _markdown(card: dict[str, Any], picture: str) -> str:
    lines = [f"# Data card: {_plain(card['table'])}", "", f"![map of the positions](<{picture}>)"]
    for heading, rows in _sections(card):
        lines += ["", f"## {heading}", "", "| | |", "|---|---:|"]
        lines += [f"| {_plain(name)} | {number} |" for name, number in rows]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown takes as it is."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _page(card: dict[str, Any], picture: bytes) -> str:
    tables = "\n".join(
        f"<section><h2>{html.escape(heading)}</h2><table>"
        + "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(number)}</td></tr>" for name, number in rows)
        + "</table></section>"
        for heading, rows in _sections(card)
    )
    title = html.escape(f"Data card: {card['table']}")
    image = base64.b64encode(picture).decode()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main><h1>{title}</h1>"
        f'<img alt="Map of the positions" src="data:image/png;base64,{image}">'
        f"<div>{tables}</div></main></body></html>\n"
    )


_STYLE = """
:root{color-scheme:light dark;--ink:#1f2933;--muted:#5d6874;--faint:#e4e8ec;--page:#fbfbfa}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--muted:#9aa7b4;--faint:#2e3842;--page:#14191e}
img{filter:brightness(.93)}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1100px;margin:0 auto;padding:34px 28px}h1{font-size:1.7rem;margin:0 0 1.2rem;line-height:1.2}
img{display:block;width:100%;height:auto;background:#fff;border:1px solid var(--faint);border-radius:8px}
div{columns:2;column-gap:40px;margin-top:1rem}section{break-inside:avoid;padding-top:1.2rem}
h2{font-size:1.02rem;margin:0 0 .4rem}table{border-collapse:collapse;width:100%;font-size:.88rem;
font-variant-numeric:tabular-nums}th,td{padding:.25rem .3rem;border-bottom:1px solid var(--faint);text-align:right;
vertical-align:baseline}th{text-align:left;font-weight:400}td{white-space:nowrap}
@media (max-width:760px){div{columns:1}main{padding:22px 16px}}
"""
