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
from tests_serving import FakeLocator

from hedwig import __version__
from hedwig.panorama import decode_image
from hedwig.serving import ErrorAnswer, Limits, LocateAnswer, create_app

JPEG_TYPE = {"Content-Type": "image/jpeg"}


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
    client = client_of(locator, info={"model": "fake-1", "num_cells": 7, "run_digest": "d"})
    data = jpeg()
    response = client.post("/v1/locate?top_k=3&heading=-12.5", content=data, headers=JPEG_TYPE)
    assert response.status_code == 200
    answer = response.json()
    queries = [FakeLocator().query(decode_image(data))]
    expected = FakeLocator().answer(queries, FakeLocator().embed(queries), top_k=3, regions=True)[0]
    expected = {**expected, "radius_km": None, "neighbour_lon": [None]}
    extra = {key: answer.pop(key) for key in ("timings_ms", "model", "version", "run_digest")}
    assert answer == expected
    assert locator.queries == [((48, 96, 3), -12.5, None)]
    assert (extra["model"], extra["run_digest"], extra["version"]) == ("fake-1", "d", __version__)
    timings = extra["timings_ms"]
    assert set(timings) == {"wait", "read", "decode", "encode", "search", "total"}
    assert 0 < sum(timings.values()) - timings["total"] <= timings["total"]
    assert LocateAnswer.model_validate_json(response.text).lat == expected["lat"]


def test_heading_left_out_is_unknown_and_other_formats_work():
    locator = FakeLocator()
    client = client_of(locator)
    for kind in ("PNG", "WEBP"):
        stream = io.BytesIO()
        Image.new("RGB", (40, 20), (9, 9, 9)).save(stream, kind)
        headers = {"Content-Type": "application/octet-stream"}
        assert client.post("/v1/locate", content=stream.getvalue(), headers=headers).json()["lat"] == pytest.approx(3)
    assert [(shape, math.isnan(h)) for shape, h, _ in locator.queries] == [((20, 40, 3), True)] * 2


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
    assert locator.queries == []


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

    class Broken(FakeLocator):
        def embed(self, queries):
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
    assert f"{len(data)} bytes, 1 images" in lines[0]
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


def test_info_and_openapi():
    client = client_of(info={"model": "fake-1", "weights": "none", "num_references": 3, "num_cells": 2})
    info = client.get("/v1/info").json()
    assert (info["model"], info["num_references"], info["num_cells"]) == ("fake-1", 3, 2)
    assert info["limits"]["max_body_bytes"] == 25 * 1024**2
    schema = client.get("/openapi.json").json()
    route = schema["paths"]["/v1/locate"]["post"]
    assert set(route["requestBody"]["content"]) >= {"image/jpeg", "image/png", "image/webp"}
    assert {p["name"] for p in route["parameters"]} == {
        "top_k",
        "heading",
        "explain",
        "posterior",
        "precision_km",
        "format",
    }
    assert {"200", "400", "408", "413", "415", "422", "503"} <= set(route["responses"])
    LocateAnswer.model_validate(schema["components"]["schemas"]["LocateAnswer"]["example"])
    assert client.get("/docs").status_code == 404


def test_overload_answers_503_while_probes_still_answer():
    release = threading.Event()

    class Slow(FakeLocator):
        def embed(self, queries):
            release.wait(10)
            return super().embed(queries)

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
