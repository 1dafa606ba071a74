"""The polite client against a server that counts, stalls, cuts off and redirects."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import pickle
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest

from hedwig.web import Politeness, Refused, WebClient, _retry_after

SECRET = "canary/key+with %"


@pytest.fixture
def server():
    """`answers` are handed out in order, the last one again and again: (status, headers, body[, cut])."""
    with Server() as made:
        yield made


class Server:
    def __init__(self):
        self.answers, self.requests = [(200, {}, b"ok")], []
        self.delay_s, self.under_way, self.most = 0.0, 0, 0
        self.lock = threading.Lock()

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                with outer.lock:
                    number = len(outer.requests)
                    outer.requests.append((time.monotonic(), self.path, dict(self.headers), body))
                    outer.under_way += 1
                    outer.most = max(outer.most, outer.under_way)
                status, headers, data, *cut = outer.answers[min(number, len(outer.answers) - 1)]
                time.sleep(outer.delay_s)
                with outer.lock:
                    outer.under_way -= 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "transfer-encoding" not in headers:
                    self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: cut[0]] if cut else data)
                self.wfile.flush()
                if cut:
                    self.close_connection = True
                    self.connection.shutdown(2)

            do_POST = do_GET

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, address):
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


def get(server, path="/x", *, base="", times=1, client=None, **options):
    """`times` requests at once; the last answer."""
    polite = options.pop("politeness", None) or Politeness(first_wait_s=0.01, timeout_s=2.0)

    async def run():
        async with WebClient(server.url + base, politeness=polite, **(client or {})) as web:
            return (await asyncio.gather(*(web.request("GET", path, **options) for _ in range(times))))[-1]

    return asyncio.run(run())


def test_requests_are_spaced_evenly_also_across_clients(server):
    polite = Politeness(per_second=25.0)
    get(server, times=6, politeness=polite)
    get(server, times=6, politeness=polite)
    moments = np.sort([moment for moment, *_ in server.requests])
    assert len(moments) == 12
    assert moments[-1] - moments[0] >= 11 / 25 - 0.02
    assert all((moments[i + 5] - moments[i]) >= 5 / 25 - 0.03 for i in range(7))  # no bursts


def test_starts_keep_their_distance_even_when_sleeps_end_late():
    polite, starts = Politeness(per_second=50.0), []

    async def one(index):
        await polite.turn()
        starts.append(time.monotonic())
        if index == 3:
            time.sleep(0.05)  # the loop is busy: those who wait wake up late, together

    async def run():
        await asyncio.gather(*map(one, range(10)))

    asyncio.run(run())
    assert np.diff(starts).min() >= 1 / 50 - 1e-3


def test_retries_count_against_the_rate(server):
    server.answers = [(500, {}, b"")] * 4 + [(200, {}, b"ok")]
    get(server, politeness=Politeness(per_second=20.0, first_wait_s=1e-6))
    assert server.requests[-1][0] - server.requests[0][0] >= 4 / 20 - 0.02


def test_concurrency_is_reached_and_not_exceeded(server):
    server.delay_s = 0.05
    get(server, times=12, politeness=Politeness(concurrency=3))
    assert server.most == 3


@pytest.mark.parametrize(
    "fault",
    [
        (200, {}, b"0123456789", 4),
        (200, {"transfer-encoding": "chunked"}, b"5\r\nhello\r\n"[:6], 6),
        (200, {"content-encoding": "gzip"}, b"this is no gzip"),
        (503, {}, b"busy"),
        (429, {"Retry-After": "0"}, b"slow"),
    ],
)
def test_faults_are_asked_again(server, fault):
    server.answers = [fault, (200, {}, b"whole")]
    answer = get(server)
    assert (answer.body, answer.num_attempts, len(server.requests)) == (b"whole", 2, 2)


def test_silence_and_dripping_are_faults(server):
    server.delay_s = 0.6
    with pytest.raises(Refused, match=r"given up after 2 attempts.*ReadTimeout"):
        get(server, politeness=Politeness(timeout_s=0.15, max_attempts=2, first_wait_s=0.01))
    with pytest.raises(Refused, match=r"no complete answer within 0\.2 s"):
        get(server, politeness=Politeness(total_s=0.2, max_attempts=1))


def test_a_body_that_is_no_answer_is_asked_again(server):
    server.answers = [(200, {}, b'{"half": '), (200, {}, b"{}")]
    assert get(server, check=json.loads).num_attempts == 2
    assert get(server, check=json.loads, max_attempts=1).num_attempts == 1


def test_an_oversize_body_is_refused_while_reading(server):
    server.answers = [(200, {}, b"x" * 1_000_000)]
    with pytest.raises(Refused, match="over 1000 bytes"):
        get(server, politeness=Politeness(max_bytes=1000))
    assert len(server.requests) == 1
    assert len(get(server, politeness=Politeness(max_bytes=1_000_000)).body) == 1_000_000


def test_final_statuses_are_not_asked_again(server):
    server.answers = [(404, {}, b"gone")]
    with pytest.raises(Refused, match="HTTP 404: gone") as caught:
        get(server)
    assert (caught.value.status, caught.value.body, caught.value.num_attempts) == (404, "gone", 1)
    copy = pickle.loads(pickle.dumps(caught.value))  # errors cross processes
    assert (str(copy), copy.status) == (str(caught.value), 404)
    assert get(server, accept=(404,)).status == 404
    server.answers = [(429, {}, b'{"code": "insufficient_quota"}')]
    with pytest.raises(Refused):
        get(server, final=("insufficient_quota",))
    assert len(server.requests) == 3


def test_secrets_are_hidden_in_errors_reprs_and_logs(server, caplog):
    caplog.set_level(logging.DEBUG)
    server.answers = [(403, {}, b"x" * 495 + f"no such key: {SECRET}".encode())]  # a cut would halve it
    secretive = {"headers": {"X-Key": "canary-header"}, "params": {"key": SECRET}, "secrets": (SECRET, "canary-header")}
    with pytest.raises(Refused) as caught:
        get(server, client=secretive)
    assert dict(parse_qsl(urlsplit(server.requests[0][1]).query))["key"] == SECRET
    assert server.requests[0][2]["X-Key"] == "canary-header"
    shown = str(caught.value) + repr(caught.value) + caught.value.body + caplog.text
    assert "HTTP Request" in caplog.text
    web = WebClient(server.url, politeness=Politeness(), **secretive)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(web)
    bad = {"headers": {"X-Key": "canary\nline"}, "secrets": ("canary\nline",)}
    with pytest.raises(Refused, match="cannot be asked") as caught:
        get(server, client=bad)
    shown += repr(web) + str(caught.value)
    assert "canary" not in shown
    assert "***" in shown
    with pytest.raises(ValueError, match="password") as caught:
        WebClient("http://user:canary@localhost/", politeness=Politeness())
    assert "canary" not in str(caught.value)


def test_keys_go_to_their_own_service_only(server):
    mine = {"headers": {"X-Key": "k"}, "params": {"token": "t"}}
    with Server() as other:
        get(server, other.url + "/picture", client=mine)
        assert "X-Key" not in other.requests[0][2]
        assert other.requests[0][1] == "/picture"
        server.answers = [(302, {"Location": other.url + "/stolen"}, b"")]
        with pytest.raises(Refused, match=r"points to.*stolen"):
            get(server, client=mine)
        assert len(other.requests) == 1
        get(server, server.url + "/v1evil/x", base="/v1", client=mine, accept=(302,))
        assert "X-Key" not in server.requests[-1][2]


def test_paging_links_keep_their_query(server):
    get(
        server,
        server.url + "/list?after=7&bbox=1,2&token=old",
        params={"limit": "5"},
        client={"params": {"token": "t"}},
    )
    assert dict(parse_qsl(urlsplit(server.requests[0][1]).query)) == {
        "after": "7", "bbox": "1,2", "token": "t", "limit": "5"
    }  # fmt: skip
    get(server, server.url + "/list?after=7%2F8")
    assert server.requests[1][1] == "/list?after=7%2F8"


def test_retry_after_holds_everybody(server):
    server.answers = [(429, {"Retry-After": "0.5"}, b""), (200, {}, b"ok")]
    polite = Politeness(concurrency=4, per_second=100.0)
    get(server, politeness=polite, times=1)
    assert server.requests[1][0] - server.requests[0][0] >= 0.5
    polite.pause(0.4)
    started = time.monotonic()
    get(server, politeness=polite, times=3)
    assert min(moment for moment, *_ in server.requests[2:]) - started >= 0.39


def test_retry_after_in_all_forms():
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert _retry_after({"retry-after": soon}) == pytest.approx(30, abs=1.5)
    assert _retry_after({"retry-after": soon.replace("GMT", "-0000")}) == pytest.approx(30, abs=1.5)
    assert _retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert _retry_after({"retry-after": "1.5"}) == 1.5
    assert _retry_after({"retry-after": "-3"}) == 0
    assert _retry_after({"retry-after-ms": "250", "retry-after": "1"}) == 0.25
    assert _retry_after({"retry-after": "soon"}) is None
    assert _retry_after({}) is None


@pytest.mark.parametrize("value", ["3600", "inf", email.utils.formatdate(time.time() + 7200, usegmt=True)])
def test_a_service_that_says_much_later_is_given_up_on(server, value):
    server.answers = [(429, {"Retry-After": value}, b"")]
    with pytest.raises(Refused, match="more than the 120 s allowed; run the same command again later"):
        get(server)
    assert len(server.requests) == 1


def test_nobody_there_is_said_so():
    with Server() as gone:
        url = gone.url
    gone.url = url
    with pytest.raises(Refused, match="ConnectError") as caught:
        get(gone, politeness=Politeness(max_attempts=2, first_wait_s=0.01))
    assert caught.value.status is None
    with pytest.raises(RuntimeError, match="async with"):
        asyncio.run(WebClient(url, politeness=Politeness()).request("GET", "x"))
    for bad in ({"per_second": 0.0}, {"concurrency": 0}, {"max_attempts": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Politeness(**bad)
