"""The client: what it sends, when it tries again and what it raises."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hedwig.serving import locate_remote

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


@pytest.fixture
def service():
    """A server that gives the listed answers in turn, and keeps what it was sent."""

    class Scripted(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.seen.append((self.path, self.headers["Content-Type"], body))
            status, answer = server.answers.pop(0)
            text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            if status == 503:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Scripted)
    server.seen, server.answers = [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_sends_the_bytes_and_parses_the_answer(service, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy is not asked for loopback
    service.answers = [(200, GOOD), (200, GOOD)]
    answer = locate_remote(service.url + "/", b"\xff\xd8\xffdata", top_k=7, heading=12.5)
    assert (answer.pano_id, answer.lat, answer.lon) == ("p", 1.0, None)
    locate_remote(service.url, b"\x89PNGdata")
    assert service.seen == [
        ("/v1/locate?top_k=7&heading=12.5", "image/jpeg", b"\xff\xd8\xffdata"),
        ("/v1/locate?top_k=5", "image/png", b"\x89PNGdata"),
    ]


def test_lost_replica_and_overload_are_tried_again(service):
    error = {"error": {"code": "overloaded", "message": "Full.", "next": "Wait."}}
    service.answers = [(500, "Internal Server Error"), (503, error), (200, GOOD)]
    assert locate_remote(service.url, b"x").pano_id == "p"
    assert len(service.seen) == 3


def test_refusal_is_a_value_error_with_the_services_words(service):
    service.answers = [(422, {"error": {"code": "bad_image", "message": "Cut short.", "next": "Send it whole."}})]
    with pytest.raises(ValueError, match=r"422\): Cut short. Send it whole."):
        locate_remote(service.url, b"x")
    assert len(service.seen) == 1


def test_gives_up_after_its_attempts(service):
    service.answers = [(503, "busy")] * 3
    with pytest.raises(ConnectionError, match="3 attempts; the last said: busy"):
        locate_remote(service.url, b"x", num_retries=2)
    assert len(service.seen) == 3


def test_nobody_there_and_wrong_scheme():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ConnectionError, match="1 attempts"):
        locate_remote(f"http://127.0.0.1:{port}", b"x", num_retries=0)
    with pytest.raises(ValueError, match="file:///etc"):
        locate_remote("file:///etc", b"x")
