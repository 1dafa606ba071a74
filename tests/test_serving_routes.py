"""Every route in memory: several photographs, batches, embeddings, neighbours, cells, exports, metrics, OpenAPI."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import math
import re

import geopandas as gpd
import jsonschema
import numpy as np
import pytest
import shapely
from prometheus_client.parser import text_string_to_metric_families
from test_serving_app import JPEG_TYPE, client_of, error_of, jpeg
from tests_serving import FakeLocator

from hedwig.panorama import decode_image
from hedwig.serving import Limits, Release
from hedwig.serving.limits import REFUSALS

JSON_TYPE = {"Content-Type": "application/json"}
FLOATS_TYPE = {"Content-Type": "application/octet-stream"}
INFO = {"model": "fake-1", "run_digest": "d1"}


def b64(data):
    return base64.b64encode(data).decode()


def validate(client, answer, name):
    """An answer against the schema that the service publishes."""
    document = client.get("/openapi.json").json()
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(answer)


def test_several_photographs_are_one_place():
    locator = FakeLocator()
    client = client_of(locator, info=INFO)
    data = [jpeg(1), jpeg(2, 64, 64), jpeg(3)]
    body = {"images": [b64(one) for one in data], "headings_deg": [0, 120, 240.5]}
    answer = client.post("/v1/locate", json=body).json()
    validate(client, answer, "LocateAnswer")
    assert answer["lat"] == pytest.approx(np.mean([decode_image(one).mean() for one in data]) / 3, rel=1e-5)
    ((size, heading, bearings),) = locator.queries
    assert (size, math.isnan(heading), bearings) == (3, True, (0.0, 120.0, 240.5))
    one = client.post("/v1/locate?top_k=2", json={"image": b64(data[0]), "heading": 12.5})
    raw = client.post("/v1/locate?top_k=2&heading=12.5", content=data[0], headers=JPEG_TYPE)
    assert {**one.json(), "timings_ms": 0} == {**raw.json(), "timings_ms": 0}
    assert locator.queries[1] == locator.queries[2] == ((48, 96, 3), 12.5, None)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "the body"),
        (b"{}", "image or images is needed"),
        (b'{"image": "AAAA", "images": ["AAAA"]}', "not both"),
        (b'{"image": "/etc/passwd!"}', "not base64"),
        (b'{"image": "AAAA", "url": "http://169.254.169.254/"}', "url"),
        (b'{"image": "AAAA", "heading": NaN}', "not JSON"),
        (b'{"image": "AAAA", "heading": 1e9}', "heading"),
        (b'{"image": "AAAA", "headings_deg": [1]}', "goes with images"),
        (b'{"images": ["AAAA", "AAAA"], "headings_deg": [1]}', "2 entries"),
        (b'{"images": []}', "images"),
        (b'{"images": [' + b", ".join([b'"AAAA"'] * 33) + b"]}", "33 entries"),
    ],
)
def test_bad_json_is_refused_without_being_repeated(body, text):
    client = client_of()
    response = error_of(client.post("/v1/locate", content=body, headers=JSON_TYPE), 400, "bad_body")
    assert text in response.json()["error"]["message"]
    assert "169.254" not in response.text
    error_of(client.post("/v1/locate", json={"image": b64(b"Dear Sir")}), 415, "not_an_image")
    error_of(client.post("/v1/locate?heading=3", json={"image": b64(jpeg())}), 400, "bad_parameter")


def test_the_byte_limit_counts_the_json():
    client = client_of(limits=Limits(max_body_bytes=1000))
    error_of(client.post("/v1/locate", json={"image": "A" * 1000}), 413, "body_too_large")
    error_of(client.post("/v1/locate:batch", json={"items": [{"image": "A" * 1000}]}), 413, "body_too_large")


def test_a_batch_keeps_its_order_and_one_bad_image_spoils_nothing():
    locator = FakeLocator()
    client = client_of(locator, info=INFO)
    good = [jpeg(seed) for seed in range(4)]
    items = [{"image": b64(good[0])}, {"image": b64(b"Dear Sir")}, {"image": b64(good[1]), "heading": 7}]
    items += [{"images": [b64(good[2]), b64(good[3])]}, {"image": b64(good[0][:-40])}]
    response = client.post("/v1/locate:batch?top_k=2", json={"items": items})
    assert response.status_code == 200
    answer = response.json()
    validate(client, answer, "BatchAnswer")
    results = answer["results"]
    assert [one.get("error", {}).get("code") for one in results] == [None, "not_an_image", None, None, "bad_image"]
    assert (answer["num_failed"], answer["run_digest"]) == (2, "d1")
    assert locator.answered == [(3, 2)]  # one search
    for position, data in ((0, good[0]), (2, good[1])):
        alone = client.post("/v1/locate?top_k=2", content=data, headers=JPEG_TYPE).json()
        assert results[position] == {name: alone[name] for name in results[position]}


def test_what_the_search_refuses_is_found_one_by_one():
    locator = FakeLocator()
    white = io.BytesIO()
    from PIL import Image

    Image.new("RGB", (8, 8), (255, 255, 255)).save(white, "PNG")
    items = [{"image": b64(jpeg(0))}, {"image": b64(white.getvalue())}, {"image": b64(jpeg(1))}]
    results = client_of(locator).post("/v1/locate:batch", json={"items": items}).json()["results"]
    assert [one.get("error", {}).get("message") for one in results] == [None, "Too bright.", None]
    assert [size for size, _ in locator.answered] == [3, 1, 1, 1]


def test_batches_are_bounded():
    client = client_of(limits=Limits(max_batch=2))
    error_of(client.post("/v1/locate:batch", json={"items": [{"image": "AAAA"}] * 3}), 400, "bad_body")
    error_of(client.post("/v1/locate:batch", json={"items": []}), 400, "bad_body")
    error_of(client.post("/v1/locate:batch", content=jpeg(), headers=JPEG_TYPE), 415, "unsupported_type")
    assert client.post("/v1/locate:batch", json={"items": [{"image": "AAAA"}] * 2}).json()["num_failed"] == 2


def test_explanation_and_posterior_only_when_asked():
    client = client_of()
    plain = client.post("/v1/locate", content=jpeg(), headers=JPEG_TYPE).json()
    assert plain["posterior"] is None
    assert "weight" not in plain["frames"][0]
    full = client.post("/v1/locate?explain=true&posterior=1", content=jpeg(), headers=JPEG_TYPE).json()
    validate(client, full, "LocateAnswer")
    assert full["posterior"] == {"cell_ids": [0, 1], "probs": [0.75, 0.25]}
    assert full["frames"][0]["weight"] == 1.0
    assert "explain" in full["timings_ms"]
    assert full["region_90"] == [0, 1]


def test_geojson_and_csv_hold_the_answer():
    client = client_of()
    plain = client.post("/v1/locate?top_k=2", content=jpeg(), headers=JPEG_TYPE).json()
    response = client.post("/v1/locate?top_k=2&format=geojson", content=jpeg(), headers=JPEG_TYPE)
    assert response.headers["content-type"] == "application/geo+json"
    table = gpd.GeoDataFrame.from_features(response.json(), crs="EPSG:4326")
    assert table["role"].tolist() == ["answer", "neighbour", "cell", "cell"]
    assert (table.geometry[0].y, table.geometry[0].x) == (plain["lat"], plain["lon"])
    assert table.geometry[1] is None  # its longitude is not known
    assert table["probability"].tolist()[2:] == plain["cell_probs"]

    response = client.post("/v1/locate?top_k=2&format=csv", content=jpeg(), headers=JPEG_TYPE)
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(response.text)))
    assert [(row["role"], row["rank"], row["id"]) for row in rows] == [
        ("answer", "1", ""),
        ("cell", "1", "0"),
        ("cell", "2", "1"),
        ("neighbour", "1", "a"),
    ]
    assert (float(rows[0]["lat"]), float(rows[0]["value"]), rows[0]["radius_km"]) == (plain["lat"], 0.5, "")
    assert (float(rows[1]["lat"]), float(rows[1]["value"])) == (10.0, 0.5)

    items = {"items": [{"image": b64(jpeg())}, {"image": "AAAA"}]}
    rows = list(csv.DictReader(io.StringIO(client.post("/v1/locate:batch?format=csv", json=items).text)))
    assert [(row["item"], row["role"]) for row in rows if row["role"] in ("answer", "error")] == [
        ("0", "answer"),
        ("1", "error"),
    ]
    features = client.post("/v1/locate:batch?format=geojson", json=items).json()["features"]
    assert features[-1]["properties"] | {"message": 0, "next": 0} == {
        "role": "error", "code": "not_an_image", "item": 1, "message": 0, "next": 0,
    }  # fmt: skip


def test_an_embedding_finds_the_neighbours_of_its_image():
    locator = FakeLocator()
    client = client_of(locator, info=INFO)
    found = client.post("/v1/embed", content=jpeg(), headers=JPEG_TYPE).json()
    validate(client, found, "EmbedAnswer")
    assert (found["dim"], len(found["embedding"]), found["text_embedding"]) == (4, 4, None)
    by_image = client.post("/v1/neighbours?top_k=2", content=jpeg(), headers=JPEG_TYPE).json()
    validate(client, by_image, "NeighboursAnswer")
    by_vector = client.post("/v1/neighbours?top_k=2", json={"embedding": found["embedding"]}).json()
    assert {**by_image, "timings_ms": 0} == {**by_vector, "timings_ms": 0}
    assert by_vector["neighbour_ids"] == [["a", "b"]]
    assert by_vector["neighbour_scores"][0][0] == pytest.approx(decode_image(jpeg()).mean(), rel=1e-6)


def test_many_embeddings_in_every_form_are_the_same():
    locator = FakeLocator()
    client = client_of(locator)
    vectors = np.random.default_rng(0).normal(size=(20, 4)).astype("<f4")
    answers = [
        client.post("/v1/neighbours?top_k=1", json={"embeddings": vectors.tolist()}),
        client.post("/v1/neighbours?top_k=1", json={"embeddings": b64(vectors.tobytes())}),
        client.post("/v1/neighbours?top_k=1", content=vectors.tobytes(), headers=FLOATS_TYPE),
    ]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert [row[0] for row in answers[0].json()["neighbour_scores"]] == vectors[:, 0].tolist()
    for answer, (seen, top_k, cells) in zip(answers, locator.searched, strict=True):
        np.testing.assert_array_equal(seen, vectors)
        assert (top_k, cells) == (1, None)
        assert {**answer.json(), "timings_ms": 0} == {**answers[0].json(), "timings_ms": 0}
    client.post("/v1/neighbours", json={"embedding": [1, 0, 0, 0], "cells": [2, -1]})
    assert locator.searched[-1][2].tolist() == [[2, -1]]


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {"embedding": [1.0, 2.0]},
        {"embedding": [1, 2, 3, "4"]},
        {"embedding": [[1, 2, 3, 4]]},
        {"embedding": [1e39, 0, 0, 0]},
        {"embedding": [True, False, True, False]},
        {"embedding": [1, 0, 0, 0], "embeddings": [[1, 0, 0, 0]]},
        {"embedding": [1, 0, 0, 0], "text_embeddings": [[1]]},
        {"embedding": [1, 0, 0, 0], "cells": [0.5]},
        {"embedding": [1, 0, 0, 0], "cells": [3]},
        {"embeddings": [[1, 0, 0, 0]], "cells": [[1], [2]]},
        {"embeddings": [[1, 0, 0, 0], [1]]},
        {"embeddings": []},
        {"embeddings": "AAAA"},
        {"embeddings": "!!!!"},
        {"embeddings": [[1, 0, 0, 0]] * 11},
        {"vector": [1, 0, 0, 0]},
    ],
)
def test_bad_embeddings_are_refused(body):
    client = client_of(limits=Limits(max_vectors=10))
    error_of(client.post("/v1/neighbours", json=body), 400, "bad_body")


def test_bad_numbers_are_refused():
    client = client_of()
    for content in (b"", b"12345", np.array([np.nan, 0, 0, 0], "<f4").tobytes()):
        response = client.post("/v1/neighbours", content=content, headers=FLOATS_TYPE)
        assert response.json()["error"]["code"] in ("empty_body", "bad_body")
        assert response.status_code == 400


@pytest.fixture
def cells_folder(tmp_path):
    """Four cells around a common point, with a wavy common border, and one island below any tolerance."""
    x = np.linspace(0, 1, 200)
    wave = np.stack([x, 0.01 * np.sin(60 * x)], axis=1)
    top = shapely.Polygon([*wave.tolist(), (1, 1), (0, 1)])
    bottom = shapely.Polygon([*wave.tolist(), (1, -1), (0, -1)])
    island = shapely.Point(5, 5).buffer(0.001)
    table = gpd.GeoDataFrame(
        {
            "cell_id": np.arange(3, dtype=np.int32),
            "geometry": [top, bottom, island],
            "lat": [0.5, -0.5, 5.0],
            "lon": [0.5, 0.5, 5.0],
            "num_panoramas": [3, 4, 5],
            "radius_km": [10.0, math.nan, 1.0],
            "country": ["NO", "NO", ""],
            "admin1": ["x", "y", ""],
            "parent": ["NO", "NO", ""],
        },
        crs="EPSG:4326",
    )
    table.to_parquet(tmp_path / "geocells.parquet")
    return tmp_path


def test_cells_are_geojson_with_a_tag(cells_folder):
    client = client_of(cells=str(cells_folder))
    response = client.get("/v1/cells?tolerance_deg=0", headers={"Accept-Encoding": "identity"})
    answer = response.json()
    validate(client, answer, "CellsAnswer")
    assert [feature["id"] for feature in answer["features"]] == [0, 1, 2]
    assert answer["features"][1]["properties"] == {
        "cell_id": 1, "country": "NO", "admin1": "y", "num_panoramas": 4, "radius_km": None, "lat": -0.5, "lon": 0.5,
    }  # fmt: skip
    simple = client.get("/v1/cells?tolerance_deg=0.1", headers={"Accept-Encoding": "gzip;q=0"})
    assert len(simple.content) < len(response.content) / 3
    shapes = gpd.GeoDataFrame.from_features(simple.json()).geometry
    assert shapes.is_valid.all()
    assert not shapes.is_empty.any()
    assert shapely.area(shapely.intersection(shapes[0], shapes[1])) == 0
    assert shapely.area(shapely.union(shapes[0], shapes[1])) == pytest.approx(2.0, abs=0.02)  # and no gap

    tag = simple.headers["etag"]
    assert simple.headers["vary"] == "Accept-Encoding"
    for header in (tag, f'"other", W/{tag}', "*"):
        again = client.get("/v1/cells?tolerance_deg=0.1", headers={"If-None-Match": header})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/v1/cells?tolerance_deg=0", headers={"If-None-Match": tag}).status_code == 200


def test_cells_are_compressed_where_that_is_understood(cells_folder):
    client = client_of(cells=str(cells_folder))
    plain = client.get("/v1/cells", headers={"Accept-Encoding": "br"})
    assert "content-encoding" not in plain.headers
    with client.stream("GET", "/v1/cells", headers={"Accept-Encoding": "br, gzip"}) as zipped:
        raw = b"".join(zipped.iter_raw())
    assert zipped.headers["content-encoding"] == "gzip"
    assert gzip.decompress(raw) == plain.content
    assert zipped.headers["etag"] != plain.headers["etag"]
    assert client.get("/v1/cells", headers={"If-None-Match": zipped.headers["etag"]}).status_code == 304


def test_no_cells_and_bad_tolerances(cells_folder):
    error_of(client_of().get("/v1/cells"), 404, "no_cells")
    for value in ("-1", "2", "nan", "x"):
        error_of(client_of(cells=str(cells_folder)).get(f"/v1/cells?tolerance_deg={value}"), 400, "bad_parameter")


def test_another_release_is_served_at_once_and_whole(cells_folder, tmp_path):
    client = client_of(FakeLocator("old"), info=INFO, cells=str(cells_folder))
    assert client.get("/v1/cells").status_code == 200
    client.app.state.service.release = Release(FakeLocator("new"), {"model": "fake-2", "run_digest": "d2"}, None)
    answer = client.post("/v1/locate", content=jpeg(), headers=JPEG_TYPE).json()
    assert (answer["pano_id"][:3], answer["model"], answer["run_digest"]) == ("new", "fake-2", "d2")
    assert client.get("/v1/info").json()["run_digest"] == "d2"
    error_of(client.get("/v1/cells"), 404, "no_cells")
    assert 'run_digest="d2"' in client.get("/metrics").text
    assert 'run_digest="d1"' not in client.get("/metrics").text


def samples(client):
    families = text_string_to_metric_families(client.get("/metrics").text)
    found = {}
    for sample in (one for family in families for one in family.samples):
        labels = {name: value for name, value in sample.labels.items() if name not in ("replica", "method")}
        found[sample.name, *sorted(labels.values())] = sample.value
    return found


def test_metrics_count_what_was_done():
    client = client_of(info=INFO)
    for _ in range(2):
        client.post("/v1/locate", content=jpeg(), headers=JPEG_TYPE)
    client.post("/v1/locate", content=b"", headers=JPEG_TYPE)
    client.post("/v1/locate:batch", json={"items": [{"image": b64(jpeg())}] * 3})
    for i in range(50):
        client.get(f"/guessed/{i}")
    found = samples(client)
    assert found["hedwig_requests_total", "/v1/locate", "200"] == 2
    assert found["hedwig_requests_total", "/v1/locate", "400"] == 1
    assert found["hedwig_requests_total", "404", "other"] == 50
    assert found["hedwig_request_seconds_count", "/v1/locate"] == 3
    for stage in ("wait", "read", "decode", "encode", "search"):
        assert found["hedwig_stage_seconds_count", stage] == 3
    assert found["hedwig_batch_size_sum", "/v1/locate:batch"] == 3
    assert found["hedwig_cell_entropy_bits_count",] == 5
    assert found["hedwig_cell_entropy_bits_sum",] == 7.5
    assert (found["hedwig_queue_depth", "waiting"], found["hedwig_queue_depth", "ongoing"]) == (0, 0)
    assert "guessed" not in client.get("/metrics").text


def test_openapi_shows_an_example_of_every_route_and_error():
    client = client_of()
    document = client.get("/openapi.json").json()
    routes = {(path, method): route for path, item in document["paths"].items() for method, route in item.items()}
    assert set(routes) == {
        ("/v1/locate", "post"), ("/v1/locate:batch", "post"), ("/v1/embed", "post"), ("/v1/neighbours", "post"),
        ("/v1/cells", "get"), ("/v1/info", "get"), ("/healthz", "get"), ("/readyz", "get"), ("/metrics", "get"),
    }  # fmt: skip
    schemas = document["components"]["schemas"]
    shown = set()
    for name, route in routes.items():
        assert route["summary"], name
        for status, response in route["responses"].items():
            for example in (e for c in response.get("content", {}).values() for e in c.get("examples", {}).values()):
                code = example["value"]["error"]["code"]
                assert REFUSALS[code][0] == int(status)
                shown.add(code)
        bodies = [c["schema"] for c in route.get("requestBody", {}).get("content", {}).values()]
        good = [c.get("schema", {}) for c in route["responses"]["200"].get("content", {}).values()]
        for reference in (s["$ref"].rsplit("/", 1)[1] for s in bodies + good if "$ref" in s):
            example = schemas[reference]["example"]
            jsonschema.Draft202012Validator({**schemas[reference], "components": document["components"]}).validate(
                example
            )
    assert shown == set(REFUSALS) - {"not_found", "wrong_method"}
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert references <= set(schemas)


def test_a_precision_floor_coarsens_every_form_and_withholds_vectors():
    client = client_of(min_precision_km=100.0)
    plain = client_of().post("/v1/locate?top_k=3", content=jpeg(), headers=JPEG_TYPE).json()
    for form in ("json", "geojson", "csv"):
        query = f"?top_k=3&explain=true&posterior=true&format={form}"
        response = client.post(f"/v1/locate{query}", content=jpeg(), headers=JPEG_TYPE)
        assert response.status_code == 200
        assert "fake-" not in response.text
        assert str(plain["lat"])[:6] not in response.text
    answer = client.post("/v1/locate?top_k=3", content=jpeg(), headers=JPEG_TYPE).json()
    validate(client, answer, "LocateAnswer")
    assert answer["precision_km"] == 100.0
    assert [area["prob"] for area in answer["areas"]] == [0.75, 0.25]
    batch = client.post("/v1/locate:batch", json={"items": [{"image": b64(jpeg())}]}).json()
    validate(client, batch, "BatchAnswer")
    assert batch["results"][0]["lat"] == answer["lat"]
    error_of(client.post("/v1/embed", content=jpeg(), headers=JPEG_TYPE), 403, "withheld")
    error_of(client.post("/v1/neighbours", json={"embedding": [1, 0, 0, 0]}), 403, "withheld")
