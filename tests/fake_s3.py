"""An S3 of a few objects, on loopback while the block runs: HEAD, GET with ranges, lists of the second version.

It checks no signature, but it tells a signed request from one that is not, as a bucket with a policy would: what is in
`public` is given to those who do not sign, the rest to those who do. Anything else is refused with 403.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class FakeS3:
    """Objects by bucket and key; `seen` notes (method, path, who) of every request, `who` "nobody" or the region."""

    def __init__(self, objects: dict[str, bytes], *, public: set[str] = frozenset()) -> None:
        self.objects, self.public = objects, public
        self.seen: list[tuple[str, str, str]] = []
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                store.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeS3:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        address = urlsplit(request.path)
        path, query = unquote(address.path).strip("/"), parse_qs(address.query)
        signed = request.headers.get("Authorization", "")
        who = signed.split("Credential=")[1].split("/")[2] if "Credential=" in signed else "nobody"
        self.seen.append((request.command, path, who))
        bucket, _, key = path.partition("/")
        if (bucket in self.public) == bool(signed):
            self._send(request, 403, _error("AccessDenied"))
        elif not key and "list-type" in query:
            self._send(
                request, 200, self._listing(bucket, query.get("prefix", [""])[0], query.get("delimiter", [""])[0])
            )
        elif path not in self.objects:
            self._send(request, 404, _error("NoSuchKey"))
        else:
            self._object(request, self.objects[path])

    def _object(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        asked = request.headers.get("Range")
        if asked is None:
            self._send(request, 200, content)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        end = min(int(last or len(content)), len(content) - 1)
        part = content[int(first) : end + 1]
        self._send(request, 206, part, {"Content-Range": f"bytes {first}-{end}/{len(content)}"})

    def _listing(self, bucket: str, prefix: str, delimiter: str) -> bytes:
        names = sorted(path.partition("/")[2] for path in self.objects if path.startswith(f"{bucket}/{prefix}"))
        below = {name for name in names if delimiter and delimiter in name[len(prefix) :]}
        folders = sorted({prefix + name[len(prefix) :].split(delimiter)[0] + delimiter for name in below})
        stamp, size = "2026-01-01T00:00:00.000Z", {name: len(self.objects[f"{bucket}/{name}"]) for name in names}
        text = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{stamp}</LastModified><Size>{size[name]}</Size></Contents>"
            for name in names
            if name not in below
        ) + "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders)
        count = len(names) - len(below) + len(folders)
        return (
            "<?xml version='1.0'?><ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{count}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>false</IsTruncated>{text}</ListBucketResult>"
        ).encode()

    def _send(self, request, status, content, headers=None) -> None:
        request.send_response_only(status)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)


def _error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
