"""API keys: random, kept as digests, refused when unknown, expired or unreadable."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time

import pytest
from typer.testing import CliRunner

from hedwig.cli import app
from hedwig.serving import keys as module
from hedwig.serving.keys import SCOPES, ApiKey, KeyRing, new_key, read_keys, write_keys

runner = CliRunner()


def test_a_key_is_random_and_only_its_digest_is_kept(tmp_path):
    made = [new_key("x") for _ in range(50)]
    assert len({text for text, _ in made}) == 50
    assert min(len(text) for text, _ in made) >= 3 + 32 * 4 / 3  # 256 bits in base 64
    text, key = made[0]
    assert key.sha256 == hashlib.sha256(text.encode()).hexdigest()
    write_keys(tmp_path / "keys.json", [key])
    assert text not in (tmp_path / "keys.json").read_text()
    assert text not in repr(key)
    assert stat.S_IMODE(os.stat(tmp_path / "keys.json").st_mode) == 0o600
    assert read_keys(tmp_path / "keys.json") == (key,)


def test_scopes_and_expiry():
    text, key = new_key("x", ["metrics", "read"], days=2)
    assert key.scopes == ("read", "metrics")
    assert key.expires == pytest.approx(time.time() + 2 * 86_400, abs=5)
    ring = KeyRing([key])
    assert ring.recognise(text) == (key, False)
    assert ring.recognise(text, now=key.expires) == (key, True)
    assert ring.recognise(text + "x") == (None, False)
    assert ring.recognise("") == (None, False)
    assert ring.recognise(key.sha256) == (None, False)  # the digest is no key
    for bad in (["root"], []):
        with pytest.raises(ValueError, match="scopes"):
            new_key("x", bad)
    with pytest.raises(ValueError, match="days is 0"):
        new_key("x", days=0)
    with pytest.raises(ValueError, match="key itself"):
        ApiKey("a", "x", text, SCOPES)


def test_every_record_is_compared_in_constant_time(monkeypatch):
    made = [new_key(str(i)) for i in range(5)]
    ring = KeyRing([key for _, key in made])
    compared = []
    real = module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    for text in [text for text, _ in made] + ["unknown"]:
        compared.clear()
        ring.recognise(text)
        assert compared == [key.sha256 for _, key in made]


def test_the_environment_or_the_file_it_names(tmp_path):
    _, key = new_key("x")
    path = tmp_path / "keys.json"
    assert KeyRing.from_environment({}) is None
    with pytest.raises(FileNotFoundError):
        KeyRing.from_environment({"HEDWIG_API_KEYS_FILE": str(path)})
    write_keys(path, [key])
    assert len(KeyRing.from_environment({"HEDWIG_API_KEYS_FILE": str(path)})) == 1
    assert len(KeyRing.from_environment({"HEDWIG_API_KEYS": path.read_text()})) == 1
    with pytest.raises(ValueError, match="both set"):
        KeyRing.from_environment({"HEDWIG_API_KEYS": "{}", "HEDWIG_API_KEYS_FILE": str(path)})
    write_keys(path, [])
    with pytest.raises(ValueError, match="holds no keys"):
        KeyRing.from_environment({"HEDWIG_API_KEYS_FILE": str(path)})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"keys": 3}', '{"keys": [3]}', '{"keys": [{"id": "a"}]}', "[" * 50_000, "hw_canary",
     '{"keys": [{"id": "a", "name": "x", "sha256": "hw_canary", "scopes": ["read"]}]}'],
)  # fmt: skip
def test_what_is_no_list_of_keys_is_refused_without_being_quoted(text):
    with pytest.raises(ValueError, match="HEDWIG_API_KEYS") as error:
        KeyRing.from_environment({"HEDWIG_API_KEYS": text})
    assert "canary" not in str(error.value)


def test_a_running_service_sees_new_and_revoked_keys_and_fails_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_RELOAD_EVERY_S", 0.0)
    path = tmp_path / "keys.json"
    (first, one), (second, two) = new_key("1"), new_key("2")
    write_keys(path, [one])
    ring = KeyRing.from_environment({"HEDWIG_API_KEYS_FILE": str(path)})
    assert ring.recognise(first)[0] == one
    write_keys(path, [one, two])
    assert ring.recognise(second)[0] == two
    write_keys(path, [two])
    assert ring.recognise(first) == (None, False)
    path.write_text("{")
    assert ring.recognise(second) == (None, False)
    path.unlink()
    assert ring.recognise(second) == (None, False)
    write_keys(path, [two])
    assert ring.recognise(second)[0] == two


def test_the_command_line_makes_lists_and_revokes(tmp_path, monkeypatch):
    path = tmp_path / "keys.json"
    monkeypatch.setenv("HEDWIG_API_KEYS_FILE", str(path))
    made = runner.invoke(app, ["keys", "new", "map team", "--scope", "read", "--days", "9", "--json"])
    record = json.loads(made.stdout)
    ring = KeyRing.from_environment({"HEDWIG_API_KEYS_FILE": str(path)})
    assert ring.recognise(record["key"])[0].id == record["id"]
    listed = runner.invoke(app, ["keys", "list"]).stdout
    assert record["id"] in listed
    assert "map team" in listed
    assert record["key"] not in listed
    assert runner.invoke(app, ["keys", "revoke", "nobody"]).exit_code == 1
    assert runner.invoke(app, ["keys", "revoke", record["id"]]).exit_code == 0
    assert read_keys(path) == ()
    plain = runner.invoke(app, ["keys", "new", "other"])
    assert KeyRing(read_keys(path)).recognise(plain.stdout.strip())[0].scopes == ("read", "locate")
    monkeypatch.delenv("HEDWIG_API_KEYS_FILE")
    assert runner.invoke(app, ["keys", "list"]).exit_code == 2
