"""A plan becomes a listing, exactly once per panorama, also across a SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from fake_imagery import KEY, TOKEN, FakeImagery

from hedwig.pipelines.acquire import Acquisition, acquire
from hedwig.pipelines.rows import TooManyRejected
from hedwig.sources import check_listing, read_listing

PLACES = {f"p{i:02d}": (10.0 + i * 0.01, 20.0) for i in range(24)}
PLAN = pd.DataFrame(
    {
        "plan_id": [f"plan-{i}" for i in range(25)],
        "lat": [10.0 + i * 0.01 for i in range(24)] + [10.00001],  # two points at p00, and the last wins nothing
        "lon": [20.0] * 25,
        "region": ["CA-12"] * 24 + [float("nan")],
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
    assert set(listing["fov_deg"]) == {90.0}
    assert (tmp_path / "panoramas.card.html").is_file()
    assert "© Google: 24" in (tmp_path / "ATTRIBUTION.md").read_text()
    checked = check_listing(read_listing(str(tmp_path / "panoramas.csv")), image_root=str(tmp_path), layout="bearings")
    assert checked.panoramas.num_rows == 24
    assert all(os.path.isfile(uri) for row in checked.panoramas["bearing_uri"].to_pylist() for uri in row)
    before = server.num_requests
    again = acquire(PLAN, wanted, str(tmp_path))
    assert again == manifest
    assert server.num_requests == before
    assert KEY not in (tmp_path / "manifest.json").read_text()


def test_what_a_spent_quota_left_is_told_and_the_rest_is_usable(server, ray_session, tmp_path):
    server.quota = 10
    wanted = Acquisition(
        source="streetview", options={"base_url": server.url + "/streetview", "headings": 2}, per_second=500,
        concurrency=2, usd_per_1000=7.0, max_rejected=0.0,
    )  # fmt: skip
    first = acquire(PLAN, wanted, str(tmp_path))
    assert first.num_out == 5
    assert first.details["num_left_by_quota"] == first.num_rejected == 19
    assert first.details["cost_usd"] == pytest.approx(10 * 7 / 1000)
    assert pd.read_csv(tmp_path / "panoramas.csv")["pano_id"].nunique() == 5
    server.quota = None
    second = acquire(PLAN, wanted, str(tmp_path))
    assert (second.num_out, second.num_rejected) == (24, 0)
    assert server.num_images == 48
    with pytest.raises(ValueError, match="its own --out"):
        acquire(PLAN, Acquisition(source="panoramax"), str(tmp_path))


@pytest.mark.slow
def test_points_that_could_not_be_looked_up_are_counted_and_tried_again(ray_session, tmp_path):
    server = FakeImagery(PLACES, faults=lambda number: "500" if broken else None)
    broken = True
    wanted = Acquisition(
        source="panoramax", options={"base_url": server.url + "/stac"}, per_second=500, max_attempts=1, max_rejected=0.5
    )
    try:
        with pytest.raises(TooManyRejected, match="25 of 25"):
            acquire(PLAN, wanted, str(tmp_path))
        broken = False
        done = acquire(PLAN, wanted, str(tmp_path))
    finally:
        server.close()
    assert (done.num_out, done.num_rejected) == (24, 0)


def test_terms_are_shown_first_and_billed_sources_need_consent(server, tmp_path):
    PLAN.to_csv(tmp_path / "plan.csv", index=False)
    command = [
        sys.executable, "-c", "from hedwig.cli import main; main()", "acquire", "streetview",
        str(tmp_path / "plan.csv"), "--out", str(tmp_path / "out"), "--base-url", server.url + "/streetview",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "Google Maps Platform" in done.stderr
    assert "200 images" in done.stderr  # 25 points of 8 bearings: said before anything is fetched
    assert server.num_requests == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["streetview", "mapillary", "panoramax"])
def test_a_killed_acquisition_goes_on_and_asks_nothing_twice(source, tmp_path):
    kinds = {3: "500", 11: "truncate", 17: "429", 23: "drop"}
    server = FakeImagery(PLACES, slow_s=0.1, faults=kinds.get)
    PLAN.to_csv(tmp_path / "plan.csv", index=False)
    out = tmp_path / "out"
    prefix = {"streetview": "/streetview", "mapillary": "/mapillary", "panoramax": "/stac"}[source]
    command = [
        sys.executable, "-c", "from hedwig.cli import main; main()", "acquire", source, str(tmp_path / "plan.csv"),
        "--out", str(out), "--accept-terms", "--base-url", server.url + prefix, "--concurrency", "4",
        "--per-second", "20", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "HEDWIG_STREETVIEW_KEY": KEY, "HEDWIG_MAPILLARY_TOKEN": TOKEN}
    num_images = 8 * 24 if source == "streetview" else 24
    try:
        for num_answers in (10, 20 + num_images // 4, 24 + num_images // 2):
            run = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
            )
            while sum(server.answered.values()) < num_answers and run.poll() is None:
                time.sleep(0.02)
            os.kill(run.pid, signal.SIGKILL)
            output = run.communicate()[0].decode()
            time.sleep(6)  # Ray's workers outlive a killed driver by about three seconds, and go on asking
            assert KEY not in output
            assert TOKEN not in output
        last = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    finally:
        server.close()
    result = json.loads(last.stdout)
    assert (result["num_out"], result["num_rejected"], result["num_images"]) == (24, 0, num_images)
    # Nothing that was answered and kept is asked for again; what was under way at a kill (at most 4) may be, and an
    # image that is looked up first takes two requests.
    twice = sum(count - 1 for what, count in server.answered.items() if what[0] == "/")
    assert twice <= 3 * 4 * 2
    if source == "streetview":
        assert result["num_paid_images"] == num_images
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert KEY.encode() not in file.read_bytes()
            assert TOKEN.encode() not in file.read_bytes()
