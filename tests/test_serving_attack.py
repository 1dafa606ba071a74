"""What strangers send: without a key, with mutated images, with requests that are no HTTP; nothing breaks or leaks.

Numbers in the normal suite are small; the marked tests do the full ones, from the same seeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import logging
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from tests_serving import FakeLocator, free_port

from hedwig.panorama import decode_image
from hedwig.serving import Limits, LocateAnswer, create_app
from hedwig.serving.access import ROUTE_SCOPES, check_routes, route_paths
from hedwig.serving.audit import AuditLog, verify
from hedwig.serving.decoding import DecodePool
from hedwig.serving.keys import SCOPES, KeyRing, new_key
from hedwig.serving.rates import LeasedRates, Rate

CANARY = "canary-7f3a"
JPEG_TYPE = {"Content-Type": "image/jpeg"}
JSON_TYPE = {"Content-Type": "application/json"}


def encoded(kind="JPEG", width=256, height=128, seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 200, (height // 8, width // 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(stream, kind, **options)
    return stream.getvalue()


def say(capsys, text):
    """A figure for whoever runs the marked tests."""
    with capsys.disabled():
        sys.stderr.write(f"\n{text}\n")


# ---- keys -----------------------------------------------------------------------------------------------------------

OPEN = {"none": 200, "wrong": 200, "expired": 200, "read-only": 200, "good": 200}
READ = {"none": 401, "wrong": 401, "expired": 401, "read-only": 200, "good": 200}
MORE = {"none": 401, "wrong": 401, "expired": 401, "read-only": 403, "good": 200}
# Every route: (method, what to send, headers, the status for each key).
TABLE = {
    "/": ("GET", None, {}, OPEN),
    "/healthz": ("GET", None, {}, OPEN),
    "/readyz": ("GET", None, {}, OPEN),
    "/openapi.json": ("GET", None, {}, READ),
    "/v1/info": ("GET", None, {}, READ),
    "/v1/cells": ("GET", None, {}, {**READ, "read-only": 404, "good": 404}),  # the fake has no map
    "/v1/locate": ("POST", encoded(), JPEG_TYPE, MORE),
    "/v1/locate:batch": ("POST", b'{"items": []}', JSON_TYPE, {**MORE, "good": 400}),
    "/v1/embed": ("POST", encoded(), JPEG_TYPE, MORE),
    "/v1/neighbours": ("POST", b'{"embedding": [1, 0, 0, 0]}', JSON_TYPE, MORE),
    "/metrics": ("GET", None, {}, MORE),
}


@pytest.fixture(scope="module")
def keys():
    made = {
        "read-only": new_key("reader", ["read"]),
        "good": new_key("good", SCOPES),
        "expired": new_key("expired", SCOPES, days=1e-9),
        "locate": new_key("locator", ["locate"]),
    }
    return KeyRing([key for _, key in made.values()]), {
        **{name: text for name, (text, _) in made.items()},
        "wrong": new_key("stranger")[0],
        "none": None,
    }


def with_key(text, headers=()):
    return {**dict(headers), **({} if text is None else {"Authorization": f"Bearer {text}"})}


def client_of(app):
    return TestClient(app, base_url="http://127.0.0.1:8000")


def test_every_route_answers_every_kind_of_key_as_the_table_says(keys):
    ring, texts = keys
    app = create_app(FakeLocator(), keys=ring)
    assert set(route_paths(app)) - {"/page"} == set(TABLE), "a route without a row here: decide who may use it"
    described = create_app(FakeLocator()).openapi()["paths"]
    assert {path: sorted(what) for path, what in described.items()} == {
        path: [method.lower()] for path, (method, *_) in TABLE.items() if path in described
    }
    client = client_of(app)
    for path, (method, body, headers, expected) in TABLE.items():
        for name, status in expected.items():
            answer = client.request(method, path, content=body, headers=with_key(texts[name], headers))
            assert answer.status_code == status, (path, name, answer.text[:200])
            if status == 401:
                assert answer.headers["www-authenticate"].startswith("Bearer")
            if status in (401, 403):
                code = {"none": "no_key", "wrong": "bad_key", "expired": "expired_key", "read-only": "missing_scope"}
                assert answer.json()["error"]["code"] == code[name]
                assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_route_that_nobody_decided_about_is_an_error():
    app = create_app(FakeLocator())
    assert set(route_paths(app)) <= set(ROUTE_SCOPES)
    app.add_api_route("/v1/everything", lambda: None)
    assert client_of(app).get("/v1/everything").status_code == 404  # and it is not there either
    with pytest.raises(RuntimeError, match="/v1/everything"):
        check_routes(app)


def test_scopes_methods_and_unknown_paths(keys):
    ring, texts = keys
    client = client_of(create_app(FakeLocator(), keys=ring))
    for path in ("/nowhere", "/v1/locat", "/v1/locate/", "/docs", "/v1/../etc/passwd", "/v1/info%0a", "/metrics%0A"):
        assert client.get(path).status_code == 401, path
        assert client.get(path, headers=with_key(texts["read-only"])).status_code == 404, path
    assert client.get("/v1/locate").status_code == 401
    assert client.get("/v1/locate", headers=with_key(texts["locate"])).status_code == 405
    assert client.post("/healthz").status_code == 405
    assert client.options("/v1/locate").status_code == 401
    assert client.head("/v1/info").status_code == 401


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic {0}", "bearer{0}", "Bearer {0} {0}", "Bearer {0}\x00", "{0}", "Bearer é"]
)
def test_malformed_authorization_is_401(keys, header):
    ring, texts = keys
    client = client_of(create_app(FakeLocator(), keys=ring))
    value = header.format(texts["good"]).encode("latin-1")
    assert client.get("/v1/info", headers={"Authorization": value}).status_code == 401
    assert client.get("/v1/info", headers={"Authorization": f"bEaReR  {texts['good']} "}).status_code == 200
    twice = [("Authorization", f"Bearer {texts['good']}")] * 2
    assert client.get("/v1/info", headers=twice).status_code == 401


def test_training_panoramas_need_their_scope(keys):
    ring, texts = keys
    client = client_of(create_app(FakeLocator(), keys=ring))
    for name, listed in (("locate", []), ("good", ["a"])):
        headers = with_key(texts[name], JPEG_TYPE)
        for query in ("", "?format=geojson", "?format=csv"):
            answer = client.post(f"/v1/locate{query}", content=encoded(), headers=headers)
            assert answer.status_code == 200
            if not query:
                assert answer.json()["neighbour_ids"] == listed
            elif not listed:
                assert "neighbour" not in answer.text
            else:
                assert "neighbour" in answer.text


# ---- rates, CORS, headers, precision, audit ------------------------------------------------------------------------


def test_rates_are_per_key_and_refused_before_the_body_is_read(keys):
    ring, texts = keys
    rates = LeasedRates(Rate(0.001, 2))
    client = client_of(create_app(FakeLocator(), keys=ring, rates=rates))
    good, reader = with_key(texts["good"]), with_key(texts["read-only"])
    assert [client.get("/v1/info", headers=good).status_code for _ in range(3)] == [200, 200, 429]
    assert client.get("/v1/info", headers=reader).status_code == 200
    refused = client.post("/v1/locate", content=encoded(), headers={**good, **JPEG_TYPE})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
    assert int(refused.headers["retry-after"]) > 900
    assert client.get("/healthz", headers=good).status_code == 200
    # Guessing is counted by address, and then not even told that it was wrong.
    assert [client.get("/v1/info", headers=with_key(str(i))).status_code for i in range(3)] == [401, 401, 429]


def test_a_batch_counts_as_its_items(keys):
    rates = LeasedRates(Rate(0.001, 5))
    client = client_of(create_app(FakeLocator(), rates=rates))
    vectors = np.zeros((8, 4), dtype="<f4")
    headers = {"Content-Type": "application/octet-stream"}
    assert client.post("/v1/neighbours", content=vectors.tobytes(), headers=headers).status_code == 200
    assert client.get("/v1/info").status_code == 429


def test_cors_is_off_unless_configured_and_never_a_wildcard():
    preflight = {"Origin": "https://maps.example.org", "Access-Control-Request-Method": "POST"}
    plain = client_of(create_app(FakeLocator()))
    assert "access-control-allow-origin" not in plain.options("/v1/locate", headers=preflight).headers
    client = client_of(create_app(FakeLocator(), cors_origins=["https://maps.example.org"]))
    assert client.options("/v1/locate", headers=preflight).headers["access-control-allow-origin"] == preflight["Origin"]
    other = {**preflight, "Origin": "https://evil.example"}
    assert "access-control-allow-origin" not in client.options("/v1/locate", headers=other).headers
    answer = client.get("/v1/info", headers={"Origin": preflight["Origin"]})
    assert answer.headers["access-control-allow-origin"] == preflight["Origin"]
    assert "access-control-allow-credentials" not in answer.headers
    for bad in ("*", "https://*", "null", "https://a.example/", "maps.example.org", "file:///"):
        with pytest.raises(ValueError, match="origin"):
            create_app(FakeLocator(), cors_origins=[bad])


def test_policies_have_nothing_unsafe_and_fit_the_path():
    client = client_of(create_app(FakeLocator()))
    for path in ("/", "/page/x.js", "/v1/info", "/nowhere", "/healthz"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "unsafe" not in policy
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert ("script-src 'self'" in policy) == (path in ("/", "/page/x.js"))
        assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
        assert "geolocation=()" in headers["permissions-policy"]


def test_urls_are_never_fetched():
    client = client_of(create_app(FakeLocator()))
    for url in ("http://169.254.169.254/", "file:///etc/passwd", "s3://bucket/a.jpg", "http://[64:ff9b::7f00:1]/"):
        assert client.post("/v1/locate", content=url.encode(), headers=JPEG_TYPE).status_code == 415
        for body in ({"image": url}, {"url": url}, {"image_uri": url}, {"photographs": [url]}):
            answer = client.post("/v1/locate", content=json.dumps(body).encode(), headers=JSON_TYPE)
            assert answer.status_code in (400, 415), (body, answer.text)


def test_the_floor_holds_on_every_route_and_a_client_can_only_make_it_coarser():
    client = client_of(create_app(FakeLocator(), min_precision_km=50.0))
    answers = {}
    for seed in range(6):  # other pixels, other fine answers, the same square and posterior
        data = encoded(seed=seed, width=64, height=32)
        for query in ("", "?precision_km=1", "?explain=true&posterior=true", "?format=geojson", "?format=csv"):
            answer = client.post(f"/v1/locate{query}", content=data, headers=JPEG_TYPE)
            assert answer.status_code == 200
            assert "neighbour" not in answer.text or answer.json()["neighbour_ids"] == []
            told = answer.json() if "csv" not in query else answer.text
            if isinstance(told, dict):
                told.pop("timings_ms", None)
            square = json.dumps([told["lat"], told["lon"]]) if isinstance(told, dict) and "lat" in told else None
            answers.setdefault((query, square), set()).add(json.dumps(told))
    squares = {square for _, square in answers if square}
    assert len(squares) < 6
    for (query, square), told in answers.items():
        assert len(told) == (1 if square else len(squares)), query
    assert {t for (q, _), told in answers.items() if q == "?precision_km=1" for t in told} == {
        t for (q, _), told in answers.items() if q == "" for t in told
    }
    coarser = client.post("/v1/locate?precision_km=500", content=encoded(), headers=JPEG_TYPE).json()
    assert (coarser["precision_km"], coarser["radius_km"] >= 500) == (500.0, True)
    assert LocateAnswer.model_validate(coarser).cell_ids == []
    for path, body, headers in (("/v1/embed", encoded(), JPEG_TYPE), ("/v1/neighbours", encoded(), JPEG_TYPE)):
        assert client.post(path, content=body, headers=headers).json()["error"]["code"] == "withheld"
    assert client.get("/v1/info").json()["min_precision_km"] == 50.0


def test_the_audit_names_what_was_asked_and_never_holds_it(keys, tmp_path):
    ring, texts = keys
    log = AuditLog(tmp_path, "r")
    data = encoded()
    with client_of(create_app(FakeLocator(), keys=ring, audit=log)) as client:
        good = client.post("/v1/locate", content=data, headers=with_key(texts["good"], JPEG_TYPE))
        client.post("/v1/locate", content=data[:-40], headers=with_key(texts["good"], JPEG_TYPE))
        client.post("/v1/locate", content=data, headers=with_key(texts["wrong"], JPEG_TYPE))
        client.get("/healthz")
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    answers = [line for line in lines if line["event"] == "answer"]
    ids = {key.id for key in ring._keys}
    assert [line["status"] for line in answers] == [200, 422, 401]
    assert answers[0]["key_id"] == answers[1]["key_id"] != answers[2]["key_id"] is None
    assert answers[0]["key_id"] in ids
    assert answers[0]["request_id"] == good.headers["x-request-id"]
    assert answers[0]["image_sha256"] == hashlib.sha256(data).hexdigest()
    assert answers[0]["cell_id"] == 0
    assert verify([log.path]).closed
    text = log.path.read_text()
    assert not any(secret in text for secret in texts.values() if secret)


# ---- images ---------------------------------------------------------------------------------------------------------


def mutated(num, seed=7):
    """Broken images, `num` of them, the same for the same seed: cut, with bytes put in, changed, and in the header."""
    rng = np.random.default_rng(seed)
    turned = Image.Exif()
    turned[0x0112] = 6
    originals = [
        encoded("JPEG"),
        encoded("JPEG", progressive=True),
        encoded("JPEG", exif=turned.tobytes()),
        encoded("PNG", 96, 48),
        encoded("WEBP"),
        encoded("WEBP", lossless=True, width=96, height=48),
    ]
    for i in range(num):
        data = bytearray(originals[i % len(originals)])
        kind = rng.integers(5)
        if kind == 0:
            data = data[: rng.integers(1, len(data))]
        elif kind == 1:
            at = rng.integers(len(data))
            data[at:at] = rng.bytes(int(rng.integers(1, 200)))
        elif kind == 2:
            at, length = rng.integers(len(data)), int(rng.integers(1, 100))
            del data[at : at + length]
        else:
            last = len(data) if kind == 3 else min(700, len(data))  # the headers, where decoders break
            for at in rng.integers(0, last, rng.integers(1, 20)):
                data[at] = rng.integers(256)
        yield bytes(data)


def decode_all(num):
    """How many were decoded and refused, how many ended their worker, and the slowest in seconds."""
    pool = DecodePool(1)
    counts, slowest = {"decoded": 0, "refused": 0}, 0.0
    try:
        pool(encoded())  # started
        for data in mutated(num):
            began = time.perf_counter()
            try:
                pixels = pool(data)
                assert pixels.ndim == 3
                counts["decoded"] += 1
            except ValueError:
                counts["refused"] += 1
            slowest = max(slowest, time.perf_counter() - began)
        return counts, pool.num_killed, slowest
    finally:
        pool.close()


def test_500_mutated_images_are_decoded_or_refused():
    counts, killed, _ = decode_all(500)
    assert sum(counts.values()) == 500
    assert min(counts.values()) > 50
    assert killed == 0


@pytest.mark.slow
def test_20000_mutated_images_are_decoded_or_refused(capsys):
    began = time.perf_counter()
    counts, killed, slowest = decode_all(20_000)
    say(
        capsys,
        f"20,000 mutated: {counts}, {killed} killed, slowest {slowest:.2f} s, {time.perf_counter() - began:.0f} s",
    )
    assert sum(counts.values()) == 20_000
    assert killed == 0
    assert slowest < 5.5


def test_the_worker_gives_the_bits_of_the_command_line():
    pool = DecodePool(1)
    try:
        for data in mutated(60, seed=3):
            try:
                expected = decode_image(data)
            except ValueError:
                with pytest.raises(ValueError, match=r"\w"):
                    pool(data)
            else:
                assert np.array_equal(pool(data), expected)
    finally:
        pool.close()


def test_what_is_written_around_the_pixels_changes_nothing():
    plain = encoded("JPEG")
    tags = Image.Exif()
    gps = tags.get_ifd(0x8825)
    gps[1], gps[2], gps[3], gps[4] = "S", (33.0, 51.0, 0.0), "E", (151.0, 12.0, 0.0)
    tags[0x010E] = "Sydney"
    xmp = b'http://ns.adobe.com/xap/1.0/\x00<x:xmpmeta xmlns:x="adobe:ns:meta/"><r GPSLatitude="48.1"/></x:xmpmeta>'

    def with_segment(payload):
        return plain[:2] + b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload + plain[2:]

    class Seeing(FakeLocator):
        def query(self, image, **about):
            seen.append((image.tobytes(), sorted(about.items(), key=str)))
            return super().query(image, **about)

    seen, told = [], set()
    pool = DecodePool(1)
    client = client_of(create_app(Seeing(), decode=pool))
    try:
        for data in (plain, with_segment(tags.tobytes()), with_segment(xmp)):
            for more in ({}, {"X-File-Name": "48.1_N_11.5_E.jpg", "Content-Disposition": 'filename="Munich.jpg"'}):
                answer = client.post("/v1/locate", content=data, headers={**JPEG_TYPE, **more}).json()
                answer.pop("timings_ms")
                told.add(json.dumps(answer))
    finally:
        pool.close()
    assert len(seen) == 6
    assert {image for image, _ in seen} == {decode_image(plain).tobytes()}
    assert {str(about) for _, about in seen} == {"[('heading', nan)]"}
    assert len(told) == 1


# ---- a running service ----------------------------------------------------------------------------------------------


class Running:
    """The application on uvicorn, in a thread, on loopback."""

    def __init__(self, app):
        import uvicorn

        self.port = free_port()
        config = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="warning", access_log=False)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def running(keys):
    pool = DecodePool(1)
    limits = Limits(max_body_bytes=200_000, body_timeout_s=1.0, max_ongoing_requests=16)
    with Running(create_app(FakeLocator(), limits=limits, decode=pool)) as server:
        yield server
    pool.close()


def raw(port, request, timeout_s=8.0):
    """What comes back first, as bytes; empty when the connection is closed or nothing comes in time."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # refused before all was sent; read on
            connection.sendall(request)
        try:
            return connection.recv(65_536)
        except (ConnectionResetError, TimeoutError):
            return b""


