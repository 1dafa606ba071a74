"""``hedwig geocells build`` and ``compare`` as a user types them: the record, the table, the map, the exit codes."""

from __future__ import annotations

import json

import geopandas as gpd
import numpy as np
import pytest
import shapely
import typer
from PIL import Image
from typer.testing import CliRunner

from hedwig.cli.console import HedwigGroup
from hedwig.cli.geocells import register
from hedwig.geocells import Geocells
from hedwig.storage import read_manifest

FIELDS = {
    "builder", "num_cells", "num_points", "min_size", "max_size", "uncovered", "overlaps", "oracle_median_km",
    "oracle_mean_km", "seconds", "cpu_seconds", "border_purity", "balance", "median_area_km2", "max_off_polygon_km",
}  # fmt: skip


@pytest.fixture
def hedwig(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = typer.Typer(cls=HedwigGroup, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    register(app)

    def run(*arguments):
        return CliRunner().invoke(app, ["geocells", *map(str, arguments)])

    return run


@pytest.fixture
def points(tmp_path):
    """A file as they come, two bare columns, and the polygons of two countries under it."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal([48, 3], 1.5, (300, 2)), rng.normal([48, 13], 1.5, (300, 2))])
    np.savetxt(tmp_path / "points.txt", rows, fmt="%.6f", delimiter=", ")
    shapes = [shapely.box(-5, 40, 8, 55), shapely.box(8, 40, 20, 55)]
    gpd.GeoDataFrame({"iso_a3": ["FRA", "DEU"]}, geometry=shapes, crs=4326).to_file(tmp_path / "admin0.gpkg")
    return tmp_path / "points.txt"


@pytest.mark.parametrize("builder", ["admin", "kmeans", "quadtree", "quadtree-adaptive", "h3"])
def test_build(hedwig, points, tmp_path, builder):
    done = hedwig("build", points, "--builder", builder, "--min", 20, "--max", 60, "--admin0", "admin0.gpkg",
        "--out", "cells", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert set(told) >= FIELDS
    assert (told["num_points"], told["uncovered"], told["overlaps"], told["num_left_out"]) == (600, 0, 0, 0)
    assert told["max_size"] <= 60
    assert told["min_size"] >= 20
    cells = Geocells.load(tmp_path / "cells")
    assert len(cells) == told["num_cells"]
    assert set(cells.table["country"]) == {"FR", "DE"}
    manifest = read_manifest("cells")
    assert (manifest.kind, manifest.num_out, manifest.config["builder"]) == ("geocells", 600, builder)


def test_clusters_alone_are_plain_kmeans_and_text_says_so(hedwig, points):
    done = hedwig("build", points, "--builder", "kmeans", "--clusters", 7, "--admin0", "admin0.gpkg", "--out",
        "cells", "--map", "cells.png")  # fmt: skip
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["builder", "cells"]
    assert lines[1].split()[:2] == ["kmeans", "7"]
    assert "Levels: " in done.stdout
    assert Image.open("cells.png").size[0] == 1920


def test_compare_draws_and_takes_published_boxes(hedwig, points, tmp_path):
    (tmp_path / "osv.csv").write_text(
        "cluster_id,min_lat,min_lon,max_lat,max_lon,mean_lat,mean_lon\n0,40,-5,55,8,48,3\n1,40,8,50,20,48,13\n"
    )
    done = hedwig("compare", points, "--builder", "admin", "--builder", "kmeans", "--admin0", "admin0.gpkg",
        "--osv5m-quadtree", "osv.csv", "--map", "cells.png", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    admin, kmeans, osv5m = json.loads(done.stdout)["builders"]
    assert [row["builder"] for row in (admin, kmeans, osv5m)] == ["admin", "kmeans", "osv5m"]
    assert kmeans["num_cells"] == admin["num_cells"]
    assert admin["border_purity"] == 1.0
    assert osv5m["num_cells"] == 2
    assert osv5m["oracle_median_km"] > admin["oracle_median_km"]
    width, height = Image.open("cells.png").size
    assert width == 1920
    assert height > width


def test_what_is_refused(hedwig, points):
    assert hedwig("compare", points, "--builder", "s2").exit_code == 2
    done = hedwig("build", points, "--out", "cells", "--admin1", "admin0.gpkg")
    assert done.exit_code == 2
    assert "need --admin0" in done.output
    done = hedwig("build", "none.csv", "--out", "cells")
    assert done.exit_code == 2
    assert "No points at" in done.output
    assert hedwig("build", points, "--out", "cells", "--min", 50, "--max", 60).exit_code == 1
