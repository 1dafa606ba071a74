"""The application on a real Ray Serve, on loopback, with a locator that needs no model."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import math
import socket
import statistics
import time
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from PIL import Image
from test_serving_limits import png
from test_serving_releases import digest_of, version_folder
from test_serving_releases import publish as publish_version

from hedwig.panorama import decode_image
from hedwig.publishing import rollback
from hedwig.serving import Client, LocateAnswer, build, start, stop
from hedwig.serving.replica import describe_run
from hedwig.storage import publish


def fake_loader():
    """A loader whose locator names the process it is in, and the run."""

    def load(run):
        import os

        from tests_serving import FakeLocator

        locator = FakeLocator(f"pid-{os.getpid()}")
        locator.names = (run,)
        return locator

    return load


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def jpeg(width=512, height=256):
    pixels = np.random.default_rng(0).integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for number, name in enumerate((".", "versions/0002"), start=1):
        version_folder(folder, name, number)
    return folder


@pytest.fixture(scope="module")
def url(ray_session, run):
    address = start(
        str(run),
        port=free_port(),
        load=fake_loader(),
        max_body_bytes=2 * 1024**2,
        body_timeout_s=2.0,
        ready_timeout_s=120.0,
        look_every_s=0.1,
    )
    yield address
    stop()


def send(url, method, path, body=None, **headers):
    """One request on its own connection; the status, the headers and the JSON body."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=30)
    try:
        connection.request(method, path, body, {"Content-Type": "image/jpeg", **headers})
        response = connection.getresponse()
        return response.status, response.headers, json.loads(response.read())
    finally:
        connection.close()


def test_bad_requests_are_refused_and_the_replica_survives_them_all(url, run):
    data = jpeg()
    client = Client(url)
    first = client.locate(data, top_k=2)
    assert first.lat == pytest.approx(decode_image(data).mean() / 3, rel=1e-5)
    assert (first.cell_ids, first.radius_km) == ([0, 1], None)
    assert client.neighbours([[1.0, 0.0, 0.0, 0.0]]).neighbour_ids == [[str(run)]]
    assert not math.isnan(first.timings_ms["total"])

    def chunks(count):
        for _ in range(count):
            yield bytes(2**18)

    bad = [
        (("POST", "/v1/locate", b"Dear Sir or Madam"), 415, "not_an_image"),
        (("POST", "/v1/locate", b""), 400, "empty_body"),
        (("POST", "/v1/locate", data[:-100]), 422, "bad_image"),
        (("POST", "/v1/locate", png(10_000, 10_000)), 413, "too_many_pixels"),
        (("POST", "/v1/locate", bytes(2 * 1024**2 + 1)), 413, "body_too_large"),
        (("POST", "/v1/locate", chunks(9)), 413, "body_too_large"),
        (("POST", "/v1/locate?top_k=99", data), 400, "bad_parameter"),
        (("GET", "/v1/locate"), 405, "wrong_method"),
        (("GET", "/nowhere"), 404, "not_found"),
    ]
    for request, status, code in bad:
        seen, headers, body = send(url, *request)
        assert (seen, body["error"]["code"]) == (status, code), request[:2]
        assert headers["x-content-type-options"] == "nosniff"
    status, _, body = send(url, "GET", "/healthz", Host="evil.example")
    assert (status, body["error"]["code"]) == (400, "bad_host")

    assert send(url, "POST", "/v1/locate", iter([data[:50], data[50:]]))[0] == 200
    last = client.locate(data, top_k=2)
    assert last.pano_id == first.pano_id  # which names the replica's process
    client.close()
    assert send(url, "GET", "/readyz")[0] == 200
    assert send(url, "GET", "/v1/info")[2]["limits"]["max_body_bytes"] == 2 * 1024**2


