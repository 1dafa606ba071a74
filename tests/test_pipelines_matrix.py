"""A matrix shares what is the same, goes on after a kill, and prints the paper's tables."""

import csv
import json

import pytest
from test_config_matrix import write

from hedwig import storage
from hedwig.config import load_matrix, validate_experiment
from hedwig.pipelines.matrix import _scored
from hedwig.pipelines.run import Run


def run_at(tmp_path, name, siblings=()):
    settings = {"output": str(tmp_path / name), "data": {"panoramas": "listing.csv"}}
    return Run(validate_experiment(settings), siblings=siblings)


def test_an_artefact_of_the_same_settings_is_taken_over_and_another_is_not(tmp_path):
    made = []

    def build(run, text):
        def make():
            made.append(text)
            storage.write_bytes(storage.join(run.folder("geocells"), "sub", "x.txt"), text.encode())
            return storage.publish(
                run.folder("geocells"), kind="geocells", config={"a": text}, inputs={}, num_in=1, num_out=1
            )

        return make

    first = run_at(tmp_path, "one")
    first.make("geocells", "geocells", {"a": "same"}, {}, build(first, "same"))
    second = run_at(tmp_path, "two", siblings=[str(tmp_path / "one")])
    manifest = second.make("geocells", "geocells", {"a": "same"}, {}, build(second, "same"))
    assert made == ["same"]
    assert second.resumed == ["geocells"]
    assert storage.read_bytes(storage.join(second.folder("geocells"), "sub", "x.txt")) == b"same"
    assert storage.manifest_digest(second.folder("geocells")) == storage.manifest_digest(first.folder("geocells"))
    assert manifest == storage.read_manifest(first.folder("geocells"))
    # What is made anew in one run leaves the other's files alone.
    second.make("geocells", "geocells", {"a": "other"}, {}, build(second, "other"))
    assert made == ["same", "other"]
    assert storage.read_bytes(storage.join(first.folder("geocells"), "sub", "x.txt")) == b"same"


def test_a_record_is_read_with_the_expected_error_of_a_guess(tmp_path):
    evaluation = {"num_queries": 7, "expected_error": {"mean_km": 1863.0}}
    record = {"methods": {"hedwig": {}}, "encoder_note": "tiny", "synthetic": True, "evaluation": evaluation}
    storage.write_bytes(str(tmp_path / "report" / "report.json"), json.dumps(record).encode())
    scored = _scored(str(tmp_path), {"Model": "CLIP"})
    assert scored.expected == {"mean_km": 1863.0}
    assert scored.note == "SYNTHETIC world, 7 queries, encoder tiny"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_papers_tables_from_one_command(tmp_path, capsys):
    import subprocess
    import sys

    text = f"""
name: tiny
output: {tmp_path}/m
base:
  data: {{synthetic: {{num: 150, width: 256}}, max_rejected: 0.1, split: {{block_km: 300, test_fraction: 0.3}}}}
  encoder: {{name: viclip-tiny, long_captions: truncate}}  # else the presets' embeddings differ
  training: {{projection_dim: 32, epochs: 3}}
  evaluate: {{num_bootstrap: 20}}
axes:
  Model: {{CLIP: {{encoder: {{name: clip-tiny}}}}, ViCLIP: {{encoder: {{name: viclip-tiny}}}}}}
  Preset:
    paper-fixed: {{preset: paper-fixed, geocells: {{num_cells: 8}}}}
    hedwig: {{preset: hedwig, geocells: {{min_panoramas: 5, max_panoramas: 30}}}}
"""
    path = write(tmp_path, text)
    assert len(load_matrix(path).cells) == 4
    command = [sys.executable, "-c", "from hedwig.cli import main; main()", "experiment", str(path), "--json"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout)
    rows = result["tables"]["3"]["rows"]
    assert [row[:3] for row in rows[:2]] == [
        ["CLIP", "paper-fixed", "Base Model"],
        ["CLIP", "paper-fixed", "Fine Tuned Model"],
    ]
    assert len(rows) == 4 * 2 + 3  # two floors and the expected error of a guess
    assert "standard error" in result["text"]
    shared = [set(run["shared"]) for run in result["runs"]]
    assert shared[0] == set()
    assert all({"synth", "panoramas", "caption"} <= names for names in shared[1:])
    assert "embed" in shared[1]  # the same encoder and slicing under another preset
    assert "embed" not in shared[2]
    with open(tmp_path / "m" / "table-4.csv") as file:
        assert len(list(csv.reader(file))) == 12
    assert (tmp_path / "m" / "tables.html").read_text().startswith("<!doctype html>")
    again = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert all(run["made"] == [] for run in again["runs"])
    assert again["tables"] == result["tables"]
