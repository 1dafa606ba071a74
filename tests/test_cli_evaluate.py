"""`hedwig evaluate` in both its forms and `hedwig compare`, through the command line itself."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import typer
from typer.testing import CliRunner

from hedwig import storage
from hedwig.cli import evaluate
from hedwig.cli.console import HedwigGroup


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    logger = logging.getLogger("hedwig")
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


def hedwig(*arguments: Any) -> Any:
    app = typer.Typer(cls=HedwigGroup)
    evaluate.register(app)
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def tables(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    truth = pd.DataFrame(
        {"id": [f"q{i}" for i in range(30)], "lat": rng.uniform(45, 50, 30), "lng": rng.uniform(5, 10, 30)}
    )
    answers = truth.rename(columns={"id": "pano_id", "lng": "lon"}).assign(lat=truth["lat"] + 0.1)
    truth.to_csv(tmp_path / "truth.csv", index=False)
    answers.iloc[:28].to_parquet(tmp_path / "answers.parquet")
    return tmp_path / "answers.parquet", tmp_path / "truth.csv"


def test_two_tables_as_text_and_as_json(tables: tuple[Path, Path]) -> None:
    done = hedwig("evaluate", *tables, "--bootstrap", 50)
    assert done.exit_code == 0, done.output
    assert "28 of 30 queries answered (93.3 %)" in done.stdout
    assert "median    11.1 km" in done.stdout
    assert "2 queries without an answer: q28, q29" in done.stdout
    assert "With every unanswered query as wrong: 0.0, 93.3, 93.3, 93.3, 93.3 %" in done.stdout
    found = json.loads(hedwig("evaluate", *tables, "--bootstrap", 50, "--json").stdout)
    assert found["num_queries"] == 28
    assert found["median_km"] == pytest.approx(11.1195, abs=1e-3)
    assert found["accuracy_at_km"]["25"] == 1.0
    assert found["accounting"]["truth"]["missing"] == ["q28", "q29"]


def test_published_figures_stand_beside_with_their_sources(tables: tuple[Path, Path]) -> None:
    done = hedwig("evaluate", *tables, "--bootstrap", 20, "--protocol", "im2gps3k")
    line = next(line for line in done.stdout.splitlines() if line.startswith("GeoCLIP"))
    assert line.split()[:6] == ["GeoCLIP", "14.11", "34.47", "50.65", "69.67", "83.82"]
    assert "Im2GPS3k has 2,997 queries, this truth 30: not comparable." in done.stdout
    assert "Not every query was answered" in done.stdout
    found = json.loads(hedwig("evaluate", *tables, "--bootstrap", 20, "--protocol", "im2gps3k", "--json").stdout)
    assert found["protocol"]["published"][0]["source"].startswith("survey")
    done = hedwig("evaluate", *tables, "--protocol", "im2gps")
    assert done.exit_code == 2


def test_places_say_who_was_right_about_the_country(shared: Path) -> None:
    """Of OSV-5M's 50 rows ours and theirs (nearest GeoNames town) agree on the country of nearly all."""
    path = shared / "data" / "osv5m" / "select.csv"
    found = json.loads(hedwig("evaluate", path, path, "--bootstrap", 20, "--places", "--json").stdout)
    published = pd.read_csv(path)["country_hit"].mean()
    assert found["admin"]["country"]["share"] == pytest.approx(published, abs=0.04)
    assert sum(row["num_queries"] for row in found["countries"]) == 50


def test_an_experiment_runs_its_stage_with_its_overrides(monkeypatch: pytest.MonkeyPatch, pytestconfig: Any) -> None:
    called: list[Any] = []
    monkeypatch.setattr("hedwig.cli.make._run", lambda x, *stages, **other: called.append((x, stages, other)))
    demo = pytestconfig.rootpath / "experiments" / "demo.yaml"
    done = hedwig("evaluate", demo, "evaluate.num_bootstrap=77", "output=elsewhere", "--force")
    assert done.exit_code == 0, done.output
    ((experiment, stages, other),) = called
    assert experiment.evaluate.num_bootstrap == 77
    assert experiment.output == "elsewhere"
    assert stages == ("evaluate", "evaluate")
    assert other == {"force": True}
    assert hedwig("evaluate", demo, "--places").exit_code == 2


