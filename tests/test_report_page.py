"""The page, the JSON and the console's table: escaping, no outside addresses, the word synthetic, honest gaps."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import geopandas as gpd
import numpy as np
import pytest
from shapely.geometry import box

from hedwig.metrics import summarise
from hedwig.report import ReportContent, console_table, write_report
from hedwig.report.content import plain, report_json
from hedwig.report.page import MAX_PAGE_BYTES, Picture, render_page
from hedwig.report.tables import grouped_methods, number

HOSTILE = '"><script>alert(1)</script><img src=http://evil.test/x onerror=alert(1)>'


class Tags(HTMLParser):
    """Collects tags, attributes and text; complains about tags that do not nest."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.seen, self.open, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def parse(page):
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


@pytest.fixture
def content():
    rng = np.random.default_rng(0)
    lat, lon = rng.uniform(40, 50, 30), rng.uniform(0, 20, 30)
    errors = {name: 10 ** rng.uniform(0, 4, 30) for name in ("hedwig", "random", "constant", "perfect_cell")}
    evaluation = {
        "methods": {name: summarise(e, num_bootstrap=50) for name, e in errors.items()},
        "paired": {"random": {"median_km": {"difference": -5.0, "ci": [-9.0, np.nan]}}},
        "verdict": f"Better than every floor. {HOSTILE}", "better_than_floors": True,
        "cell_recall": {"1": 0.4, "5": 0.7}, "radius_coverage": {"share": 0.8, "ci": [0.7, 0.9]},
        "countries": [{"country": HOSTILE, "num_queries": 3, "median_km": np.nan, "accuracy_at_750_km": 0.5}],
        "calibration": {"radius_90": {"share": 0.8, "ci": [0.7, 0.9], "nominal": 0.9, "median_radius_km": 500.0}},
        "errors_km": errors,
    }  # fmt: skip
    strip = rng.integers(0, 255, (64, 512, 3), dtype=np.uint8)
    near = {"pano_id": HOSTILE, "lat": 1.0, "lon": -2.0, "score": np.float32(0.5), "strip": strip}
    return ReportContent(
        title=f"An experiment {HOSTILE}",
        experiment={"name": HOSTILE, "rate": float("inf")},
        encoder_note="random weights (seed 0)",
        synthetic=True,
        evaluation=evaluation,
        accounting=[
            {"stage": "captions", "num_in": 10, "num_out": 8, "num_rejected": 2, "reasons": {HOSTILE: 2}},
            {"stage": "embeddings", "num_in": 8, "num_out": 5, "num_rejected": 0, "reasons": {}},
        ],
        train=(lat, lon),
        queries={
            "pano_id": np.array([f"q{i}" for i in range(30)]), "lat": lat, "lon": lon, "pred_lat": lat, "pred_lon": lon,
            "error_km": errors["hedwig"], "confidence": rng.random(30), "radius_km": np.full(30, 500.0),
        },
        errors_km=errors,
        geocells=gpd.GeoDataFrame(
            {"cell_id": [0], "lat": [45.0], "lon": [10.0], "num_panoramas": [30]},
            geometry=[box(0, 40, 20, 50)], crs=4326,
        ),
        gallery=[
            {"pano_id": HOSTILE, "strip": strip, "error_km": 3.0, "truth": (1.0, 2.0), "prediction": (1.0, np.nan),
             "caption": HOSTILE, "neighbours": [near, {"pano_id": "r1", "lat": None, "lon": None, "score": None}]},
            {"pano_id": "second", "strip": None, "error_km": None, "truth": None, "prediction": None, "caption": None,
             "neighbours": []},
        ],
        credits=[f"Outlines: Natural Earth {HOSTILE}"],
        versions={"numpy": "2", "hedwig": HOSTILE},
        timings={"captions": 0.25, "index": np.nan},
        commands=["hedwig run demo.yaml", HOSTILE],
    )  # fmt: skip


def test_write_report_writes_everything_and_nothing_else(tmp_path, content):
    paths = write_report(tmp_path / "report", content)
    assert paths[0].name == "report.html"
    assert {p.name for p in paths} == {p.name for p in (tmp_path / "report").iterdir()}
    pictures = [p for p in paths if p.suffix == ".png"]
    maps = {"map_panoramas", "map_geocells", "map_errors", "map_countries"}
    assert {p.stem for p in pictures} == maps | {"error_cdf", "reliability", "calibration"}
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert picture.stat().st_size <= 400_000
    page = paths[0].read_text()
    assert len(page.encode()) <= MAX_PAGE_BYTES
    tags = parse(page)
    images = [attrs for tag, attrs in tags.seen if tag == "img"]
    assert len(images) == 7 + 2
    assert all(i["src"].startswith("data:image/") and i["alt"] for i in images)