def status_of(answer):
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def post(data, path="/v1/locate", kind="image/jpeg", length=None):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(data) if length is None else length}\r\n\r\n".encode() + data


def malformed(num, seed=11):
    """Requests with lies, `num` of them, the same for the same seed."""
    rng = np.random.default_rng(seed)
    image = encoded(width=64, height=32)
    methods = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "HEAD", "BREW", "get", "", "A" * 300]
    paths = [*TABLE, "*", "//", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/locate?" + "a=" * 500, "/\x00",
             "/v1/locate?top_k=%ff", "http://evil.example/", "/" + "a" * 9000, "/v1/locate;x", "/%", "/é",
             ""]  # fmt: skip
    versions = ["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9.9", "http/1.1", "", "HTTP/1.1 x"]
    headers = [
        "Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: 3, 4", "Content-Length: 0x10",
        "Content-Length: 5\r\nContent-Length: 6", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: gzip", "Transfer-Encoding: chunked\r\nContent-Length: 4", "Host: evil.example", "Host:",
        "Host: localhost\r\nHost: localhost", "Expect: 100-continue", "Upgrade: websocket\r\nConnection: Upgrade",
        "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings", "Range: bytes=0-99999999999", ": novalue", "NoColon",
        "X-\x01: y", "X: " + "b" * 20_000, " folded: x", "Authorization: Bearer \xff", "Content-Type: image/jpeg",
        "Content-Type: application/json", "Content-Type: multipart/form-data; boundary=x", "Content-Encoding: gzip",
        "Accept-Encoding: gzip;q=nan", "If-None-Match: \"" + "x" * 100, "Cookie: " + "a=b;" * 900,
    ]  # fmt: skip
    bodies = [b"", image, image[:99], b"{", b"[" * 5000, b'{"items": ' * 300, b"\x00" * 100, b"5\r\nabc", b"0\r\n\r\n",
              b"fffffffff\r\n", b"-1\r\n\r\n", b"zz\r\n", b'{"embedding": [1e999]}', b'{"image": "!!!"}', 
              b"\xff" * 999]  # fmt: skip
    ends = ["\r\n", "\n", "\r\n\r\n", "\r"]

    def one_of(choices):
        return choices[rng.integers(len(choices))]

    for _ in range(num):
        kind = rng.integers(4)
        if kind == 0:  # a good one with bytes changed
            data = bytearray(post(image))
            for at in rng.integers(0, min(len(data), 130), rng.integers(1, 8)):
                data[at] = rng.integers(256)
            yield bytes(data)
        elif kind == 1 and rng.random() < 0.3:  # noise
            yield rng.bytes(int(rng.integers(1, 400)))
        else:
            end = "\r\n" if rng.random() < 0.9 else one_of(ends)
            method = one_of(methods[:2]) if rng.random() < 0.7 else one_of(methods)
            path = one_of(paths[: len(TABLE)]) if rng.random() < 0.7 else one_of(paths)
            line = f"{method} {path} {versions[0] if rng.random() < 0.9 else one_of(versions)}"
            lines = [line, *([] if rng.random() < 0.1 else ["Host: localhost"])]
            lines += [one_of(headers) for _ in range(rng.integers(0, 3))]
            body = one_of(bodies)
            if rng.random() < 0.7:  # a length that is right, so that it gets past the parser
                lines += [f"Content-Length: {len(body)}", f"Content-Type: {one_of(['image/jpeg', 'application/json'])}"]
            yield (end.join(lines) + end + end).encode("latin-1") + body


