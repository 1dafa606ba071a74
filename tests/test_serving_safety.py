"""The safety settings on a real Ray Serve with two replicas: keys, one rate, decoders, one audit log each."""

from __future__ import annotations

import http.client
import io
import json
import pickle
import urllib.parse

import numpy as np
import pytest
from PIL import Image
from tests_serving import FakeLocator, free_port

from hedwig.serving import Limits, create_app, start, stop
from hedwig.serving.audit import verify
from hedwig.serving.keys import SCOPES, KeyRing, new_key, write_keys
from hedwig.serving.safety import Safety


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 200, (8, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((128, 64)).save(stream, "JPEG")
    return stream.getvalue()


def send(url, key, body=None, path="/v1/locate"):
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
    headers = {"Content-Type": "image/jpeg"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, json.loads(answer.read() or b"null")
    finally:
        connection.close()


def test_settings_are_checked_and_hold_no_key():
    for bad, text in (({"decode": "fork"}, "decode"), ({"rate_per_s": -1}, "rate_per_s"), ({"rate_burst": 0}, "burst")):
        with pytest.raises(ValueError, match=text):
            Safety(**bad)
    text, key = new_key("x", SCOPES)
    travelling = pickle.dumps(Safety(keys=KeyRing([key])))
    assert text.encode() not in travelling
    assert pickle.loads(travelling).keys.recognise(text)[0] == key


def test_keys_from_a_file_that_is_not_here_stay_as_they_came(tmp_path):
    text, key = new_key("x")
    write_keys(tmp_path / "keys.json", [key])
    ring = KeyRing.from_environment({"HEDWIG_API_KEYS_FILE": str(tmp_path / "keys.json")})
    assert ring.settled() is ring
    (tmp_path / "keys.json").unlink()
    assert ring.settled().recognise(text)[0] == key  # another machine, which never had it
    assert ring.recognise(text)[0] is None  # this one, where it was removed


@pytest.mark.slow
def test_two_replicas_ask_for_keys_share_a_rate_and_keep_an_audit(ray_session, tmp_path, monkeypatch):
    import ray

    made = {name: new_key(name, SCOPES) for name in ("a", "b")}
    write_keys(tmp_path / "keys.json", [key for _, key in made.values()])
    monkeypatch.setenv("HEDWIG_API_KEYS_FILE", str(tmp_path / "keys.json"))
    url = start(
        "/run-of-nothing",
        port=free_port(),
        load=lambda run: FakeLocator(),
        num_replicas=2,
        num_cpus=0.5,
        rate_per_s=0.01,
        rate_burst=30,
        audit_folder=str(tmp_path / "audit"),
        min_precision_km=25.0,
        ready_timeout_s=120.0,
    )
    try:
        a, b = (made[name][0] for name in ("a", "b"))
        assert send(url, None, jpeg(0))[0] == 401
        answers = [send(url, a, jpeg(i)) for i in range(40)]
        granted = [status for status, *_ in answers].count(200)
        assert 20 <= granted <= 30  # never more; less by the tokens that a replica has leased and not spent
        assert sorted(status for status, *_ in answers) == [200] * granted + [429] * (40 - granted)
        assert all(answer["precision_km"] == 25.0 for status, _, answer in answers if status == 200)
        assert int(answers[-1][1]["Retry-After"]) >= 1
        assert send(url, b, jpeg(1)[:-30])[0] == 422  # another key; and the decoder's own process refuses
        assert send(url, None, path="/healthz")[0] == 200
    finally:
        stop()
    assert not [x for x in ray.util.list_named_actors(all_namespaces=True) if x["name"].startswith("hedwig-rates")]
    files = sorted((tmp_path / "audit").iterdir())
    assert len(files) == 2
    assert all(verify([file]).num_lines > 2 for file in files)
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    statuses = [line["status"] for line in lines if line["event"] == "answer"]
    assert sorted(statuses) == [200] * granted + [401] + [422] + [429] * (40 - granted)
    text = "".join(file.read_text() for file in files)
    assert a not in text
    assert b not in text


def test_a_replica_opens_only_what_is_configured():
    limits = Limits(num_threads=2)
    plain = Safety(decode="thread").open(limits)
    assert (plain["decode"], plain["rates"], plain["audit"], plain["keys"]) == (None, None, None, None)
    assert create_app(FakeLocator(), limits=limits, **plain) is not None
    with_process = Safety(cors_origins=["https://a.example"], min_precision_km=5.0).open(limits)
    try:
        assert with_process["decode"](jpeg(0)).shape == (64, 128, 3)
        assert (with_process["cors_origins"], with_process["min_precision_km"]) == (("https://a.example",), 5.0)
    finally:
        with_process["decode"].close()
