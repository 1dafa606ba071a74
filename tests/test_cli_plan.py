"""``hedwig plan`` end to end: the files it writes, the estimate, the exit codes, the same bytes twice."""

from __future__ import annotations

import hashlib
import json
import logging

import geopandas as gpd
import pandas as pd
import pytest
from PIL import Image
from shapely.geometry import box
from typer.testing import CliRunner

from hedwig.cli import app


@pytest.fixture
def hedwig(tmp_path, monkeypatch):
    """Run ``hedwig plan …`` in this process, in a folder of its own; the geography is loaded once."""
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("hedwig")
    before = logger.handlers, logger.level, logger.propagate
    yield lambda *arguments: CliRunner().invoke(app, ["plan", *map(str, arguments)])
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture
def polygons(tmp_path):
    shapes = [box(9, 48, 10, 49), box(11, 48, 12, 49), box(13, 48, 13.001, 48.001)]
    path = tmp_path / "regions.geojson"
    gpd.GeoDataFrame({"name": ["west", "east", "dot"]}, geometry=shapes, crs="EPSG:4326").to_file(path)
    return path


def test_regions_writes_plan_record_and_map(hedwig, tmp_path, polygons):
    arguments = ("regions", polygons, "--per-region", 4, "--id-column", "name", "--seed", 3)
    done = hedwig(*arguments, "--out", "plan.csv", "--map", "plan.png")
    assert done.exit_code == 0, done.stderr
    assert "12 places in 3 regions" in done.stdout
    assert "108 requests: 12 lookups, 96 images" in done.stdout
    table = pd.read_csv(tmp_path / "plan.csv")
    assert table.groupby("region").size().to_dict() == {"dot": 4, "east": 4, "west": 4}
    assert list(table.columns[:5]) == ["plan_id", "lat", "lon", "region", "country"]
    record = json.loads((tmp_path / "plan.csv.json").read_text())
    assert record["polygons"]["sha256"] == hashlib.sha256(polygons.read_bytes()).hexdigest()
    assert record["sha256"] == hashlib.sha256((tmp_path / "plan.csv").read_bytes()).hexdigest()
    assert (record["seed"], record["num_asked"], record["num_places"], record["shortfall"]) == (3, 12, 12, {})
    assert record["estimate"]["cost_usd"] == pytest.approx(0.67)
    assert Image.open(tmp_path / "plan.png").size[0] == 1680
    hedwig(*arguments, "--out", "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "plan.csv").read_bytes()


def test_a_region_that_is_too_small_is_told_and_the_rest_kept(hedwig, polygons):
    done = hedwig(
        "regions", polygons, "--per-region", 4, "--id-column", "name", "--min-distance-km", 5, "--json",
        "--source", "mapillary", "--out", "plan.csv"
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["shortfall"] == {"dot": 3}
    assert told["num_places"] == 9
    assert told["estimate"]["num_images"] == 9
    assert "3 places fewer than asked for" in done.stderr
    assert "dot (3)" in done.stderr


def test_wrong_column_source_and_file_have_their_exit_codes(hedwig, tmp_path, polygons):
    wrong = hedwig("regions", polygons, "--per-region", 1, "--id-column", "nam", "--out", "p.csv")
    assert (wrong.exit_code, "Did you mean 'name'?" in wrong.stderr) == (3, True)
    source = hedwig(
        "regions", polygons, "--per-region", 1, "--id-column", "name", "--source", "street", "--out", "p.csv"
    )
    assert source.exit_code == 2
    none = hedwig("regions", "none.geojson", "--per-region", 1, "--id-column", "name", "--out", "p.csv")
    assert none.exit_code == 2
    assert not (tmp_path / "p.csv").exists()


def test_coverage_and_card(hedwig, tmp_path):
    rows = "".join(f"{48 + i / 1000:.4f},{9 + i / 700:.4f}\n" for i in range(50))
    (tmp_path / "points.csv").write_text("lat,lon\n" + rows + "x,y\n")
    done = hedwig("coverage", "points.csv", "--num", 10, "--price-per-1000", 2, "--out", "plan.csv")
    assert done.exit_code == 0, done.stderr
    assert "1 rows are no positions" in done.stderr
    assert "0.16 USD (the price given)" in done.stdout
    record = json.loads((tmp_path / "plan.csv.json").read_text())
    assert record["points"]["num_no_position"] == 1
    assert hedwig("card", "plan.csv", "-q").exit_code == 0
    assert (tmp_path / "plan.card.html").is_file()


def test_world_and_population(hedwig, tmp_path):
    done = hedwig("world", "--num", 20, "--country", "FR", "--country", "DE", "--json", "--out", "w.csv")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["parameters"]["countries"] == ["DE", "FR"]
    done = hedwig("population", "--num", 20, "--country", "JP", "--alpha", 0.5, "--out", "p.csv")
    assert done.exit_code == 0, done.stderr
    assert set(pd.read_csv(tmp_path / "p.csv")["country"]) == {"JP"}
    assert pd.read_csv(tmp_path / "w.csv", keep_default_na=False)["country"].isin(["FR", "DE"]).mean() > 0.9
