"""A real tiny run behind the routes: the service says what the library says."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient
from test_retrieve_run import NUM_REFERENCES, _geocells, finished_run, picture, png  # noqa: F401 - fixtures

from hedwig.retrieve import Hedwig
from hedwig.serving import create_app

PNG_TYPE = {"Content-Type": "image/png"}


@pytest.fixture
def hedwig(finished_run: Path) -> Hedwig:  # noqa: F811
    return Hedwig.load(str(finished_run))


@pytest.fixture
def client(hedwig: Hedwig) -> TestClient:
    return TestClient(create_app(hedwig, info={"model": "tiny"}), base_url="http://localhost")


def test_the_service_says_what_the_library_says(hedwig: Hedwig, client: TestClient) -> None:
    data = png(picture(3))
    expected = hedwig.locate(data, top_k=3, heading=40.0).to_dict()
    answer = client.post("/v1/locate?top_k=3&heading=40", content=data, headers=PNG_TYPE).json()
    assert {name: answer[name] for name in expected} == expected
    assert answer["neighbour_ids"][0] == "r03"
    assert len(answer["frames"]) == 8
    assert answer["frames"][0]["heading_deg"] == pytest.approx((40 + 180 + 360 * 0.625 / 2 / 2) % 360, abs=1)
    quarters = [np.ascontiguousarray(picture(5, 64, 512)[:, i * 128 : (i + 1) * 128]) for i in range(4)]
    images = [base64.b64encode(png(one)).decode() for one in quarters]
    several = client.post("/v1/locate", json={"images": images}).json()
    assert several["lat"] == hedwig.locate(quarters).lat


def test_a_batch_answers_like_one_by_one_and_a_broken_image_is_alone(client: TestClient) -> None:
    data = [png(picture(i)) for i in range(3)]
    items = [{"image": base64.b64encode(one).decode()} for one in [data[0], data[1], data[2][:200], data[2]]]
    results = client.post("/v1/locate:batch", json={"items": items}).json()["results"]
    assert results[2]["error"]["code"] == "bad_image"
    for i, position in enumerate((0, 1, 3)):
        alone = client.post("/v1/locate", content=data[i], headers=PNG_TYPE).json()
        assert results[position]["neighbour_ids"] == alone["neighbour_ids"]
        assert results[position]["cell_probs"] == pytest.approx(alone["cell_probs"], abs=1e-5)


def test_an_embedding_taken_and_sent_back_finds_the_same(hedwig: Hedwig, client: TestClient) -> None:
    data = png(picture(4))
    embedded = client.post("/v1/embed", content=data, headers=PNG_TYPE).json()
    assert np.linalg.norm(embedded["embedding"]) == pytest.approx(1, abs=1e-5)
    assert embedded["dim"] == hedwig.dim
    body = {"embedding": embedded["embedding"], "text_embedding": embedded["text_embedding"]}
    found = client.post("/v1/neighbours?top_k=5", json=body).json()
    located = client.post("/v1/locate?top_k=5", content=data, headers=PNG_TYPE).json()
    assert found["neighbour_ids"] == [located["neighbour_ids"]]
    assert found["neighbour_scores"][0] == pytest.approx(located["neighbour_scores"], abs=1e-6)
    floats = np.tile(np.array(embedded["embedding"], "<f4"), (20, 1)).tobytes()
    octets = {"Content-Type": "application/octet-stream"}
    without_text = client.post("/v1/neighbours", content=floats, headers=octets).json()
    assert len(without_text["neighbour_ids"]) == 20
    only = client.post("/v1/neighbours?top_k=9", json={**body, "cells": [2, -1]}).json()
    assert {int(name[1:]) % 6 for name in only["neighbour_ids"][0]} == {2}
    assert client.post("/v1/neighbours", json={**body, "cells": [99]}).status_code == 400
    assert NUM_REFERENCES == 12


def test_explained_frames_are_those_that_look_like_the_cell(hedwig: Hedwig, client: TestClient) -> None:
    data = png(picture(6))
    answer = client.post("/v1/locate?explain=true&posterior=true", content=data, headers=PNG_TYPE).json()
    weights = [frame["weight"] for frame in answer["frames"]]
    probs = [frame["probability"] for frame in answer["frames"]]
    assert sum(weights) == pytest.approx(1)
    assert np.argsort(weights).tolist() == np.argsort(probs).tolist()
    # By hand: the geolocator is asked with one frame's own vector in place of the panorama's.
    query = hedwig.query(data)
    each = hedwig.embedder.encoder.encode_each_frame(query.frames[None])[0]
    text = hedwig.embed([query])["text_embedding"]
    logits = hedwig.retriever.encode(each[2:3], text)[1][0].astype(float)
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert probs[2] == pytest.approx(p[answer["cell_id"]], abs=1e-5)
    assert answer["cell_id"] != answer["cell_ids"][0]  # its neighbour is in another cell than the likeliest
    assert sum(answer["posterior"]["probs"]) == pytest.approx(1, abs=1e-3)
    assert answer["posterior"]["cell_ids"][0] == answer["cell_ids"][0]
