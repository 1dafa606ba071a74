"""The three imagery APIs on loopback, written from their public documentation, with faults on demand.

It knows panoramas at given places, serves them as Street View, Mapillary and Panoramax do, and counts every answer that
was sent completely, by what was asked for, so that a test can see what was asked twice and when.
"""

import contextlib
import io
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

KEY, TOKEN = "canary-streetview-key", "canary-mapillary-token"


def jpeg(seed, size=(64, 64)):
    """A small picture that depends on the seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(out, "JPEG")
    return out.getvalue()


class FakeImagery:
    """`places`: id -> (lat, lon); `faults`: called with the number of a request, gives None or the name of a fault."""

    def __init__(self, places, faults=None, page=3, quota=None, slow_s=0.0):
        self.places, self.faults, self.page, self.quota, self.slow_s = places, faults, page, quota, slow_s
        self.answered, self.moments, self.lock = Counter(), [], threading.Lock()
        self.num_requests = self.num_images = 0
        self.seen = []  # every path with its query and headers, to look for keys where none belong
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    fake.answer(self)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler):
        with self.lock:
            self.num_requests += 1
            number = self.num_requests
            self.moments.append(time.monotonic())
            self.seen.append((handler.path, dict(handler.headers)))
        fault = self.faults(number) if self.faults else None
        time.sleep(self.slow_s)
        if fault == "500":
            return self.send(handler, 500, b"oops")
        if fault == "503":
            return self.send(handler, 503, b"busy")
        if fault == "429":
            return self.send(handler, 429, b"slow down", {"Retry-After": "0.2"})
        if fault == "drop":
            handler.close_connection = True
            return handler.connection.close()
        status, body = self.route(handler.path, handler.headers)
        if fault == "truncate":
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body[: len(body) // 2])
            handler.close_connection = True
            return handler.connection.close()
        self.send(handler, status, body)
        parts = urlsplit(handler.path)
        query = "&".join(p for p in parts.query.split("&") if not p.startswith(("key=", "signature=", "at=")))
        with self.lock:
            self.answered[f"{parts.path}?{query}" if status == 200 else f"{status} {parts.path}?{query}"] += 1
        return None

    def send(self, handler, status, body, headers=None):
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def route(self, path, headers):
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        steps = parts.path.strip("/").split("/")
        if steps[0] == "streetview":
            return self.streetview(steps[1:], query)
        if steps[0] == "mapillary":
            return self.mapillary(steps[1:], query, headers)
        if steps[0] == "stac":
            return self.panoramax(steps[1:], query)
        if steps[0] == "storage":  # signed addresses on another host: they must never be sent a token
            return 200, jpeg(sum(steps[1].encode()), (128, 64))
        return 404, b"nothing"

    def spend(self):
        with self.lock:
            if self.quota is not None and self.num_images >= self.quota:
                return False
            self.num_images += 1
            return True

    def streetview(self, steps, query):
        if query.get("key") != KEY:
            return (200, json.dumps({"status": "REQUEST_DENIED", "error_message": "bad key"}).encode())
        if steps == ["metadata"]:
            lat, lon = map(float, query["location"].split(","))
            near = [(abs(a - lat) + abs(b - lon), name) for name, (a, b) in self.places.items()]
            distance, name = min(near)
            if distance * 111_000 > float(query["radius"]):
                return 200, b'{"status": "ZERO_RESULTS"}'
            place = {"lat": self.places[name][0], "lng": self.places[name][1]}
            found = {"status": "OK", "pano_id": name, "location": place, "date": "2021-07", "copyright": "© Google"}
            return 200, json.dumps(found).encode()
        if not self.spend():
            return 403, b"You have exceeded your daily request quota for this API."
        if query["pano"] not in self.places:
            return 404, b"no image"
        return 200, jpeg(int(float(query["heading"])), (64, 64))

    def mapillary(self, steps, query, headers):
        if headers.get("Authorization") != f"OAuth {TOKEN}":
            return 401, json.dumps({"error": {"message": "Invalid OAuth token", "code": 190}}).encode()
        if steps == ["images"]:
            west, south, east, north = map(float, query["bbox"].split(","))
            inside = [n for n, (a, b) in sorted(self.places.items()) if south <= a <= north and west <= b <= east]
            start = int(query.get("after", 0))
            some = inside[start : start + self.page]
            data = [
                {
                    "id": n, "is_pano": True, "captured_at": 1_600_000_000_000, "computed_compass_angle": 370.0,
                    "sequence": "ride", "creator": {"username": "ann"},
                    "computed_geometry": {"type": "Point", "coordinates": [self.places[n][1], self.places[n][0]]},
                }
                for n in some
            ]  # fmt: skip
            page = {"data": data, "paging": {}}
            if start + self.page < len(inside):
                page["paging"]["next"] = f"{self.url}/mapillary/images?bbox={query['bbox']}&after={start + self.page}"
            return 200, json.dumps(page).encode()
        if steps[0] not in self.places:
            return 404, b'{"error": {"message": "unknown", "code": 100}}'
        address = self.url.replace("127.0.0.1", "localhost") + f"/storage/{steps[0]}?at={time.time()}"
        return 200, json.dumps({"id": steps[0], "thumb_2048_url": address}).encode()

    def panoramax(self, steps, query):
        def item(name):
            lat, lon = self.places[name]
            return {
                "id": name, "collection": "ride", "geometry": {"type": "Point", "coordinates": [lon, lat]},
                "properties": {
                    "datetime": "2023-05-01T10:00:00Z", "view:azimuth": 90, "license": "CC-BY-SA-4.0",
                    "pers:interior_orientation": {"field_of_view": 360}, "geovisio:producer": "bob",
                },
                "assets": {"sd": {"href": f"{self.url}/storage/{name}"}},
            }  # fmt: skip

        if steps == ["search"]:
            west, south, east, north = map(float, query["bbox"].split(","))
            inside = [n for n, (a, b) in sorted(self.places.items()) if south <= a <= north and west <= b <= east]
            start = int(query.get("page", 0))
            links = [{"rel": "self", "href": "x"}]
            if start + self.page < len(inside):
                following = f"{self.url}/stac/search?bbox={query['bbox']}&page={start + self.page}"
                links.append({"rel": "next", "href": following})
            features = [item(n) for n in inside[start : start + self.page]]
            return 200, json.dumps({"type": "FeatureCollection", "features": features, "links": links}).encode()
        if len(steps) == 4 and steps[3] in self.places:
            return 200, json.dumps(item(steps[3])).encode()
        return 404, b"{}"
