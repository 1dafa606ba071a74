"""The routes, in memory: what is answered, and that bad input is never the server's fault."""

from __future__ import annotations

import asyncio
import io
import logging
import math
import threading
import time

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from test_serving_limits import png

from hedwig import __version__
from hedwig.panorama import decode_image
from hedwig.serving import ErrorAnswer, Limits, LocateAnswer, create_app

JPEG_TYPE = {"Content-Type": "image/jpeg"}


class FakePrediction:
    def __init__(self, **fields):
        self.fields = fields

    def to_dict(self):
        return self.fields


class FakeLocator:
    """Decodes for real, and answers with what it saw."""

    def __init__(self):
        self.seen = []

    def locate(self, image, top_k=5, heading=math.nan, captured_at=None):
        self.seen.append((image, top_k, heading))
        mean = decode_image(image).mean()
        return FakePrediction(
            pano_id="fake",
            lat=float(mean),
            lon=-1.5,
            cell_ids=list(range(top_k)),
            cell_probs=[1.0 / top_k] * top_k,
            neighbour_ids=["a"],
            neighbour_scores=[0.5],
            neighbour_lat=[1.0],
            neighbour_lon=[math.nan],
            radius_km=math.nan,
            confidence=0.5,
        )


def jpeg(seed=0, width=96, height=48):
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(stream, "JPEG")
    return stream.getvalue()


def client_of(locator=None, **options):
    return TestClient(create_app(locator or FakeLocator(), **options), base_url="http://127.0.0.1:8000")


def error_of(response, status, code):
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    ErrorAnswer.model_validate(response.json())
    assert "Traceback" not in response.text
    return response


def test_answer_is_the_locators_with_nan_as_null():
    locator = FakeLocator()
    client = client_of(locator, info={"model": "fake-1", "num_cells": 7})
    data = jpeg()
    response = client.post("/v1/locate?top_k=3&heading=-12.5", content=data, headers=JPEG_TYPE)
    assert response.status_code == 200
    answer = response.json()
    expected = FakeLocator().locate(data, top_k=3, heading=-12.5).to_dict()
    expected |= {"radius_km": None, "neighbour_lon": [None]}
    extra = {key: answer.pop(key) for key in ("timings_ms", "model", "version")}
    assert answer == expected
    assert locator.seen == [(data, 3, -12.5)]
    assert extra["model"] == "fake-1"
    assert extra["version"] == __version__
    timings = extra["timings_ms"]
    parts = timings["wait"] + timings["read"] + timings["locate"]
    assert parts == pytest.approx(timings["total"], abs=0.01)
    assert LocateAnswer.model_validate_json(response.text).lat == expected["lat"]


def test_heading_left_out_is_unknown_and_other_formats_work():
    locator = FakeLocator()
    client = client_of(locator)
    for kind in ("PNG", "WEBP"):
        stream = io.BytesIO()
        Image.new("RGB", (40, 20), (9, 9, 9)).save(stream, kind)
        headers = {"Content-Type": "application/octet-stream"}
        assert client.post("/v1/locate", content=stream.getvalue(), headers=headers).json()["lat"] == pytest.approx(9)
    assert [(k, math.isnan(h)) for _, k, h in locator.seen] == [(5, True), (5, True)]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "empty_body"),
        (b"Dear Sir or Madam", 415, "not_an_image"),
        (jpeg()[:100], 422, "bad_image"),  # within the header
        (jpeg()[:-40], 422, "bad_image"),  # within the pixels: only decoding tells
        (png(10, 5)[:12], 422, "bad_image"),
        (b"\xff\xd8\xff" + bytes(5000), 413, "body_too_large"),
    ],
)
def test_bad_bodies(body, status, code):
    client = client_of(limits=Limits(max_body_bytes=5000))
    error_of(client.post("/v1/locate", content=body, headers=JPEG_TYPE), status, code)
    assert client.post("/v1/locate", content=jpeg(), headers=JPEG_TYPE).status_code == 200