def test_hostile_text_is_shown_not_run(content):
    page = render_page(content, {})
    tags = parse(page)
    assert "script" not in {tag for tag, _ in tags.seen}
    assert not any(name.startswith("on") or name in ("href", "srcset") for _, attrs in tags.seen for name in attrs)
    assert "".join(tags.words).count("<script>alert(1)</script>") >= 9
    for _, attrs in tags.seen:
        assert str(attrs.get("src", "data:")).startswith("data:")
    assert not re.search(r"url\(|@import|<link|<iframe", page)
    policy = [a["content"] for t, a in tags.seen if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_tables_are_accessible_and_say_synthetic(content):
    page = render_page(content, {"map_errors": Picture(b"png", "a map", "a caption")})
    tables = re.findall(r"<table>.*?</table>", page, flags=re.S)
    assert len(tables) >= 5
    for table in tables:
        caption = re.search(r"<caption>(.*?)</caption>", table, flags=re.S)
        assert caption is not None
        assert "synthetic" in caption.group(1)
        assert all(re.search(r'scope="(col|row|rowgroup)"', th) for th in re.findall(r"<th\b[^>]*>", table))
    assert "(synthetic)</title>" in page
    assert 'lang="en"' in page
    assert "prefers-color-scheme:dark" in page


def test_top_of_the_page_is_title_verdict_table_map(content):
    page = render_page(content, {"error_cdf": Picture(b"b", "", ""), "map_errors": Picture(b"a", "the map", "")})
    positions = [page.index(mark) for mark in ("<h1>", "Better than every floor", "<table>", "the map", "<h2>")]
    assert positions == sorted(positions)
    assert page.index("Floors: never saw") < page.index("Oracles: know the answer&#x27;s cell") < page.index("<h2>")


def test_lost_rows_are_marked(content):
    page = render_page(content, {})
    assert "+3 rows are unaccounted for" in page
    assert page.count('<tr class="bad">') == 1


def test_page_without_synthetic_or_truth():
    page = render_page(ReportContent(title="Real", evaluation=None), {})
    parse(page)
    assert "synthetic" not in page
    assert "No query has a known position" in page
    assert "<h2>" not in page


def test_empty_content_writes_a_report(tmp_path):
    paths = write_report(tmp_path, ReportContent(title="Empty"))
    assert "calibration.png" not in {p.name for p in paths}
    assert json.loads((tmp_path / "report.json").read_text())["evaluation"] is None


def test_page_stays_below_its_limit(content):
    noise = np.random.default_rng(0).integers(0, 255, (600, 2400, 3), dtype=np.uint8)
    gallery = [{**content.gallery[0], "strip": noise, "neighbours": []}] * 40
    big = ReportContent(title="Big", gallery=gallery)
    page = render_page(big, {})
    assert len(page.encode()) <= MAX_PAGE_BYTES
    assert page.count('class="strip"') == 40, "made smaller, not left out"


def test_json_is_plain_and_complete(tmp_path, content):
    write_report(tmp_path, content)

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert record["synthetic"] is True
    assert record["methods"]["hedwig"]["median_km"] == content.evaluation["methods"]["hedwig"]["median_km"]
    assert "methods" not in record["evaluation"]
    assert "errors_km" not in record["evaluation"]
    assert record["evaluation"]["paired"]["random"]["median_km"]["ci"] == [-9.0, None]
    assert record["experiment"]["rate"] is None
    assert record["timings"] == {"captions": 0.25, "index": None}
    assert list(record["versions"]) == ["hedwig", "numpy"]
    assert set(record) >= {"title", "encoder_note", "accounting", "commands", "credits"}
    assert report_json(content) == record


def test_plain_takes_numpy_apart():
    value = {"a": np.float32(np.nan), 1: np.arange(2), "b": (np.bool_(True), np.str_("x")), "c": [float("-inf"), None]}
    assert plain(value) == {"a": None, "1": [0, 1], "b": [True, "x"], "c": [None, None]}
    with pytest.raises(ValueError, match="raw bytes"):
        plain({"image": b"123"})


def test_number_is_short():
    written = [number(v) for v in (0.123456, 12.345, 1234.5, -1234.5, 7, None, float("nan"))]
    assert written == ["0.12", "12.3", "1,234", "−1,234", "7", "–", "–"]


def test_console_table_is_aligned_with_floors_under_a_rule(content):
    table = console_table({**content.evaluation, "verdict": "Good."}, True, "random weights (seed 0)")
    lines = table.splitlines()
    assert "SYNTHETIC" in lines[0]
    assert "random weights (seed 0)" in lines[0]
    for heading in ("method", "median km [95 % CI]", "mean km", "GeoScore [95 % CI]", "@25", "@200", "@750", "@2500"):
        assert heading in lines[1]
    assert lines[1].endswith(" n")
    assert len({len(line) for line in lines[1:9]}) == 1, "every line is as long as the rule"
    kinds = ["rule" if line.startswith("─") else line.split("  ")[0] for line in lines[2:9]]
    floors = ["best constant (median km)", "random training place"]
    assert kinds == ["rule", "hedwig", "rule", *floors, "rule", "perfect cell (oracle)"]
    median = content.evaluation["methods"]["hedwig"]["median_km"]
    assert re.search(rf"hedwig +{re.escape(number(median))} \[", table)
    assert lines[-1] == "Good."


def test_console_table_without_truth_or_with_gaps():
    assert "nothing to evaluate" in console_table(None, False, "")
    assert "SYNTHETIC" not in console_table(None, False, "")
    assert "–" in console_table({"methods": {"hedwig": {}}}, False, "")


def test_unknown_methods_count_as_methods():
    groups = grouped_methods(["mine", "random", "hedwig"])
    assert [m.name for m in groups["method"]] == ["hedwig", "mine"]
    assert list(groups) == ["method", "floor"]
