"""A plan becomes a listing, exactly once per panorama, also across a SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from fake_imagery import KEY, FakeImagery

from hedwig.pipelines.acquire import Acquisition, acquire
from hedwig.sources import check_listing, read_listing

PLACES = {f"p{i:02d}": (10.0 + i * 0.01, 20.0) for i in range(24)}
PLAN = pd.DataFrame(
    {
        "plan_id": [f"plan-{i}" for i in range(25)],
        "lat": [10.0 + i * 0.01 for i in range(24)] + [10.00001],  # two points at p00, and the last wins nothing
        "lon": [20.0] * 25,
        "region": ["CA-12"] * 25,
    }
)


@pytest.fixture
def server():
    fake = FakeImagery(PLACES)
    yield fake
    fake.close()


def test_a_plan_becomes_a_listing_with_record_and_credit(server, ray_session, tmp_path, monkeypatch):
    monkeypatch.setenv("HEDWIG_STREETVIEW_KEY", KEY)
    wanted = Acquisition(
        source="streetview", options={"base_url": server.url + "/streetview", "headings": 4}, per_second=500,
        usd_per_1000=7.0,
    )  # fmt: skip
    seen = []
    manifest = acquire(PLAN, wanted, str(tmp_path), lambda *what: seen.append(what))
    assert (manifest.num_in, manifest.num_out, manifest.num_rejected) == (24, 24, 0)
    assert manifest.details["num_points_without_panorama"] == 1
    assert manifest.details["num_paid_images"] == server.num_images == 96
    assert manifest.details["cost_usd"] == pytest.approx(96 * 7 / 1000)
    listing = pd.read_csv(tmp_path / "panoramas.csv")
    assert len(listing) == 96
    assert sorted(listing["heading"].unique()) == [0, 90, 180, 270]
    assert set(listing["region"]) == {"CA-12"}
    assert "© Google: 24" in (tmp_path / "ATTRIBUTION.md").read_text()
    checked = check_listing(read_listing(str(tmp_path / "panoramas.csv")), image_root=str(tmp_path), layout="bearings")
    assert checked.panoramas.num_rows == 24
    assert all(os.path.isfile(uri) for row in checked.panoramas["bearing_uri"].to_pylist() for uri in row)
    before = server.num_requests
    again = acquire(PLAN, wanted, str(tmp_path))
    assert again == manifest
    assert server.num_requests == before
    assert KEY not in (tmp_path / "manifest.json").read_text()


@pytest.mark.slow
def test_a_killed_acquisition_goes_on_and_asks_nothing_twice(tmp_path):
    kinds = {3: "500", 11: "truncate", 17: "429", 23: "drop"}
    server = FakeImagery(PLACES, slow_s=0.1, faults=kinds.get)
    PLAN.to_csv(tmp_path / "plan.csv", index=False)
    out = tmp_path / "out"
    command = [
        sys.executable, "-c", "from hedwig.cli import main; main()", "acquire", "streetview",
        str(tmp_path / "plan.csv"), "--out", str(out),
        "--accept-terms", "--base-url", server.url + "/streetview", "--concurrency", "4", "--per-second", "40",
        "--json",
    ]  # fmt: skip
    environment = {**os.environ, "HEDWIG_STREETVIEW_KEY": KEY}
    try:
        for num_images in (20, 70, 130):
            run = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
            )
            while server.num_images < num_images and run.poll() is None:
                time.sleep(0.02)
            os.kill(run.pid, signal.SIGKILL)
            output = run.communicate()[0].decode()
            assert KEY not in output
        last = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    finally:
        server.close()
    result = json.loads(last.stdout)
    assert (result["num_out"], result["num_rejected"]) == (24, 0)
    # Nothing that was answered and kept is asked for again; what was under way at a kill (at most 4) may be.
    images = {what: count for what, count in server.answered.items() if "/metadata" not in what and what[0] == "/"}
    assert len(images) == 24 * 8
    assert sum(count - 1 for count in images.values()) <= 3 * 4
    metadata = [count for what, count in server.answered.items() if "/metadata" in what]
    assert sum(metadata) - len(metadata) <= 4
    assert result["num_paid_images"] == 24 * 8