def test_pixel_bomb_never_reaches_the_locator():
    locator = FakeLocator()
    client = client_of(locator)
    bomb = png(10_000, 10_000)
    assert len(bomb) < 1_000_000
    error_of(client.post("/v1/locate", content=bomb, headers=JPEG_TYPE), 413, "too_many_pixels")
    assert locator.seen == []


def test_chunked_body_without_length_is_counted():
    client = client_of(limits=Limits(max_body_bytes=10_000))

    def chunks(count):
        for _ in range(count):
            yield bytes(1000)

    response = client.post("/v1/locate", content=chunks(11), headers=JPEG_TYPE)
    assert "content-length" not in response.request.headers
    error_of(response, 413, "body_too_large")
    error_of(client.post("/v1/locate", content=chunks(9), headers=JPEG_TYPE), 415, "not_an_image")
    data = jpeg()
    assert client.post("/v1/locate", content=iter([data[:99], data[99:]]), headers=JPEG_TYPE).status_code == 200


@pytest.mark.parametrize(
    "query", ["top_k=0", "top_k=51", "top_k=many", "heading=nan", "heading=inf", "heading=900", "pano_id=x"]
)
def test_bad_parameters_are_named(query):
    response = error_of(
        client_of().post(f"/v1/locate?{query}", content=jpeg(), headers=JPEG_TYPE), 400, "bad_parameter"
    )
    assert repr(query.split("=")[0]) in response.json()["error"]["message"]


def test_forms_and_undeclared_bodies_are_refused():
    client = client_of()
    error_of(client.post("/v1/locate", content=jpeg()), 415, "unsupported_type")
    error_of(client.post("/v1/locate", files={"file": jpeg()}), 415, "unsupported_type")
    error_of(client.post("/v1/locate", data={"a": "b"}), 415, "unsupported_type")


def test_unknown_routes_and_methods_answer_in_json():
    client = client_of()
    error_of(client.get("/v2/locate"), 404, "not_found")
    error_of(client.get("/v1/../../etc/passwd"), 404, "not_found")
    response = error_of(client.get("/v1/locate"), 405, "wrong_method")
    assert response.headers["allow"] == "POST"
    error_of(client.delete("/healthz"), 405, "wrong_method")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::2]:80", "localhost.:80"])
def test_other_host_names_are_refused(host):
    error_of(client_of().get("/healthz", headers={"Host": host}), 400, "bad_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"])
def test_loopback_names_are_accepted(host):
    assert client_of().get("/healthz", headers={"Host": host}).status_code == 200
    assert client_of(allowed_hosts=["*"]).get("/healthz", headers={"Host": "any.example"}).status_code == 200


def test_security_headers_are_on_every_answer():
    client = client_of()
    answers = [
        client.get("/"),
        client.get("/healthz"),
        client.get("/nowhere"),
        client.get("/healthz", headers={"Host": "evil.example"}),
        client.post("/v1/locate", content=jpeg(), headers=JPEG_TYPE),
    ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert "access-control-allow-origin" not in answer.headers


def test_a_fault_of_ours_is_a_500_without_details(caplog):
    path = "/srv/" + "secret"  # joined, because a traceback shows the line of source

    class Broken:
        def locate(self, image, top_k=5, heading=math.nan):
            raise RuntimeError(path)

    response = error_of(client_of(Broken()).post("/v1/locate", content=jpeg(), headers=JPEG_TYPE), 500, "internal")
    assert "secret" not in response.text
    assert "secret" not in caplog.text
    assert "RuntimeError while answering POST /v1/locate" in caplog.text


def test_only_sizes_are_logged(caplog):
    data = jpeg()
    with caplog.at_level(logging.DEBUG, logger="hedwig"):
        client_of().post("/v1/locate?heading=123.25", content=data, headers=JPEG_TYPE)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("hedwig")]
    assert len(lines) == 1
    assert f"{len(data)} bytes, 96x48 px" in lines[0]
    assert "123.25" not in lines[0]


