"""The sources against loopback servers that speak their protocols, with every fault that a network has."""

import asyncio
import hashlib
import json
import time

import numpy as np
import pytest
from fake_imagery import KEY, TOKEN, FakeImagery

from hedwig.acquisition.fetching import Fetcher, Finder, image_name, image_source
from hedwig.acquisition.offers import Offer, box_around
from hedwig.acquisition.streetview import signature
from hedwig.answers import AnswerStore
from hedwig.geo import haversine_km
from hedwig.web import Politeness, WebClient

PLACES = {f"p{i}": (10.0 + i * 1e-5, 20.0) for i in range(8)} | {"far": (10.1, 20.0)}
PREFIX = {"streetview": "/streetview", "mapillary": "/mapillary", "panoramax": "/stac"}


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    monkeypatch.setenv("HEDWIG_STREETVIEW_KEY", KEY)
    monkeypatch.setenv("HEDWIG_MAPILLARY_TOKEN", TOKEN)
    monkeypatch.delenv("HEDWIG_STREETVIEW_SECRET", raising=False)


@pytest.fixture
def fake(request):
    made = []

    def make(**options):
        made.append(FakeImagery(PLACES, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def asking(fake, source, folder, **options):
    base = {"source": source, "options": {"base_url": fake.url + PREFIX[source]}, "folder": str(folder)}
    return {**base, "per_second": 500.0, "concurrency": 4, "max_attempts": 4, **options}


def batch_of(*points):
    return {"lat": np.array([p[0] for p in points]), "lon": np.array([p[1] for p in points])}


def offers_of(result):
    return [json.loads(text) for text in result["offers"]]


def fetched(stage, offers):
    texts = np.empty(len(offers), dtype=object)
    texts[:] = [json.dumps(offer) for offer in offers]
    return stage({"offer": texts})


@pytest.mark.parametrize("source", ["mapillary", "panoramax"])
def test_all_pages_are_read_and_offers_come_nearest_first(source, fake, tmp_path):
    server = fake(page=3)
    found = Finder(**asking(server, source, tmp_path), radius_m=50)(batch_of((10.0, 20.0)))
    assert found["failure"].tolist() == [None]
    (offers,) = offers_of(found)
    inside = [n for n, (a, b) in PLACES.items() if haversine_km(10.0, 20.0, a, b) <= 0.05]
    assert [o["pano_id"] for o in offers] == [f"{source}:{name}" for name in inside]
    assert len(inside) > 3  # more than one page
    assert {o["projection"] for o in offers} == {"equirectangular"}
    assert {o["heading"] for o in offers} == ({10.0} if source == "mapillary" else {90.0})


def test_streetview_offers_the_nearest_panorama_and_nothing_where_none_is(fake, tmp_path):
    found = Finder(**asking(fake(), "streetview", tmp_path), radius_m=50)(batch_of((10.00002, 20.0), (50.0, 50.0)))
    near, none = offers_of(found)
    assert [o["pano_id"] for o in near] == ["streetview:p2"]
    assert near[0]["bearings_deg"] == [0, 45, 90, 135, 180, 225, 270, 315]
    assert near[0]["captured_at"] == "2021-07"
    assert none == []


@pytest.mark.parametrize("source", ["streetview", "mapillary", "panoramax"])
def test_what_was_answered_is_never_asked_again(source, fake, tmp_path):
    server = fake()
    options = asking(server, source, tmp_path)
    for _ in range(2):
        offers = offers_of(Finder(**options, radius_m=50)(batch_of((10.0, 20.0))))[0][:2]
        result = fetched(Fetcher(**options), offers)
        assert result["failure"].tolist() == [None] * len(offers)
    assert max(server.answered.values()) == 1
    for uris, digests in zip(result["image_uris"], result["sha256s"], strict=True):
        for uri, digest in zip(uris, digests, strict=True):
            assert hashlib.sha256((tmp_path / uri).read_bytes()).hexdigest() == digest
    assert AnswerStore(str(tmp_path / "answers")).total()["num_images"] == sum(map(len, result["image_uris"]))


@pytest.mark.parametrize("source", ["streetview", "mapillary", "panoramax"])
def test_faults_are_survived_and_give_the_same_bytes(source, fake, tmp_path):
    kinds = ["500", None, "truncate", None, "429", None, "drop", None, "503", None]
    calm, wild = fake(), fake(faults=lambda number: kinds[number % len(kinds)])
    results = []
    for server, folder in ((calm, tmp_path / "calm"), (wild, tmp_path / "wild")):
        options = asking(server, source, folder, max_attempts=6)
        finder, fetcher = Finder(**options, radius_m=50), Fetcher(**options)
        for stage in (finder, fetcher):
            stage._politeness.first_wait_s = 0.01
        found = finder(batch_of((10.0, 20.0)))
        assert found["failure"].tolist() == [None]
        results.append(fetched(fetcher, offers_of(found)[0][:3]))
    assert results[1]["failure"].tolist() == [None] * len(results[1]["failure"])
    assert [list(x) for x in results[0]["sha256s"]] == [list(x) for x in results[1]["sha256s"]]
    assert wild.num_requests > calm.num_requests
    assert max(count for what, count in wild.answered.items() if not what[0].isdigit()) == 1


def test_a_spent_quota_stops_all_requests_and_the_next_run_goes_on(fake, tmp_path):
    server = fake(quota=10)
    options = asking(server, "streetview", tmp_path, concurrency=1)
    offers = [
        {**offers_of(Finder(**options, radius_m=50)(batch_of(PLACES[name])))[0][0]} for name in ("p0", "p1", "p2", "p3")
    ]
    first = fetched(Fetcher(**options), offers)
    assert first["failure"][0] is None
    assert all("quota spent" in reason and KEY not in reason for reason in first["failure"][1:])
    refused = sum(count for what, count in server.answered.items() if what.startswith("403"))
    assert refused == 1  # with one request under way, the first refusal is the last request
    server.quota = None
    second = fetched(Fetcher(**options), offers)
    assert second["failure"].tolist() == [None] * 4
    assert server.num_images == 32  # 4 panoramas of 8 bearings, none paid twice
    assert AnswerStore(str(tmp_path / "answers")).total()["num_images"] == 32


def test_many_under_way_stop_too_when_the_quota_is_spent(fake, tmp_path):
    server = fake(quota=10)
    options = asking(server, "streetview", tmp_path, concurrency=6)
    offers = [found[0] for found in offers_of(Finder(**options)(batch_of(*[PLACES[f"p{i}"] for i in range(8)])))]
    fetched(Fetcher(**options), offers)
    refused = sum(count for what, count in server.answered.items() if what.startswith("403"))
    assert 1 <= refused <= 6  # 54 images were still wanted


def test_a_service_that_wants_an_hour_of_quiet_gets_it(fake, tmp_path):
    server = fake(faults=lambda number: "429" if number > 3 else None)
    options = asking(server, "panoramax", tmp_path, concurrency=2)
    finder = Finder(**options)
    finder._politeness.max_wait_s = 0.1  # Retry-After is 0.2
    result = finder(batch_of(*[(10.0 + i * 1e-3, 20.0) for i in range(30)]))
    assert server.num_requests <= 3 + 2
    assert sum("quota spent" in str(reason) for reason in result["failure"]) >= 25


@pytest.mark.parametrize("source", ["streetview", "mapillary", "panoramax"])
def test_every_request_is_accounted_for(source, fake, tmp_path):
    kinds = ["500", None, None, "drop", None]
    server = fake(faults=lambda number: kinds[number % len(kinds)])
    options = asking(server, source, tmp_path, max_attempts=8, concurrency=8)
    finder, fetcher = Finder(**options), Fetcher(**options)
    for stage in (finder, fetcher):
        stage._politeness.first_wait_s = 0.01
    found = finder(batch_of(*[(10.0, 20.0 + i * 1e-4) for i in range(5)]))
    offers = {o["pano_id"]: o for offers in offers_of(found) for o in offers}
    fetched(fetcher, [*offers.values(), {**next(iter(offers.values())), "pano_id": f"{source}:nobody"}])
    assert AnswerStore(str(tmp_path / "answers")).total()["num_requests"] == server.num_requests


def test_other_options_never_reuse_the_images_of_these(fake, tmp_path):
    server = fake()
    for fov in (90.0, 60.0):
        options = asking(server, "streetview", tmp_path)
        options["options"] = {**options["options"], "fov_deg": fov}
        offers = offers_of(Finder(**options)(batch_of((10.0, 20.0))))[0]
        assert offers[0]["fov_deg"] == fov
        result = fetched(Fetcher(**options), offers)
        assert len(set(result["image_uris"][0])) == 8
    assert server.num_images == 16


def test_odd_json_fails_its_row_alone(fake, tmp_path, monkeypatch):
    server = fake()
    real = server.mapillary

    def odd(steps, query, headers):
        status, body = real(steps, query, headers)
        return status, body.replace(b'{"username": "ann"}', b'"ann"') if server.num_requests == 1 else body

    monkeypatch.setattr(server, "mapillary", odd)
    result = Finder(**asking(server, "mapillary", tmp_path, concurrency=1))(batch_of((10.0, 20.0), (10.0, 20.0001)))
    assert "AttributeError" in result["failure"][0]
    assert result["failure"][1] is None


def test_the_number_of_paid_images_is_never_exceeded(fake, tmp_path):
    server = fake()
    options = asking(server, "streetview", tmp_path)
    points = [PLACES[f"p{i}"] for i in range(4)]
    offers = [found[0] for found in offers_of(Finder(**options, radius_m=50)(batch_of(*points)))]
    fetched(Fetcher(**options, max_images=11), offers)
    assert server.num_images == 11
    fetched(Fetcher(**options, max_images=11), offers)  # a process that died and was started again
    assert server.num_images == 11


def test_a_missing_panorama_and_a_wrong_key_are_told_apart(fake, tmp_path, monkeypatch):
    server = fake()
    gone = {**offers_of(Finder(**asking(server, "mapillary", tmp_path))(batch_of((10.0, 20.0))))[0][0]}
    result = fetched(Fetcher(**asking(server, "mapillary", tmp_path)), [{**gone, "pano_id": "mapillary:nobody"}])
    assert result["failure"][0].startswith("gone: mapillary:nobody")
    monkeypatch.setenv("HEDWIG_MAPILLARY_TOKEN", "another-canary")
    result = Finder(**asking(server, "mapillary", tmp_path / "other"))(batch_of((10.0, 20.0)))
    assert "Invalid OAuth token" in result["failure"][0]
    assert "another-canary" not in result["failure"][0]


def test_the_rate_is_kept_even_with_retries(fake, tmp_path):
    kinds = ["500", None]
    server = fake(faults=lambda number: kinds[number % 2])
    finder = Finder(**asking(server, "panoramax", tmp_path, per_second=25.0, concurrency=8), radius_m=50)
    finder._politeness.first_wait_s = 0.01
    finder(batch_of(*[(10.0 + i * 1e-3, 20.0) for i in range(12)]))
    moments = np.array(server.moments)
    assert len(moments) >= 20
    for i in range(len(moments) - 13):  # no second holds more than 25 requests, so no half holds more than 13
        assert moments[i + 13] - moments[i] >= 0.5 * 0.9


def test_a_token_goes_to_its_own_service_only_and_keys_into_no_file(fake, tmp_path):
    server = fake()
    for source in ("mapillary", "streetview"):
        options = asking(server, source, tmp_path)
        offers = offers_of(Finder(**options)(batch_of((10.0, 20.0))))[0][:1]
        fetched(Fetcher(**options), offers)
    for path, headers in server.seen:
        assert ("Authorization" in headers) == path.startswith("/mapillary")
        assert (KEY in path) == path.startswith("/streetview")
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert KEY.encode() not in file.read_bytes()
            assert TOKEN.encode() not in file.read_bytes()


def test_signature_is_the_one_of_the_documentation():
    # The worked example of Google's page on digital signatures.
    url = "https://maps.googleapis.com/maps/api/geocode/json?address=New+York&client=clientID"
    assert signature(url, "vNIXE0xscrmjlyV-12Nj_BvUPaw=") == "chaRF2hTJKOScPr-RQCEhZbSzIE="


def test_boxes_hold_the_circle_and_split_at_the_180th_meridian():
    (box,) = box_around(60.0, 5.0, 100)
    west, south, east, north = box
    assert haversine_km(60.0, 5.0, 60.0, east) == pytest.approx(0.1, rel=1e-3)
    assert haversine_km(60.0, 5.0, north, 5.0) == pytest.approx(0.1, rel=1e-3)
    assert (west + east) / 2 == pytest.approx(5.0)
    assert south < 60 < north
    left, right = box_around(-17.0, 179.9999, 100)
    assert left[2] == 180.0
    assert right[0] == -180.0
    assert right[2] == pytest.approx(-179.9992, abs=1e-3)
    with pytest.raises(ValueError, match=r"0\.01 is the most"):
        box_around(0.0, 0.0, 50_000)


def test_an_oversize_page_of_a_service_without_paging_is_halved(tmp_path):
    class Silent:
        """Answers at most two images and never says that there are more."""

        base_url, num = "http://127.0.0.1:9", 0

        async def request(self, method, url, *, params=None):
            self.num += 1
            west, south, east, north = map(float, params["bbox"].split(","))
            inside = [n for n, (a, b) in sorted(PLACES.items()) if south <= a <= north and west <= b <= east]
            data = [
                {"id": n, "is_pano": True, "geometry": {"coordinates": [PLACES[n][1], PLACES[n][0]]}} for n in inside
            ]
            return type("Answer", (), {"body": json.dumps({"data": data[:2]}).encode()})

    client = Silent()
    source = image_source("mapillary", page=2)
    offers = asyncio.run(source.find(client, 10.0, 20.0, 50.0))
    assert len(offers) == sum(haversine_km(10.0, 20.0, a, b) <= 0.05 for a, b in PLACES.values())
    assert client.num > 1


def test_image_names_are_safe_and_never_meet():
    def offer(name):
        return Offer(name, 0.0, 0.0, "s", "l", None, "equirectangular")

    names = {
        image_name(offer(n), 0, "x") for n in ("mapillary:../../x", "mapillary:...x", "mapillary:a b", "mapillary:a?b")
    }
    assert len(names) == 4
    assert all(name.startswith("images/") and ".." not in name for name in names)


def test_a_key_that_is_not_there_is_named(monkeypatch):
    monkeypatch.delenv("HEDWIG_STREETVIEW_KEY")
    with pytest.raises(PermissionError, match="HEDWIG_STREETVIEW_KEY"):
        image_source("streetview")
    with pytest.raises(ValueError, match="there are streetview, mapillary, panoramax"):
        image_source("bing")


def test_retry_after_is_waited_for(fake):
    server = fake(faults=lambda number: "429" if number == 1 else None)

    async def ask():
        async with WebClient(server.url, politeness=Politeness(first_wait_s=0.001)) as client:
            return await client.request("GET", "/storage/x")

    started = time.monotonic()
    answer = asyncio.run(ask())
    assert answer.num_attempts == 2
    assert time.monotonic() - started >= 0.2
