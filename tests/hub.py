"""A loopback server that answers as a model hub does where `hedwig fetch` asks: listings and files in ranges."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served, how it misbehaves, and what was asked."""

    files: dict[str, bytes]
    licence: str | None = "apache-2.0"
    large: bool = True  # large files have a sha256, small ones only git's object name
    cut_after: int | None = None  # bytes of a body after which the connection closes
    cuts: int = 0  # how many bodies are cut
    corrupt: bool = False
    status: dict[str, list[int]] = field(default_factory=dict)  # path prefix: answers given once each, first
    ignore_ranges: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    authorisation: list[str | None] = field(default_factory=list)
    url: str = ""

    def sent(self) -> list[tuple[str, str | None]]:
        """The requests for files, with their ranges."""
        return [(path, span) for path, span in self.asked if "/resolve/" in path]


def _listing(hub: Hub, repo: str) -> dict[str, object]:
    siblings = []
    for path, content in hub.files.items():
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        lfs = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
        siblings.append({"rfilename": path, "size": len(content), "blobId": oid} | ({"lfs": lfs} if hub.large else {}))
    card = {} if hub.licence is None else {"license": hub.licence}
    return {"id": repo, "sha": COMMIT, "siblings": siblings, "cardData": card, "tags": [], "private": False}


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, span = self.hub, self.headers.get("Range")
        path = self.path.partition("?")[0]
        hub.asked.append((path, span))
        hub.authorisation.append(self.headers.get("Authorization"))
        for prefix, answers in hub.status.items():
            if path.startswith(prefix) and answers:
                self._send(answers.pop(0), b"no")
                return
        if listed := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.*)?", path):
            self._send(200, json.dumps(_listing(hub, listed[1])).encode(), {"Content-Type": "application/json"})
            return
        wanted = re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.*)", path)
        if not wanted or wanted[1] not in hub.files:
            self._send(404, b"no such file", {"X-Error-Code": "EntryNotFound"})
            return
        body = hub.files[wanted[1]]
        headers = {"ETag": hashlib.sha256(body).hexdigest(), "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(body))}
        if hub.corrupt:
            body = bytes([body[0] ^ 1]) + body[1:]
        start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span and not hub.ignore_ranges else 0
        status = 206 if start else 200
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self._send(status, body[start:], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        hub = self.hub
        if hub.cuts and status in (200, 206) and "/resolve/" in self.path and hub.cut_after is not None:
            hub.cuts -= 1
            self.wfile.write(body[: hub.cut_after])
            self.close_connection = True
            return
        self.wfile.write(body)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free loopback port."""
    answer = type("Answer", (_Answer,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield hub
        server.shutdown()
        thread.join()