def test_wrong_usage(tables: tuple[Path, Path], tmp_path: Path) -> None:
    assert hedwig("evaluate", tables[0]).exit_code == 2
    assert hedwig("evaluate", *tables, tables[0]).exit_code == 2
    done = hedwig("evaluate", tmp_path / "absent.csv", tables[1])
    assert done.exit_code == 2
    assert "No table at" in done.stderr
    (tmp_path / "odd.csv").write_text("name,lat,lon\na,1,2\n")
    assert hedwig("evaluate", tmp_path / "odd.csv", tables[1]).exit_code == 3


def make_run(folder: Path, off_deg: float, num: int = 80) -> Path:
    """A run's folder as far as a comparison reads it."""
    rng = np.random.default_rng(0)
    lat, lon = rng.uniform(-50, 60, num), rng.uniform(-170, 170, num)
    ids = [f"p{i:03d}" for i in range(num)]
    split = ["train" if i < num // 2 else "test" for i in range(num)]
    off = off_deg * np.random.default_rng(1).uniform(0, 1, num)
    parts = {
        "embeddings": pa.table({"pano_id": ids, "lat": lat, "lon": lon, "split": split}),
        "predictions": pa.table({"pano_id": ids[num // 2 :], "lat": (lat + off)[num // 2 :], "lon": lon[num // 2 :]}),
    }
    for name, table in parts.items():
        storage.write_table(str(folder / name / "part-0.parquet"), table)
        storage.publish(str(folder / name), kind=name, config={}, inputs={}, num_in=num, num_out=num)
    return folder


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, off) for name, off in (("near", 1.0), ("far", 9.0), ("alike", 1.0))]
    target = tmp_path / "table.csv"
    done = hedwig("compare", *runs, "--bootstrap", 100, "--csv", target)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("best constant (GeoScore)") == 1
    assert "far minus near:" in done.stdout
    found = json.loads(hedwig("compare", *runs, "--bootstrap", 100, "--json").stdout)
    assert list(found["methods"]) == ["near", "far", "alike"]
    assert found["paired"]["far"]["median_km"]["ci"][0] > 0
    assert found["paired"]["alike"]["geoscore"]["difference"] == 0
    rows = list(csv.DictReader(target.read_text().splitlines()))
    assert [row["name"] for row in rows] == ["near", "far", "alike", "random", "constant", "constant_geoscore"]
    assert {len(row) for row in rows} == {25 + 28}
    assert float(rows[1]["median_km"]) == found["methods"]["far"]["median_km"]
    assert float(rows[1]["accuracy_at_750_km_low"]) == found["methods"]["far"]["accuracy_ci"]["750"][0]
    assert float(rows[1]["geoscore_minus_first_p"]) == found["paired"]["far"]["geoscore"]["p"]
    assert rows[0]["geoscore_minus_first"] == ""


def test_runs_that_are_called_alike_go_by_their_paths_and_unfinished_ones_are_named(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a" / "run", 1.0), make_run(tmp_path / "b" / "run", 2.0)
    found = json.loads(hedwig("compare", first, second, "--bootstrap", 10, "--json").stdout)
    assert list(found["methods"]) == [f"{first}/", f"{second}/"]
    assert hedwig("compare", first, first).exit_code == 2
    assert hedwig("compare", first).exit_code == 2
    (second / "predictions" / "manifest.json").unlink()
    done = hedwig("compare", first, second)
    assert done.exit_code == 2
    assert "has no finished predictions/" in done.stderr


def test_expected_error_of_a_rectangle_and_of_places(tmp_path: Path) -> None:
    found = json.loads(hedwig("expected-error", "--rectangle", "4500x2500", "--pairs", 200_000, "--json").stdout)
    assert abs(found["mean_km"] - 1863.7) < 4 * found["standard_error_km"]
    pd.DataFrame({"lat": [0.0, 0.0], "lon": [0.0, 90.0]}).to_csv(tmp_path / "points.csv", index=False)
    done = hedwig("expected-error", tmp_path / "points.csv", "--pairs", 10)
    assert "mean 10,007.6 km, standard error 0.00 km" in done.stdout
    pd.DataFrame({"lat": [0.0], "lon": [45.0]}).to_csv(tmp_path / "asked.csv", index=False)
    asked = hedwig("expected-error", tmp_path / "points.csv", "--queries", tmp_path / "asked.csv", "--json")
    assert json.loads(asked.stdout)["mean_km"] == pytest.approx(5003.8, abs=0.1)
    for wrong in ([], ["--rectangle", "4500"], [tmp_path / "points.csv", "--rectangle", "1x2"]):
        assert hedwig("expected-error", *wrong).exit_code == 2
