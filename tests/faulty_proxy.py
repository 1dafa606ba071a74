"""A proxy before an object store that fails on purpose: 500, 503 SlowDown, silence, and bodies cut short."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("500", "503", "silence", "lost answer", "truncated")
SILENCE_S = 1.0  # then the connection closes; waiting for a client's own time-out would take the test minutes
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}


class FaultyProxy:
    """Listens on loopback while the block runs; `share` of all requests fail, in an order decided by `seed`."""

    def __init__(self, target: str, *, share: float = 0.1, seed: int = 0) -> None:
        self.target, self.share = urlsplit(target), share
        self.faults: Counter[str] = Counter()
        self.num_requests = 0
        self._rng, self._lock = random.Random(seed), threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.answer(self)

            do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                pass  # a client that hung up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _draw(self) -> str | None:
        with self._lock:
            self.num_requests += 1
            fault = self._rng.choice(FAULTS) if self._rng.random() < self.share else None
            if fault is not None:
                self.faults[fault] += 1
            return fault

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        fault = self._draw()
        if fault == "silence":
            time.sleep(SILENCE_S)
            request.close_connection = True
            return
        if fault in ("500", "503"):
            word = "InternalError" if fault == "500" else "SlowDown"
            text = f"<?xml version='1.0'?><Error><Code>{word}</Code><Message>injected</Message></Error>".encode()
            self._send(request, int(fault), [("Content-Type", "application/xml")], text)
            return
        connection = http.client.HTTPConnection(self.target.hostname or "", self.target.port, timeout=60)
        try:
            connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():  # the host too: it is part of what was signed
                if name.lower() not in HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if fault == "lost answer":  # the store did it, and nobody is told
            request.close_connection = True
            return
        headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in (*HOP_BY_HOP, "content-length")]
        told = answer.getheader("Content-Length") if request.command == "HEAD" else None
        self._send(request, answer.status, headers, content, told=told, cut=fault == "truncated")

    def _send(self, request, status, headers, content, *, told=None, cut=False) -> None:
        request.send_response_only(status)
        for name, value in headers:
            request.send_header(name, value)
        if status != 204:
            request.send_header("Content-Length", told or str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            request.close_connection = True
