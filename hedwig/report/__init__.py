"""The report of a run: ``report.html`` in one file, ``report.json`` for machines, and the pictures as PNG.

`write_report` draws what `ReportContent` holds and reads nothing else: no artefact, no network. A run without queries,
cells or positions gets a report too, whose pictures say what is absent.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hedwig.report.charts import draw_calibration, draw_error_cdf
from hedwig.report.content import ReportContent, column, report_json
from hedwig.report.country_map import draw_countries
from hedwig.report.drawing import png_bytes
from hedwig.report.maps import draw_errors, draw_geocells, draw_panoramas
from hedwig.report.page import Picture, render_page
from hedwig.report.reliability import draw_reliability
from hedwig.report.tables import console_table
from hedwig.storage import write_bytes

__all__ = ["ReportContent", "console_table", "draw_pictures", "write_report"]


def write_report(folder: Path, content: ReportContent) -> list[Path]:
    """Write ``report.html``, ``report.json`` and the pictures into `folder`, each under a temporary name first.

    Args:
        folder: made if it is not there; files of an earlier report are replaced.
        content: what to show.

    Returns:
        The files, the page first.
    """
    pictures = draw_pictures(content)
    record = json.dumps(report_json(content), indent=1, ensure_ascii=False, allow_nan=False)
    files = {
        "report.html": render_page(content, pictures).encode(),
        "report.json": f"{record}\n".encode(),
        **{f"{name}.png": picture.png for name, picture in pictures.items()},
    }
    for name, data in files.items():
        write_bytes(str(folder / name), data)
    return [folder / name for name in files]


def draw_pictures(content: ReportContent) -> dict[str, Picture]:
    """The pictures by file stem, with the words that describe them; what has nothing to show is left out."""
    synthetic, queries = content.synthetic, content.queries
    evaluation = content.evaluation or {}
    places = (column(queries, "lat"), column(queries, "lon"))
    pictures = {
        "map_errors": Picture(
            png_bytes(draw_errors(queries, content.land, synthetic=synthetic)),
            "Map of the queries coloured by their error, with a line from the true place to the answer.",
            "Each query at its true place, its colour the error; the line is the great circle to the answer.",
        ),
        "error_cdf": Picture(
            png_bytes(draw_error_cdf(content.errors_km or evaluation.get("errors_km") or {}, synthetic=synthetic)),
            "Curves of the share of queries within a distance, for hedwig, other methods, floors and oracles.",
            "The further left and up, the better. Dashed floors never saw the picture, dotted oracles were told.",
        ),
        "map_panoramas": Picture(
            png_bytes(draw_panoramas(content.train, places, content.land, synthetic=synthetic)),
            "Map of the reference panoramas and of the queries.",
            "Where the references and the queries are. What is far from every reference cannot be found.",
        ),
        "map_geocells": Picture(
            png_bytes(draw_geocells(content.geocells, content.land, synthetic=synthetic)),
            "Map of the geocells coloured by the number of training panoramas in each.",
            "The classes that the geolocator chooses from, and how much it has seen of each.",
        ),
    }
    if countries := evaluation.get("countries"):
        drawn = draw_countries(countries, content.country_shapes, queries, content.land, synthetic=synthetic)
        pictures["map_countries"] = Picture(
            png_bytes(drawn),
            "Map of the countries coloured by the median error of their queries.",
            "The median error of each country; how many queries and which interval, in the table by country below.",
        )
    judged = evaluation.get("calibration") or {}
    if any(judged.get(name) for name in ("confidence", "radius_50", "radius_90")):
        pictures["reliability"] = Picture(
            png_bytes(draw_reliability(judged, synthetic=synthetic)),
            "Reliability diagram of the stated confidence, and coverage of the regions of 50 and 90 %.",
            "On the line, promises are kept; below it, answers are surer of themselves than they should be.",
        )
    if any(np.isfinite(column(queries, name)).any() for name in ("radius_km", "confidence")):
        coverage = evaluation.get("radius_coverage")
        share = coverage.get("share") if isinstance(coverage, dict) else coverage
        pictures["calibration"] = Picture(
            png_bytes(draw_calibration(queries, coverage=share, synthetic=synthetic)),
            "Three charts: error against stated radius, error of the surest queries, outcome by confidence.",
            "Left: below the line the truth is inside the radius. Middle: falling to the left means that confidence "
            "tells good from bad. Right: bins of equal size with 95 % intervals.",
        )
    return pictures
