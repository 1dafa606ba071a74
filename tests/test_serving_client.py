"""The client: what it sends, when it tries again, what it raises, and how it asks for many."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest

from hedwig import Client
from hedwig.serving.client import KEY_VARIABLE

GOOD = {
    "pano_id": "p",
    "lat": 1.0,
    "lon": None,
    "cell_ids": [1],
    "cell_probs": [0.5],
    "neighbour_ids": [],
    "neighbour_scores": [],
    "timings_ms": {"total": 1.0},
    "version": "0",
}
NEIGHBOURS = {
    "cell_ids": [[1]],
    "neighbour_ids": [["a"]],
    "neighbour_scores": [[0.5]],
    "neighbour_lat": [[1.0]],
    "neighbour_lon": [[2.0]],
    "timings_ms": {"total": 1.0},
    "version": "0",
}
BUSY = {"error": {"code": "overloaded", "message": "Full.", "next": "Wait."}}


@pytest.fixture
def service():
    """A server that gives the listed answers in turn, and keeps what it was sent."""

    class Scripted(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                server.seen.append((self.path, self.headers["Content-Type"], body))
                server.keys.append(self.headers.get("Authorization"))
                status, answer, *headers = server.answers.pop(0)
            if status == 0:  # the connection is lost
                self.close_connection = True
                self.connection.close()
                return
            text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            for name, value in headers or ([("Retry-After", "0")] if status in (429, 503) else []):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.seen, server.keys, server.answers = [], [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_sends_the_bytes_and_parses_the_answer(service, monkeypatch, tmp_path):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy is not asked for loopback
    service.answers = [(200, GOOD)] * 3
    (tmp_path / "one.png").write_bytes(b"\x89PNGdata")
    with Client(service.url + "/") as client:
        answer = client.locate(b"\xff\xd8\xffdata", top_k=7, heading=12.5)
        client.locate(tmp_path / "one.png", explain=True)
        client.locate([b"RIFFa", str(tmp_path / "one.png")], headings_deg=[0, 90])
    assert (answer.pano_id, answer.lat, answer.lon) == ("p", 1.0, None)
    assert [(path.split("?")[0], kind) for path, kind, _ in service.seen] == [
        ("/v1/locate", "image/jpeg"),
        ("/v1/locate", "image/png"),
        ("/v1/locate", "application/json"),
    ]
    assert [set(path.split("?")[1].split("&")) for path, _, _ in service.seen] == [
        {"top_k=7", "heading=12.5"},
        {"top_k=5", "explain=true"},
        {"top_k=5"},
    ]
    assert service.seen[1][2] == b"\x89PNGdata"
    images = [base64.b64encode(data).decode() for data in (b"RIFFa", b"\x89PNGdata")]
    assert json.loads(service.seen[2][2]) == {"images": images, "headings_deg": [0.0, 90.0]}


def test_lost_connection_lost_replica_and_overload_are_tried_again(service):
    service.answers = [(500, "Internal Server Error"), (0, ""), (503, BUSY), (200, GOOD)]
    with Client(service.url) as client:
        assert client.locate(b"x").pano_id == "p"
    assert len(service.seen) == 4


def test_retry_after_is_obeyed(service, monkeypatch):
    waits = []
    monkeypatch.setattr("hedwig.serving.client.time.sleep", waits.append)
    service.answers = [(429, BUSY, ("Retry-After", "7")), (503, BUSY, ("Retry-After", "9999")), (502, "x"), (200, GOOD)]
    with Client(service.url) as client:
        client.locate(b"x")
    assert waits == [7.0, 30.0, 0.2]


def test_refusal_is_a_value_error_with_the_services_words(service):
    service.answers = [(422, {"error": {"code": "bad_image", "message": "Cut short.", "next": "Send it whole."}})]
    with Client(service.url) as client, pytest.raises(ValueError, match=r"422\): Cut short. Send it whole."):
        client.locate(b"x")
    assert len(service.seen) == 1


def test_keys_come_from_the_environment_or_an_argument_and_are_never_shown(service, monkeypatch):
    refused = {"error": {"code": "bad_key", "message": "No such key.", "next": "Ask."}}
    service.answers = [(200, GOOD), (200, GOOD), (401, refused)]
    Client(service.url).locate(b"x")
    monkeypatch.setenv(KEY_VARIABLE, "canary-env")
    Client(service.url).locate(b"x")
    client = Client(service.url, api_key="canary-argument")
    with pytest.raises(PermissionError, match="No such key") as caught:
        client.locate(b"x")
    assert service.keys == [None, "Bearer canary-env", "Bearer canary-argument"]
    assert "canary" not in f"{client!r} {client!s} {caught.value}"


def test_gives_up_after_its_attempts(service):
    service.answers = [(503, "busy")] * 3
    with (
        Client(service.url, num_retries=2) as client,
        pytest.raises(ConnectionError, match="3 attempts; the last said: busy"),
    ):
        client.locate(b"x")
    assert len(service.seen) == 3


def test_nobody_there_wrong_scheme_and_another_service(service):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ConnectionError, match="1 attempts"):
        Client(f"http://127.0.0.1:{port}", num_retries=0).locate(b"x")
    with pytest.raises(ValueError, match="file:///etc"):
        Client("file:///etc")
    service.answers = [(200, {"hello": "world"}), (302, "", ("Location", "http://example.org/"))]
    with pytest.raises(ConnectionError, match="LocateAnswer"):
        Client(service.url).locate(b"x")
    with pytest.raises(ValueError, match="302"):
        Client(service.url).locate(b"x")


def test_vectors_travel_as_numbers_and_with_cells_as_base64(service):
    service.answers = [(200, NEIGHBOURS)] * 2
    vectors = np.arange(6, dtype=np.float64).reshape(2, 3)
    with Client(service.url) as client:
        assert client.neighbours(vectors, top_k=9).neighbour_ids == [["a"]]
        client.neighbours(vectors, cells=[[1, -1], [2, 0]])
        with pytest.raises(ValueError, match=r"\(3,\)"):
            client.neighbours([1.0, 2.0, 3.0])
    plain, coded = service.seen
    assert plain[:2] == ("/v1/neighbours?top_k=9", "application/octet-stream")
    np.testing.assert_array_equal(np.frombuffer(plain[2], "<f4").reshape(2, 3), vectors)
    body = json.loads(coded[2])
    assert body["cells"] == [[1, -1], [2, 0]]
    assert base64.b64decode(body["embeddings"]) == plain[2]


def test_cells_travel_once():
    asked = []

    def answer(request):
        asked.append(request.headers.get("If-None-Match"))
        if request.headers.get("If-None-Match") == '"t"':
            return httpx.Response(304)
        return httpx.Response(200, json={"type": "FeatureCollection", "features": [1]}, headers={"ETag": '"t"'})

    client = Client(transport=httpx.MockTransport(answer))
    assert client.cells() == client.cells() == {"type": "FeatureCollection", "features": [1]}
    assert asked == [None, '"t"']


def test_many_are_asked_a_few_at_a_time_and_one_bad_one_spoils_nothing():
    now, most, sent = 0, 0, []

    async def answer(request):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        body = request.content
        sent.append(body)
        if body == b"3" and sent.count(b"3") == 1:
            return httpx.Response(503, json=BUSY, headers={"Retry-After": "0"})
        if body == b"5":
            return httpx.Response(422, json={"error": {"code": "c", "message": "Bad.", "next": "Go."}})
        return httpx.Response(200, json={**GOOD, "pano_id": body.decode()})

    async def ask():
        client = Client(transport=httpx.MockTransport(answer))
        images = [str(i).encode() for i in range(9)] + ["/no/such/file"]
        return [pair async for pair in client.locate_many(images, concurrency=3)]

    found = dict(asyncio.run(ask()))
    assert most == 3
    assert sorted(found) == list(range(10))
    assert [found[i].pano_id for i in (0, 3, 8)] == ["0", "3", "8"]
    assert isinstance(found[5], ValueError)
    assert isinstance(found[9], FileNotFoundError)
    assert sent.count(b"3") == 2


def test_the_client_needs_neither_torch_nor_ray_nor_a_server():
    heavy = ("torch", "ray", "fastapi", "httpx")
    code = f"import sys, hedwig; hedwig.Client; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