def send_malformed(port, num):
    counts = {}
    requests = list(malformed(num))
    with ThreadPoolExecutor(8) as threads:  # those without an end keep a connection until we give up
        answers = list(threads.map(lambda request: raw(port, request, 2.0), requests))
    for request, answer in zip(requests, answers, strict=True):
        status = status_of(answer)
        counts[status] = counts.get(status, 0) + 1
        assert status < 500, (request[:300], answer[:300])
        assert b"Traceback" not in answer
    assert status_of(raw(port, post(encoded()))) == 200
    return counts


def send_mutated(port, num):
    counts = {}
    for data in mutated(num, seed=8):
        status = status_of(raw(port, post(data)))
        counts[status] = counts.get(status, 0) + 1
    assert set(counts) <= {200, 400, 413, 415, 422}, counts
    assert min(counts[200], counts[422]) > num / 20
    return counts


def test_100_mutated_images_over_http(running):
    send_mutated(running.port, 100)


def test_200_malformed_requests_over_a_socket(running):
    counts = send_malformed(running.port, 200)
    assert counts.get(400, 0) > 20


def test_lengths_that_lie_and_chunks_that_do_not_end(running):
    image = encoded()
    assert status_of(raw(running.port, post(image, length=len(image) + 50))) == 408
    assert status_of(raw(running.port, post(image, length=10))) in (400, 413, 415, 422)
    assert status_of(raw(running.port, post(b"x" * 200_001))) == 413
    head = (
        b"POST /v1/locate HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"10000\r\n" + b"\xff" * 65_536 + b"\r\n"
    assert status_of(raw(running.port, head + chunk * 5 + b"0\r\n\r\n")) == 413
    assert status_of(raw(running.port, head + b"5\r\nabc")) == 408
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", running.port), timeout=8) as slow:
        slow.sendall(head + b"3\r\n\xff\xd8\xff\r\n")  # and then nothing
        assert status_of(slow.recv(65_536)) == 408
    assert 0.8 < time.monotonic() - began < 4.0


@pytest.mark.slow
def test_2000_mutated_images_over_http(running, capsys):
    began = time.perf_counter()
    counts = send_mutated(running.port, 2000)
    say(capsys, f"2,000 mutated over HTTP: {counts}, {time.perf_counter() - began:.0f} s")


@pytest.mark.slow
def test_5000_malformed_requests_over_a_socket(running, capsys):
    began = time.perf_counter()
    counts = send_malformed(running.port, 5000)
    say(capsys, f"5,000 malformed: {counts}, {time.perf_counter() - began:.0f} s")


@pytest.mark.slow
def test_memory_does_not_grow_over_10000_requests(keys, capsys):
    ring, texts = keys
    pool = DecodePool(1)
    app = create_app(FakeLocator(), keys=ring, rates=LeasedRates(Rate(1e6, 1_000_000)), decode=pool)
    app.state.service.release.locator.queries = Forgetful()
    app.state.service.release.locator.answered = Forgetful()
    images = list(mutated(50)) + [encoded(seed=s) for s in range(50)]
    good, wrong = with_key(texts["good"], JPEG_TYPE), with_key(texts["wrong"], JPEG_TYPE)

    async def flood():
        import httpx

        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", timeout=60
        ) as client:

            async def some(num, offset):
                for i in range(num):
                    headers = wrong if i % 5 == 0 else good
                    answer = await client.post("/v1/locate", content=images[(i + offset) % 100], headers=headers)
                    assert answer.status_code < 500

            await some(1000, 0)  # what is made once
            before = resident_mb()
            await asyncio.gather(*(some(2500, 25 * k) for k in range(4)))
            return resident_mb() - before

    grown = asyncio.run(flood())
    pool.close()
    say(capsys, f"resident memory after 10,000 requests: {grown:+.1f} MB")
    assert grown < 50


