"""A loopback endpoint that speaks chat completions, files and batches, and fails on command.

It keeps the service's own books: `paid` holds one entry per answer with a usage that was sent completely. The
faults of live requests come from `fault(number, body)`, which names one of "429:SECONDS", "429-quota", "500", "400",
"401", "404", "hang", "malformed", "drop", "no-choices", "empty", "refused" or None; those of batch lines from
`batch_fault(custom_id, times_seen)`: "expired", "500", "400", "empty", or None.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

IMAGE_TOKENS = 85


def words_of(body):
    """Text of a request, and how many images it holds."""
    text, images = [], 0
    for message in body["messages"]:
        parts = (
            message["content"]
            if isinstance(message["content"], list)
            else [{"type": "text", "text": message["content"]}]
        )
        for part in parts:
            if part["type"] == "image_url":
                images += 1
                assert part["image_url"]["url"].startswith("data:image/jpeg;base64,")
                assert part["image_url"]["detail"] in ("low", "high", "auto")
            else:
                text.append(part["text"])
    return " ".join(text), images


def short_answer(body):
    """An answer within any budget, different for different requests."""
    digest = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
    return f"gray road, {int(digest[:3], 16)} poles, red roofs"


class FakeOpenAI:
    def __init__(self, *, say=short_answer, fault=None, batch_fault=None, key=None, delay_s=0.0, idempotent=False):
        self.say, self.fault, self.batch_fault, self.key = say, fault, batch_fault, key
        self.delay_s, self.idempotent = delay_s, idempotent
        self.lock = threading.Lock()
        self.paid, self.times, self.bodies, self.sent_keys, self.seen_headers = [], [], [], [], []
        self.under_way = self.most_under_way = 0
        self.released = threading.Event()  # ends all hangs
        self.replays = {}
        self.files, self.batches, self.line_seen = {}, {}, {}
        self.create_fault = None  # "lost" (created, answer not sent), "token_limit_exceeded", "invalid_model"
        self.batch_ends = "completed"
        self.calls = []

    def __enter__(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                fake.get(self)

            def do_POST(self):
                fake.post(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, address):
                pass  # clients that go away are part of the tests

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    # The books -------------------------------------------------------------------------------------------------------

    def usage(self, body, text):
        asked, images = words_of(body)
        return {"prompt_tokens": len(asked.split()) + IMAGE_TOKENS * images, "completion_tokens": len(text.split())}

    def completion(self, body, kind=None):
        text = "" if kind in ("empty", "refused") else self.say(body)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if kind == "refused":
            choice["finish_reason"] = "content_filter"
        return {
            "id": f"chatcmpl-{random.getrandbits(40):x}", "object": "chat.completion", "model": body["model"],
            "choices": [] if kind == "no-choices" else [choice], "usage": self.usage(body, text),
        }  # fmt: skip

    def totals(self):
        return {
            "num_requests": len(self.paid),
            "prompt_tokens": sum(entry["prompt_tokens"] for entry in self.paid),
            "completion_tokens": sum(entry["completion_tokens"] for entry in self.paid),
        }

    # HTTP ------------------------------------------------------------------------------------------------------------

    def send(self, handler, status, value, headers=(), cut=False):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        handler.send_response(status)
        for name, text in headers:
            handler.send_header(name, text)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if cut else data)
        handler.wfile.flush()
        if cut:
            handler.close_connection = True
            handler.connection.shutdown(2)

    def authorised(self, handler):
        if self.key is None or handler.headers.get("authorization") == f"Bearer {self.key}":
            return True
        given = handler.headers.get("authorization")  # a service that repeats the key in its error
        self.send(
            handler, 401, {"error": {"message": f"Incorrect API key provided: {given}", "code": "invalid_api_key"}}
        )
        return False

    def post(self, handler):
        data = handler.rfile.read(int(handler.headers["content-length"]))
        if not self.authorised(handler):
            return
        with self.lock:
            self.calls.append(("POST", handler.path))
        if handler.path == "/v1/chat/completions":
            self.chat(handler, json.loads(data))
        elif handler.path == "/v1/files":
            self.upload(handler, data)
        elif handler.path == "/v1/batches":
            self.create(handler, json.loads(data))
        else:
            self.send(handler, 404, {"error": {"message": "unknown address"}})

    def chat(self, handler, body):
        key = handler.headers.get("idempotency-key")
        with self.lock:
            number = len(self.times)
            self.times.append(time.monotonic())
            self.bodies.append(body)
            self.sent_keys.append(key)
            self.seen_headers.append(dict(handler.headers))
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            self.answer(handler, body, key, self.fault(number, body) if self.fault else None)
        finally:
            with self.lock:
                self.under_way -= 1

    def answer(self, handler, body, key, fault):
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.idempotent and key in self.replays:
            self.send(handler, 200, self.replays[key])
            return
        if fault == "hang":
            self.released.wait(30)
            handler.close_connection = True
        elif fault is not None and fault.startswith("429:"):
            wait = fault.partition(":")[2]
            self.send(
                handler,
                429,
                {"error": {"message": "slow down", "code": "rate_limit_exceeded"}},
                [("Retry-After", wait)],
            )
        elif fault == "429-quota":
            self.send(handler, 429, {"error": {"message": "no credit", "code": "insufficient_quota"}})
        elif fault in ("500", "400", "401", "404"):
            self.send(handler, int(fault), {"error": {"message": f"fault {fault}"}})
        elif fault == "malformed":
            self.send(handler, 200, b'{"choices": [{"message": {"content": "half')
        elif fault == "drop":
            self.send(handler, 200, self.completion(body), cut=True)
        else:
            full = self.completion(body, fault)
            self.send(handler, 200, full)
            with self.lock:
                self.paid.append({**full["usage"], "key": key})
                self.replays[key] = full

    def upload(self, handler, data):
        head = f"content-type: {handler.headers['content-type']}\r\n\r\n".encode()
        fields = {part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
                  for part in BytesParser().parsebytes(head + data).get_payload()}  # fmt: skip
        assert fields["purpose"] == b"batch"
        with self.lock:
            name = f"file-{len(self.files)}"
            self.files[name] = fields["file"]
        self.send(handler, 200, {"id": name, "purpose": "batch", "bytes": len(fields["file"])})

    def create(self, handler, body):
        batch = {**body, "id": f"batch_{len(self.batches)}", "status": "validating", "errors": None,
                 "output_file_id": None, "error_file_id": None, "looks": 0}  # fmt: skip
        if self.create_fault in ("token_limit_exceeded", "invalid_model"):
            batch |= {"status": "failed", "errors": {"data": [{"code": self.create_fault}]}}
            self.create_fault = None if self.create_fault == "token_limit_exceeded" else self.create_fault
        with self.lock:
            self.batches[batch["id"]] = batch
        if self.create_fault == "lost":
            self.create_fault = None
            self.send(handler, 200, batch, cut=True)
        else:
            self.send(handler, 200, batch)

    def get(self, handler):
        if not self.authorised(handler):
            return
        address, _, query = handler.path.partition("?")
        with self.lock:
            self.calls.append(("GET", address))
        parts = address.removeprefix("/v1/").split("/")
        if parts[0] == "files":
            self.send(handler, 200, self.files[parts[1]])
        elif len(parts) == 2:
            with self.lock:
                self.proceed(self.batches[parts[1]])
                found = json.dumps(self.batches[parts[1]]).encode()
            self.send(handler, 200, found)
        else:  # one a page, newest first, so that paging is tested
            names = list(self.batches)[::-1]
            given = dict(pair.split("=") for pair in query.split("&"))
            start = names.index(given["after"]) + 1 if "after" in given else 0
            page = [self.batches[name] for name in names[start : start + 1]]
            self.send(handler, 200, {"object": "list", "data": page, "has_more": start + 1 < len(names)})

    def proceed(self, batch):
        """A batch goes on whenever it is looked at: in_progress, then its end."""
        batch["looks"] += 1
        if batch["status"] == "validating":
            batch["status"] = "in_progress"
        elif batch["status"] == "in_progress" and self.batch_ends != "never":
            self.work_off(batch)

    def work_off(self, batch):
        done, failed = [], []
        for line in self.files[batch["input_file_id"]].splitlines():
            request = json.loads(line)
            name = request["custom_id"]
            assert request["method"] == "POST"
            assert request["url"] == batch["endpoint"] == "/v1/chat/completions"
            seen = self.line_seen[name] = self.line_seen.get(name, 0) + 1
            fault = self.batch_fault(name, seen) if self.batch_fault else None
            result = {"id": f"batch_req_{name}", "custom_id": name, "response": None, "error": None}
            if fault == "expired":
                failed.append({**result, "error": {"code": "batch_expired", "message": "not within the window"}})
                batch["status"] = "expired"
            elif fault in ("500", "400"):
                body = {"error": {"message": f"fault {fault}"}}
                failed.append({**result, "response": {"status_code": int(fault), "body": body}})
            else:
                full = self.completion(request["body"], fault)
                done.append({**result, "response": {"status_code": 200, "request_id": "r", "body": full}})
                self.paid.append({**full["usage"], "key": name})
        random.Random(0).shuffle(done)
        if batch["status"] != "expired":
            batch["status"] = self.batch_ends
        for field, lines in (("output_file_id", done), ("error_file_id", failed)):
            if lines:
                batch[field] = f"{batch['id']}-{field}"
                self.files[batch[field]] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
