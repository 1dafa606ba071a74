import json

import pytest
from typer.testing import CliRunner

from hedwig.cli import app
from hedwig.cli.plan_run import duration
from hedwig.models.spec import encoder_spec

EXPERIMENT = """
output: {output}
data: {{synthetic: {{num: 500, width: 256}}}}
encoder: {{name: viclip-tiny}}
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(EXPERIMENT.format(output=tmp_path / "run"))
    return str(path)


def invoke(*arguments):
    done = CliRunner().invoke(app, ["plan-run", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_time_and_cost_follow_from_the_stated_rate(experiment, tmp_path):
    text = invoke(
        experiment, "--gpus", "64", "--rows", "1000000", "--clips-per-s", "100", "--overlapped",
        "--price-per-hour", "3", "--json",
    )  # fmt: skip
    told = json.loads(text)
    assert told["rows_per_s"] == 6400
    assert told["bottleneck"] == "accelerator"
    assert told["seconds"] == pytest.approx(180 + 90 + 1_000_000 / 6400)
    assert told["cost"] == pytest.approx(told["gpu_hours"] * 3)
    assert told["storage_rows_per_s"] is None
    spec = encoder_spec("viclip-tiny")
    assert told["bytes_written"] == 1_000_000 * (4 * (spec.image_dim + spec.text_dim) + 300)
    assert "stated: --clips-per-s" in told["assumptions"]["clips/s"]
    assert not (tmp_path / "run").exists()


def test_a_narrow_store_is_named_and_simulated(experiment):
    text = invoke(
        experiment, "--gpu", "h200", "--storage-gb-s", "0.001", "--spot", "--simulate", "--sizes", "8,64",
        "--rows", "100000", "--json",
    )  # fmt: skip
    told = json.loads(text)
    assert told["bottleneck"] == "storage"
    assert [one["gpus"] for one in told["simulation"]] == [8, 64]
    assert told["simulation"][1]["storage_bound"] > 0.5
    assert "not measured" in told["assumptions"]["clips/s"]
    assert "Poisson, 0.05" in told["assumptions"]["preemptions"]


def test_the_table_for_people(experiment):
    text = invoke(experiment, "--clips-per-s", "100", "--simulate", "--sizes", "8")
    assert "500 panoramas on 8 accelerators" in text
    assert "Assumptions:" in text
    assert text.splitlines()[-2].split()[:2] == ["GPUs", "time"]


def test_durations_are_said_as_people_do():
    assert [duration(s) for s in (95, 2520, 27_000, 1_062_720)] == ["95 s", "42.0 min", "7.5 h", "12.3 d"]