def test_what_is_published_is_served_without_a_failed_request(url, run):
    digests = {str(folder): digest_of(folder) for folder in (run, run / "versions/0002")}
    seen = []
    with Client(url, num_retries=0) as client:

        def ask_until(folder):
            deadline = time.monotonic() + 60
            while not seen or seen[-1][0] != str(folder):
                answer = client.neighbours(np.zeros((1, 4)))
                seen.append((answer.neighbour_ids[0][0], answer.run_digest))
                assert time.monotonic() < deadline

        ask_until(run)
        publish_version(run, "versions/0002")
        ask_until(run / "versions/0002")
        assert client.info().publication["state"] == "current"
        assert client.info().num_references == 2
        assert client.info().layout == {"encoder": "together", "shards": 1}
        publish_version(run, ".")
        rollback(str(run))
        publish_version(run, ".")
        ask_until(run)
    assert all(digests[folder] == digest for folder, digest in seen)


def test_slow_body_is_ended(url):
    host, port = urllib.parse.urlsplit(url).netloc.split(":")
    began = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        raw.sendall(
            b"POST /v1/locate HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
            b"Content-Length: 1000\r\n\r\n\xff\xd8\xff"
        )
        answer = raw.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert 1.5 < time.monotonic() - began < 10


def test_service_listens_on_loopback_only(url):
    port = int(url.rsplit(":", 1)[1])
    with open("/proc/net/tcp") as table:
        listening = {line.split()[1] for line in table if line.split()[3] == "0A"}
    assert [a for a in listening if int(a.split(":")[1], 16) == port] == [f"0100007F:{port:04X}"]


def test_a_second_service_is_refused(url):
    with pytest.raises(RuntimeError, match=r"stop\(\) first"):
        start("other", port=free_port(), load=fake_loader())


def test_replicas_that_can_never_be_placed_are_refused(url):
    with pytest.raises(RuntimeError, match="3 replicas need 300 CPUs"):
        start("other", port=free_port(), load=fake_loader(), num_replicas=3, num_cpus=100)


def test_latency_is_that_of_a_proxy_not_of_a_mistake(url):
    data = jpeg()
    timings = []
    for _ in range(20):
        began = time.perf_counter()
        with Client(url) as client:
            assert isinstance(client.locate(data), LocateAnswer)
        timings.append(time.perf_counter() - began)
    assert statistics.median(timings) < 1.0


def test_serve_writes_no_line_for_a_request(url):
    assert send(url, "POST", "/v1/locate", jpeg())[0] == 200
    node = ray._private.worker.global_worker.node
    logs = list(Path(node.get_logs_dir_path(), "serve").glob("replica_hedwig_locate_*.log"))
    assert logs
    assert not [line for log in logs for line in log.read_text().splitlines() if "/v1/" in line]


def test_other_machines_are_not_served_without_being_asked_twice(monkeypatch):
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ValueError, match="insecure=True"):
            start("run", host=host)
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ValueError, match="every interface"):
        start("run")


def test_options_are_checked_before_ray_starts():
    with pytest.raises(ValueError, match="max_ongoing_requests is 0"):
        build("run", max_ongoing_requests=0)


def test_a_run_is_described_by_its_manifests_and_its_encoder(tmp_path):
    assert describe_run(str(tmp_path)) == {}
    for name, details in (("index", {}), ("geocells", {"num_cells": 7})):
        (tmp_path / name).mkdir()
        publish(
            str(tmp_path / name), kind=name, config={}, inputs={}, num_in=40, num_out=40, details=details, seconds=0.0
        )
    encoder = SimpleNamespace(model_id="tiny@0123", weights_note="random", image_dim=32)
    found = describe_run(str(tmp_path), SimpleNamespace(embedder=SimpleNamespace(encoder=encoder)))
    assert set(found.pop("versions")) == {"numpy", "ray", "torch"}
    digests = {
        name: hashlib.sha256((tmp_path / name / "manifest.json").read_bytes()).hexdigest()
        for name in ("index", "geocells")
    }
    assert found == {
        "num_references": 40,
        "num_cells": 7,
        "dim": 32,
        "digests": digests,
        "run_digest": digests["index"],
        "model": "tiny@0123",
        "weights": "random",
    }
