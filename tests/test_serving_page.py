"""The page: its files in memory, then in a real headless browser against a service on loopback.

The browser is whatever `HEDWIG_CHROMIUM` or the path names; Playwright only drives it and downloads none.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import threading
import time
from types import SimpleNamespace

import geopandas
import numpy as np
import pytest
import shapely
import uvicorn
from PIL import Image
from starlette.testclient import TestClient
from test_serving_limits import png
from tests_serving import FakeLocator, FakePrediction, free_port

from hedwig.serving import Limits, create_app
from hedwig.serving.keys import KeyRing, new_key
from hedwig.serving.land import land_geojson

BERGEN = (60.39, 5.32)
FILES = [
    f"page/{n}.js" for n in ("api", "dom", "heat", "lists", "map", "page", "photograph", "strip", "viewer", "words")
]
FILES += ["page/mark.svg", "page/page.css", "page/leaflet/leaflet.js", "page/leaflet/leaflet.css"]
OWN = [name for name in FILES if "leaflet" not in name] + [""]


class Bergen(FakeLocator):
    """Answers with a spread posterior around Bergen; slow for mid-grey, and at a loss for dark pictures."""

    @property
    def cell_places(self):
        return CELLS["lat"].to_numpy(), CELLS["lon"].to_numpy()

    def answer(self, queries, embedded, *, top_k=5, regions=None, posterior_above=None):
        return [self._one(query, top_k) for query in queries]

    def _one(self, query, top_k):
        if 150 < query.mean < 160:
            time.sleep(1.5)
        probs = 0.61 * 0.39 ** np.arange(12)
        lat, lon = CELLS["lat"], CELLS["lon"]
        frames = [{"heading_deg": 36.0 * i, "fov_deg": 90.0, "x0": x, "x1": x + 0.25, "weight": None,
                   "probability": None} for i, x in enumerate(np.arange(10) / 10)]  # fmt: skip
        return FakePrediction(
            pano_id=query.pano_id, lat=BERGEN[0], lon=BERGEN[1], cell_ids=list(range(top_k)),
            cell_probs=probs[:top_k].tolist(), cell_lat=lat[:top_k].tolist(), cell_lon=lon[:top_k].tolist(),
            neighbour_ids=["no-bergen-1", "<img src=x onerror=alert(1)>"], neighbour_scores=[0.83, 0.79],
            neighbour_lat=[60.4, 60.2], neighbour_lon=[5.3, math.nan], radius_km=38.2, radius_50_km=12.0,
            confidence=0.61, localisable=query.mean > 20, entropy_bits=2.13, region_50=[0], region_90=[0, 1, 2],
            frames=frames, posterior={"cell_ids": list(range(12)), "probs": probs.tolist()},
        )  # fmt: skip

    def explain(self, queries, embedded, predictions):
        weights = np.array([5, 1, 1, 1, 1, 1, 1, 1, 1, 7]) / 20
        frames = [
            {**f, "weight": float(w), "probability": 0.25}
            for f, w in zip(predictions[0]["frames"], weights, strict=True)
        ]
        return [FakePrediction({**prediction, "frames": frames}) for prediction in predictions]


def _cells():
    boxes = [shapely.box(5 + x, 60 + y / 2, 6 + x, 60.5 + y / 2) for y in range(3) for x in range(4)]
    columns = {"cell_id": range(12), "country": "NO", "admin1": "Vestland", "num_panoramas": 40, "radius_km": 30.0}
    table = geopandas.GeoDataFrame(columns, geometry=boxes, crs="EPSG:4326")
    return table.assign(lat=[b.centroid.y for b in boxes], lon=[b.centroid.x for b in boxes])


CELLS = _cells()


@pytest.fixture(scope="module")
def app_options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geocells")
    CELLS.to_parquet(folder / "geocells.parquet")
    info = {"model": "fake-1", "num_references": 480, "num_cells": 12, "run_digest": "d1"}
    return {"cells": str(folder), "info": info}


def client_of(**options):
    return TestClient(create_app(FakeLocator(), **options), base_url="http://127.0.0.1:8000")


def test_every_file_is_served_with_type_tag_and_policy():
    client = client_of()
    types = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "": "text/html"}
    for name in [*FILES, ""]:
        answer = client.get(f"/{name}", headers={"Accept-Encoding": "identity"})
        assert answer.status_code == 200, name
        assert answer.headers["content-type"].startswith(types[name.rpartition(".")[2]])
        assert answer.headers["cache-control"] == "no-cache"
        assert "content-encoding" not in answer.headers
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert (
            policy["default-src"]
            == policy["frame-ancestors"]
            == policy["base-uri"]
            == policy["form-action"]
            == "'none'"
        )
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["img-src"] == "'self' data: blob:"
        assert policy.get("font-src", policy["default-src"]) == "'none'"
        tag = answer.headers["etag"]
        again = client.get(f"/{name}", headers={"If-None-Match": tag, "Accept-Encoding": "gzip"})
        assert (again.status_code, again.content) == (304, b"")
        zipped = client.get(f"/{name}", headers={"Accept-Encoding": "gzip"})
        assert zipped.headers["content-encoding"] == "gzip"
        assert zipped.headers["etag"] != tag
        assert zipped.content == answer.content
        assert client.head(f"/{name}").content == b""


def test_nothing_else_is_served():
    client = client_of()
    for name in ("page", "page/", "page/x.js", "page/..%2fapp.py", "page/%2e%2e/app.py", "page//etc/passwd",
                 "page/leaflet", "page/leaflet/leaflet-src.js", "page/page.js/", "page/%00"):  # fmt: skip
        answer = client.get(f"/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), name
    answer = client.post("/page/page.js")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_no_file_names_another_origin_or_makes_markup_of_text():
    client = client_of()
    for name in OWN:
        text = client.get(f"/{name}").text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]", text), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|@import|url\(", text
        ), name
        assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie", text), name
    page = client.get("/").text
    assert not re.search(r"\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)|<style", page)


def test_page_needs_no_key():
    client = client_of(keys=KeyRing([new_key("x")[1]]))
    assert client.get("/v1/info").status_code == 401
    assert [client.get(f"/{name}").status_code for name in [*FILES, ""]] == [200] * (len(FILES) + 1)


def test_outlines_are_compact_and_hold_the_world():
    answer = client_of().get("/page/land.json")
    assert answer.headers["content-type"] == "application/geo+json"
    assert int(answer.headers["content-length"]) < 450_000
    countries = {f["properties"]["country"]: shapely.geometry.shape(f["geometry"]) for f in answer.json()["features"]}
    assert len(countries) > 190
    for code, lat, lon in (("NO", 61.0, 8.0), ("BR", -10.0, -55.0), ("JP", 36.2, 138.0), ("NZ", -43.5, 171.0)):
        assert shapely.contains_xy(countries[code], lon, lat), code
    assert not shapely.contains_xy(countries["NO"], 0.0, 50.0)
    assert land_geojson() is land_geojson()


# In a browser

CHROMIUM = os.environ.get("HEDWIG_CHROMIUM") or shutil.which("chromium")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def picture(grey=120, width=512, height=256):
    ramp = np.linspace(0, 40, width)[None, :, None] + np.linspace(0, 30, height)[:, None, None] + np.zeros(3)
    stream = io.BytesIO()
    Image.fromarray(np.clip(ramp - ramp.mean() + grey, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def upload(data, name="street.jpg", mime="image/jpeg"):
    return {"name": name, "mimeType": mime, "buffer": data}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium: install one or name it in HEDWIG_CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serve(app_options):
    running = []
    land_geojson()  # takes seconds the first time

    def start(**options):
        app = create_app(Bergen(), **{**app_options, **options})
        config = uvicorn.Config(app, host="127.0.0.1", port=free_port(), log_level="error", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        running.append((server, thread))
        return SimpleNamespace(url=f"http://127.0.0.1:{config.port}", app=app)

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def service(serve):
    return serve(limits=Limits(max_body_bytes=200_000, max_pixels=1_000_000))


@pytest.fixture
def visit(browser):
    """Opens pages; at the end: no request left the origin, and no script or policy complained in the console."""
    opened = []

    def open_(url, size=DESKTOP, *, held=None, **options):
        context = browser.new_context(viewport=size, reduced_motion="reduce", **options)
        page = context.new_page()
        page.set_default_timeout(60_000)
        requests, said = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("filechooser", lambda _: None)  # caught from the start, not when the key is already down
        page.on("pageerror", lambda error: said.append(str(error)))
        if held is not None:
            page.route(held, lambda route: page.held.append(route))
            page.held = []
        page.goto(url)
        if held is None:
            page.locator("body[data-loaded=true]").wait_for()
        opened.append((context, url, requests, said))
        return page

    yield open_
    for context, url, requests, said in opened:
        context.close()
        assert not [r for r in requests if not r.startswith((url, "blob:", "data:"))]
        assert not [line for line in said if not line.startswith("Failed to load resource")]


def text_of(locator):
    """As it is read: a space that does not break is a space."""
    return locator.inner_text().replace("\xa0", " ")


def fits(page):
    return page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def seen(page, where):
    """(H, W, 3) int of an element as it is shown."""
    shot = page.locator(where).screenshot()
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def amber(page):
    """Share of the map that has the colour of probability; land, sea and borders are grey."""
    pixels = seen(page, "#map")
    return float((pixels[..., 0] - pixels[..., 2] > 25).mean())


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["1280", "390"])
def test_a_picture_is_located_and_shown(service, visit, size):
    page = visit(service.url, size)
    assert page.locator("#served").inner_text() == "480 reference panoramas in 12 geocells"
    assert fits(page)
    assert amber(page) == 0
    page.locator("#file").set_input_files(upload(picture()))
    page.locator("body[data-state=done]").wait_for()
    sentence = text_of(page.locator("#sentence"))
    assert sentence == "Almost surely in Norway (> 99 %), within 38 km of 60.39° N, 5.32° E."
    assert page.locator("#cells button").count() == 5
    assert "61 %" in text_of(page.locator("#cells button").first)
    assert "Vestland, Norway" in text_of(page.locator("#cells button").first)
    neighbours = page.locator("#neighbours button")
    assert "0.83" in neighbours.nth(0).inner_text()
    assert "<img src=x onerror=alert(1)>" in neighbours.nth(1).inner_text()  # as text
    assert "not told" in neighbours.nth(1).inner_text()
    bars = page.locator("#lanes button")
    assert bars.count() == 10
    assert (
        bars.nth(9).get_attribute("aria-label").startswith("Frame 10 of 10, looking to 324°: 35\xa0% of the decision")
    )
    assert page.locator("#lanes span.bar").count() == 2  # two frames go around the edge
    assert "total" in page.locator("#stages").text_content()
    assert fits(page)
    assert amber(page) > 0.2


def test_an_answer_that_comes_before_the_cells_gets_their_names_later(service, visit):
    page = visit(service.url, held="**/v1/cells*")
    page.locator("#file").set_input_files(upload(picture()))
    page.locator("body[data-state=done]").wait_for()
    assert "Cell 0" in text_of(page.locator("#cells button").first)
    page.held.pop().continue_()
    page.locator("body[data-loaded=true]").wait_for()
    assert "Vestland, Norway" in text_of(page.locator("#cells button").first)
    assert text_of(page.locator("#sentence")).startswith("Almost surely in Norway")
    assert amber(page) > 0.2


def test_heat_map_viewer_and_export(service, visit):
    page = visit(service.url)
    page.locator("#file").set_input_files(upload(picture()))
    page.locator("body[data-state=done]").wait_for()
    page.locator("#show-heat").check()
    assert page.locator(".leaflet-heat-pane img").count() == 1
    page.locator("#show-heat").uncheck()
    assert page.locator(".leaflet-heat-pane img").count() == 0
    page.locator("#viewer-open").click()
    before = seen(page, "#viewer")
    assert 100 < before.mean() < 140  # the picture, whose grey is 120
    page.keyboard.press("ArrowRight")
    assert (seen(page, "#viewer") != before).mean() > 0.1
    assert page.locator("#viewer-words").inner_text().startswith("10° from the picture's centre")
    for name, start in (("geojson", '{"type":"FeatureCollection"'), ("csv", "item,pano_id,role")):
        with page.expect_download() as download:
            page.locator(f"#save-{name}").click()
        assert download.value.suggested_filename == f"hedwig.{name}"
        assert download.value.path().read_text().startswith(start)


def test_keyboard_alone_is_enough(service, visit):
    page = visit(service.url)
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.id") == "file"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(upload(picture()))
    page.locator("body[data-state=done]").wait_for()
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.closest('[id]')?.id"))
    for place in ("lanes", "viewer-open", "map", "show-heat", "cells", "neighbours", "save-csv"):
        assert place in reached, place
    first = page.locator("#cells button").first
    first.focus()
    lit = page.evaluate("() => document.activeElement === document.querySelector('#cells button')")
    assert lit
    page.keyboard.press("Enter")
    assert page.locator("[aria-live=polite]").first.get_attribute("id") == "status"


def test_every_refusal_is_explained(service, visit):
    page = visit(service.url)
    error = page.locator("#error")
    send = page.locator("#file").set_input_files
    send(upload(b"Dear Sir or Madam", "letter.jpg"))
    page.locator("body[data-state=error]").wait_for()
    assert "letter.jpg is not a JPEG, PNG or WebP file." in error.inner_text()
    send(upload(picture() + bytes(300_000)))
    error.get_by_text("The file is too large").wait_for()
    assert "Nothing was sent." in error.inner_text()
    send(upload(picture()[:900]))
    error.get_by_text("The picture is damaged").wait_for()
    assert "bad_image, 422" in error.inner_text()
    assert error.get_by_role("button").inner_text() == "Choose another file"
    send(upload(png(3000, 2000), "huge.png", "image/png"))
    error.get_by_text("The picture has too many pixels").wait_for()
    assert "too_many_pixels, 413" in error.inner_text()
    assert page.locator("#evidence").is_hidden()
    send(upload(picture(10)))
    page.locator("body[data-state=done]").wait_for()
    assert text_of(page.locator("#sentence")).startswith("Too little is seen to place this picture.")
    page.context.set_offline(True)
    page.locator("#options summary").click()
    page.locator("#send").click()
    error.get_by_text("You are offline").wait_for()
    page.context.set_offline(False)
    error.get_by_role("button").click()
    page.locator("body[data-state=done]").wait_for()


def test_busy_counts_down_and_cancel_stops(serve, visit):
    here = serve(limits=Limits(request_timeout_s=0.6, retry_after_s=2))
    page = visit(here.url)
    page.locator("#file").set_input_files(upload(picture(155)))
    page.locator("body[data-state=busy]").wait_for()
    page.locator("#cancel").click()
    page.get_by_text("Cancelled.").wait_for()
    time.sleep(1.6)  # the one thread is still at it
    page.locator("#send").click()
    again = page.locator("#error button")
    again.get_by_text("Try again in").wait_for()
    assert again.is_disabled()
    assert "too_slow, 503" in page.locator("#error").inner_text()
    page.locator("#error button:enabled").wait_for()
    assert again.inner_text() == "Try again"


def test_a_key_is_asked_for_and_kept_in_memory_only(serve, visit):
    text, key = new_key("x")
    page = visit(serve(keys=KeyRing([key])).url)
    box = page.locator("#key-box")
    box.wait_for()
    page.locator("#key").fill("wrong")
    page.locator("#key").press("Enter")
    page.get_by_text("does not know this API key").wait_for()
    page.locator("#key").fill(text)
    page.locator("#key").press("Enter")
    page.get_by_text("480 reference panoramas").wait_for()
    assert box.is_hidden()
    page.locator("#file").set_input_files(upload(picture()))
    page.locator("body[data-state=done]").wait_for()
    assert text not in page.content()
    assert page.evaluate("() => localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_several_photographs_are_one_place(service, visit):
    page = visit(service.url)
    page.locator("#file").set_input_files([upload(picture(width=80, height=80), f"{i}.jpg") for i in range(3)])
    page.locator("body[data-state=ready]").wait_for()
    assert [page.locator(f"#heading-{i}").input_value() for i in range(3)] == ["0", "120", "240"]
    page.locator("#heading-1").fill("90")
    with page.expect_request("**/v1/locate?*") as sent:
        page.locator("#send").click()
    assert sent.value.post_data_json["headings_deg"] == [0, 90, 240]
    page.locator("body[data-state=done]").wait_for()
    assert page.locator("#viewer-open").is_hidden()


def test_a_coarse_answer_is_told_as_coarse(serve, visit):
    page = visit(serve(min_precision_km=100.0).url)
    page.locator("#file").set_input_files(upload(picture()))
    page.locator("body[data-state=done]").wait_for()
    assert page.locator("#cells-title").inner_text() == "Likely areas"
    assert page.locator("#cells button").first.inner_text().startswith("around ")
    assert page.locator("#neighbours-box").is_hidden()
    assert text_of(page.locator("#second")) == "This service tells places only to squares of 100 km."
    assert text_of(page.locator("#sentence")).endswith("within 300 km of 60.8° N, 4.7° E.")
    assert amber(page) > 0.05