def test_readiness_follows_the_loading():
    go = threading.Event()

    def load():
        go.wait(10)
        return FakeLocator()

    with TestClient(create_app(load), base_url="http://localhost") as client:
        assert client.get("/healthz").status_code == 200
        response = error_of(client.get("/readyz"), 503, "not_ready")
        assert int(response.headers["retry-after"]) > 0
        error_of(client.post("/v1/locate", content=jpeg(), headers=JPEG_TYPE), 503, "not_ready")
        go.set()
        deadline = time.monotonic() + 5
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert client.post("/v1/locate", content=jpeg(), headers=JPEG_TYPE).status_code == 200


def test_failed_loading_says_so_without_details():
    def load():
        raise FileNotFoundError("/srv/secret")

    with TestClient(create_app(load), base_url="http://localhost") as client:
        deadline = time.monotonic() + 5
        while "FileNotFoundError" not in client.get("/readyz").text:
            assert time.monotonic() < deadline
        assert "secret" not in client.get("/readyz").text


def test_info_page_and_openapi():
    client = client_of(info={"model": "fake-1", "weights": "none", "num_references": 3, "num_cells": 2})
    info = client.get("/v1/info").json()
    assert (info["model"], info["num_references"], info["num_cells"]) == ("fake-1", 3, 2)
    assert info["limits"]["max_body_bytes"] == 25 * 1024**2
    page = client.get("/").text
    assert "curl --data-binary" in page
    assert "http://127.0.0.1:8000/v1/locate" in page
    assert "<script" not in page
    schema = client.get("/openapi.json").json()
    route = schema["paths"]["/v1/locate"]["post"]
    assert set(route["requestBody"]["content"]) >= {"image/jpeg", "image/png", "image/webp"}
    assert {p["name"] for p in route["parameters"]} == {"top_k", "heading"}
    assert {"200", "400", "408", "413", "415", "422", "503"} <= set(route["responses"])
    LocateAnswer.model_validate(schema["components"]["schemas"]["LocateAnswer"]["example"])
    assert client.get("/docs").status_code == 404


def test_overload_answers_503_while_probes_still_answer():
    release = threading.Event()

    class Slow(FakeLocator):
        def locate(self, image, top_k=5, heading=math.nan):
            release.wait(10)
            return super().locate(image, top_k, heading)

    app = create_app(Slow(), limits=Limits(max_ongoing_requests=1, max_queued_requests=1))

    async def scenario():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            tasks = [
                asyncio.create_task(client.post("/v1/locate", content=jpeg(), headers=JPEG_TYPE)) for _ in range(5)
            ]
            while sum(task.done() for task in tasks) < 3:
                await asyncio.sleep(0.01)
            began = time.monotonic()
            assert (await client.get("/healthz")).status_code == 200
            assert time.monotonic() - began < 0.5
            release.set()
            return await asyncio.gather(*tasks)

    answers = asyncio.run(scenario())
    assert sorted(a.status_code for a in answers) == [200, 200, 503, 503, 503]
    assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 503)


def test_300_mutated_jpegs_are_never_the_servers_fault():
    rng = np.random.default_rng(7)
    client = client_of(limits=Limits(max_jpeg_pixels=2_000_000))
    original = jpeg(width=256, height=128)
    counts = {}
    for _ in range(300):
        data = bytearray(original)
        kind = rng.integers(4)
        if kind == 0:
            data = data[: rng.integers(1, len(data))]
        elif kind == 1:
            at = rng.integers(len(data))
            data[at:at] = rng.bytes(int(rng.integers(1, 200)))
        else:
            last = len(data) if kind == 2 else 700  # kind 3: the headers, where decoders break
            for at in rng.integers(0, last, rng.integers(1, 20)):
                data[at] = rng.integers(256)
        response = client.post("/v1/locate", content=bytes(data), headers=JPEG_TYPE)
        counts[response.status_code] = counts.get(response.status_code, 0) + 1
        if response.status_code != 200:
            ErrorAnswer.model_validate(response.json())
    assert set(counts) <= {200, 413, 415, 422}
    assert min(counts.get(200, 0), counts.get(422, 0)) >= 20
    assert client.post("/v1/locate", content=original, headers=JPEG_TYPE).status_code == 200