class Forgetful(list):
    def append(self, item):
        pass


def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


# ---- secrets --------------------------------------------------------------------------------------------------------


def test_a_canary_is_never_told(monkeypatch, caplog, capfd, tmp_path):
    text, key = new_key(f"{CANARY}-name", SCOPES)
    secrets = [text, CANARY]
    for name in ("AWS_SECRET_ACCESS_KEY", "HEDWIG_MAPILLARY_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    log = AuditLog(tmp_path / "audit", "r")
    told = []
    app = create_app(FakeLocator(), keys=KeyRing([key]), audit=log)
    with caplog.at_level(logging.DEBUG), client_of(app) as client:
        for given in (text, text + "x", CANARY, None):
            for path, (method, body, headers, _) in TABLE.items():
                for query in ("", f"?{CANARY}=1", "?top_k=-1"):
                    answer = client.request(method, path + query, content=body, headers=with_key(given, headers))
                    # A parameter's own name comes back in the message that refuses it; a value does not.
                    told.append(str(answer.headers) + ("" if CANARY in query else answer.text))

        class Broken(FakeLocator):
            def query(self, image, **_):
                raise RuntimeError(CANARY)

        with client_of(create_app(Broken(), keys=KeyRing([key]))) as broken:
            answer = broken.post("/v1/locate", content=encoded(), headers=with_key(text, JPEG_TYPE))
            assert answer.status_code == 500
            told.append(answer.text)
    told += [record.getMessage() for record in caplog.records if record.name.startswith("hedwig")]
    told += [str(part) for part in capfd.readouterr()] + [p.read_text() for p in (tmp_path / "audit").iterdir()]
    told.append(repr(key.sha256) + repr(KeyRing([key])))
    for secret in secrets:
        assert not [one for one in told if secret in one], secret
