"""`hedwig locate` against a service in memory: what it sends, what it writes, where it goes on."""

from __future__ import annotations

import csv
import io
import json

import httpx
import pytest
from test_serving_app import jpeg
from tests_serving import FakeLocator
from typer.testing import CliRunner

from hedwig.cli import app
from hedwig.serving import Client, create_app


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for seed in range(3):
        (folder / f"{seed}.jpg").write_bytes(jpeg(seed))
    (folder / "deeper" / "3.JPG").write_bytes(jpeg(3))
    (folder / "broken.jpg").write_bytes(jpeg()[:-40])
    (folder / "notes.txt").write_text("none")
    return folder


@pytest.fixture
def sent(monkeypatch):
    """The bodies that reach a service in memory."""
    bodies = []

    class Counted(httpx.AsyncBaseTransport):
        def __init__(self):  # one application for each event loop
            self.transport = httpx.ASGITransport(create_app(FakeLocator()))

        async def handle_async_request(self, request):
            bodies.append(await request.aread())
            return await self.transport.handle_async_request(request)

    class InMemory(Client):
        def __init__(self, url):
            super().__init__(url, transport=Counted())

    monkeypatch.setattr("hedwig.serving.client.Client", InMemory)
    return bodies


def run(*arguments):
    return CliRunner().invoke(app, ["locate", *map(str, arguments), "--quiet"])


def test_lines_are_kept_and_only_what_is_missing_is_sent_again(images, sent, tmp_path):
    out = tmp_path / "answers.jsonl"
    done = run(images, "--out", out, "--top-k", 2)
    assert done.exit_code == 3
    assert "1 of 5 images" in done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["image"].rsplit("/", 1)[1] for r in records} == {"0.jpg", "1.jpg", "2.jpg", "3.JPG", "broken.jpg"}
    assert [len(r["cell_ids"]) for r in records if "error" not in r] == [2] * 4
    assert len(sent) == 5

    lines = out.read_text().splitlines(keepends=True)
    good = [line for line in lines if "error" not in json.loads(line)]
    out.write_text("".join(good[:3]) + good[3][:50])  # killed while it wrote the fourth
    sent.clear()
    done = run(images, "--out", out, "--top-k", 2)
    assert len(sent) == 2  # the fourth and the broken one
    assert "Resumed: 3 of 5" in done.stderr
    answered = [r["image"] for r in map(json.loads, out.read_text().splitlines()) if "error" not in r]
    assert len(answered) == len(set(answered)) == 4


def test_csv_and_geojson_name_the_images_in_their_order(images, sent, tmp_path):
    out = tmp_path / "answers.csv"
    assert run(images / "2.jpg", images / "0.jpg", "--out", out).exit_code == 0
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["item"] for row in rows if row["role"] == "answer"] == [str(images / "2.jpg"), str(images / "0.jpg")]
    done = run(images / "1.jpg", images / "broken.jpg", "--format", "geojson")
    assert done.exit_code == 3
    features = json.loads(done.stdout)["features"]
    assert features[0]["properties"]["item"] == str(images / "1.jpg")
    assert (features[-1]["properties"]["role"], features[-1]["geometry"]) == ("error", None)


def test_no_images_and_no_service(tmp_path, sent, monkeypatch):
    assert "no .jpg, .png or .webp" in run(tmp_path).stderr
    missing = run(tmp_path / "gone.jpg")
    assert missing.exit_code == 3
    assert "gone.jpg" in missing.stderr

    class Lost(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            raise httpx.ConnectError("nobody there")

    (tmp_path / "a.jpg").write_bytes(jpeg())
    monkeypatch.setattr("hedwig.serving.client.Client", lambda url: Client(url, transport=Lost(), num_retries=0))
    done = run(tmp_path / "a.jpg")
    assert done.exit_code == 1
    assert "nobody there" in done.stderr
