"""The real command line on a tiny synthetic world: killed, resumed, evaluated, asked, served and broken on purpose."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from hedwig import storage
from hedwig.vectors import read_vectors

NUM = 160
TINY = f"""
name: tiny
output: OUT
data:
  synthetic: {{num: {NUM}, width: 256, seed: 3}}
  split: {{method: spatial, block_km: 300, buffer_km: 1, val_fraction: 0.15, test_fraction: 0.25}}
encoder: {{name: viclip-tiny, train: {{epochs: 1, batch_size: 32, num_cells: 8}}}}
embed: {{rows_per_block: 32, batch_size: 16}}
geocells: {{min_panoramas: 4, max_panoramas: 12}}
training: {{projection_dim: 32, hidden_dim: 0, epochs: 3, tau_km: 500}}
evaluate: {{num_bootstrap: 50, baseline: {{name: clip-tiny}}}}
"""


def environment():
    keep = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    return {**keep, "OMP_NUM_THREADS": "1"}


def hedwig(*arguments, check=True, timeout=560):
    command = [sys.executable, "-c", "from hedwig.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)
    if check:
        assert done.returncode == 0, f"{arguments} exited {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose driver was SIGKILLed while rows were flowing, and that the same command then finished."""
    folder = tmp_path_factory.mktemp("e2e")
    experiment = folder / "tiny.yaml"
    experiment.write_text(TINY.replace("OUT", str(folder / "run")))
    command = [sys.executable, "-c", "from hedwig.cli import main; main()", "run", str(experiment)]
    driver = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    staging = folder / "run" / "captions" / ".staging"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and driver.poll() is None:
        if staging.is_dir() and any(staging.glob("*/*.parquet")):
            break
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (folder / "run" / "captions" / "manifest.json").exists()
    done = hedwig("run", experiment, "--json")
    return folder / "run", experiment, json.loads(done.stdout), done.stderr


def manifest(run, name):
    return json.loads((run / name / "manifest.json").read_text())


def test_every_row_of_every_table_is_accounted_for(finished):
    run, _, _, _ = finished
    ids = {f"synth-3-{i:06d}" for i in range(NUM)}
    for name in ("panoramas", "captions", "embeddings", "baseline"):
        record = manifest(run, name)
        assert (record["num_in"], record["num_out"], record["num_rejected"]) == (NUM, NUM, 0)
        found = storage.read_table(str(run / name), ["pano_id"])["pano_id"].to_pylist()
        assert len(found) == NUM
        assert set(found) == ids
    splits = storage.read_table(str(run / "panoramas"), ["split"])["split"].to_pylist()
    assert manifest(run, "predictions")["num_out"] == splits.count("test") + splits.count("val")


def test_the_second_run_said_that_it_resumed(finished):
    _, _, result, stderr = finished
    assert "synth" in result["resumed"]
    assert "panoramas" in result["resumed"]
    assert "resumed" in stderr


def test_a_third_run_has_nothing_to_do(finished):
    _, experiment, _, _ = finished
    done = hedwig("run", experiment, "--json")
    assert json.loads(done.stdout)["made"] == {}
    assert "nothing to do" in done.stderr


def test_the_report_has_every_floor_on_the_same_queries(finished):
    run, _, result, _ = finished
    record = json.loads((run / "report" / "report.json").read_text())
    methods = record["methods"]
    assert set(methods) >= {"hedwig", "clip_mean", "constant", "random", "perfect_cell"}
    assert len({m["num_queries"] for m in methods.values()}) == 1
    for method in methods.values():
        low, high = method["median_km_ci"]
        assert low <= method["median_km"] <= high
        assert method["geoscore_ci"][0] <= method["geoscore"] <= method["geoscore_ci"][1]
        assert 0 <= method["accuracy_at_km"]["25"] <= method["accuracy_at_km"]["2500"] <= 1
    assert methods["perfect_cell"]["median_km"] < methods["random"]["median_km"]
    assert record["synthetic"] is True
    assert "trained from scratch" in record["encoder_note"]
    assert result["methods"] == methods
    html = (run / "report" / "report.html").read_text()
    assert "synthetic" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert len(list((run / "report").glob("*.png"))) >= 4


def test_predictions_hold_no_truth_and_refer_to_training_rows(finished):
    run, _, _, _ = finished
    table = storage.read_table(str(run / "predictions"))
    truth = storage.read_table(str(run / "panoramas"), ["pano_id", "lat", "split"])
    known = dict(zip(truth["pano_id"].to_pylist(), truth["lat"].to_pylist(), strict=True))
    side = dict(zip(truth["pano_id"].to_pylist(), truth["split"].to_pylist(), strict=True))
    same = [known[i] == lat for i, lat in zip(table["pano_id"].to_pylist(), table["lat"].to_pylist(), strict=True)]
    assert np.mean(same) < 0.1
    assert {side[n] for row in table["neighbour_ids"].to_pylist() for n in row} == {"train"}
    probs = table["cell_probs"].to_pylist()
    assert all(row == sorted(row, reverse=True) and 0 < sum(row) <= 1.00001 for row in probs)


def test_embeddings_are_unit_vectors(finished):
    run, _, _, _ = finished
    table = storage.read_table(str(run / "embeddings"), ["image_embedding", "text_embedding"])
    for name in table.column_names:
        vectors = read_vectors(table, name)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.fixture(scope="module")
def image(finished):
    run, _, _, _ = finished
    rows = storage.read_table(str(run / "panoramas"), ["split", "image_uri"]).to_pylist()
    return Path(next(row["image_uri"] for row in rows if row["split"] == "test"))


def test_predict_and_the_served_model_agree_and_bad_input_is_a_4xx(finished, image, tmp_path):
    run, _, _, _ = finished
    predicted = json.loads(hedwig("predict", image, "--run", run, "--json").stdout)
    from tests_serving import free_port, wait_until_ready  # a file beside this one

    port = free_port()
    command = [sys.executable, "-c", "from hedwig.cli import main; main()", "serve", str(run), "--port", str(port)]
    server = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server, 150)
        served = post(f"{url}/v1/locate", image.read_bytes())[1]
        for name in ("lat", "lon", "cell_ids", "neighbour_ids", "radius_km"):
            assert served[name] == predicted[name], name
        assert np.allclose(served["cell_probs"], predicted["cell_probs"], rtol=0, atol=1e-9)
        assert post(f"{url}/v1/locate", b"this is a text file, not an image")[0] == 415
        assert post(f"{url}/v1/locate", b"")[0] == 400
        assert post(f"{url}/v1/locate", image.read_bytes()[:2000])[0] == 422
        assert post(f"{url}/v1/locate", image.read_bytes())[1]["lat"] == predicted["lat"]  # and it lives on
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            code = server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            raise
    assert code == 0


def post(url, data):
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "image/jpeg"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_errors_have_texts_and_exit_codes(finished, tmp_path):
    run, experiment, _, _ = finished
    for arguments, code, text in [
        (["run", "none.yaml"], 2, "No experiment file"),
        (["run", str(experiment), "trainin.epochs=3"], 2, "Did you mean 'training'"),
        (["run", str(experiment), "--from", "embd"], 1, "Did you mean 'embed'"),
        (["predict", "none.jpg", "--run", str(run)], 3, "no image file"),
        (["predict", "none.jpg", "--run", str(tmp_path)], 2, "is missing or unfinished"),
    ]:
        done = hedwig(*arguments, check=False)
        assert done.returncode == code, (arguments, done.stderr)
        assert text in done.stderr
        assert "Traceback" not in done.stderr
