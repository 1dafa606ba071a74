"""Fetching against a hub on loopback: whole, resumed, corrupt, refused, offline; nothing is seen before it is whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from hub import COMMIT, Hub, serving

from hedwig.models import fetch as fetching
from hedwig.models.catalogue import released
from hedwig.models.fetch import fetch, plan
from hedwig.models.fetched import find, resolve_weights

CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "viclip-b16"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving(Hub({"model.safetensors": CONTENT, "viclip.py": b"import os", "README.md": b"#"})) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HEDWIG_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(fetching.time, "sleep", lambda seconds: None)
        pin(monkeypatch, sha256=SHA256)
        yield served


def pin(monkeypatch, **changes):
    """Let the catalogue say something else of the model."""
    changed = dataclasses.replace(released(NAME), **changes)
    for module in ("fetch", "fetched"):
        monkeypatch.setattr(f"hedwig.models.{module}.released", lambda name: changed)


@pytest.fixture
def models(tmp_path):
    return tmp_path / "cache" / "models"


def test_plan_says_everything_and_downloads_nothing(hub, models):
    planned = plan(NAME)
    assert planned.revision == COMMIT
    assert planned.size_bytes == len(CONTENT)
    assert [(file.path, file.sha256, file.checked) for file in planned.files] == [
        ("model.safetensors", SHA256, "pinned")
    ]
    assert planned.licence_tag == "apache-2.0"
    assert planned.folder == models / NAME
    revision = released(NAME).revision
    assert hub.asked == [(f"/api/models/OpenGVLab/ViCLIP-B-16-hf/revision/{revision}", None)]
    assert not models.exists()


def test_fetch_then_find_then_nothing_more_is_asked(hub, models):
    said = []
    fetched = fetch(NAME, progress=lambda done, total: said.append((done, total)))
    assert (models / NAME / "model.safetensors").read_bytes() == CONTENT
    source = json.loads((models / NAME / "source.json").read_text())
    assert source["repo"] == "OpenGVLab/ViCLIP-B-16-hf"
    assert source["revision"] == COMMIT
    assert source["files"] == [
        {"path": "model.safetensors", "size": len(CONTENT), "sha256": SHA256, "checked": "pinned"}
    ]
    assert "CC BY-NC-SA 4.0" in source["licence"]
    assert source["fetched_at"].endswith("+00:00")
    assert said[-1] == (len(CONTENT), len(CONTENT))
    assert sorted(path.name for path in models.iterdir()) == [f".{NAME}.lock", NAME]
    asked = len(hub.asked)
    assert fetch(NAME) == fetched == find(NAME)
    assert fetch(NAME, rehash=True) == fetched
    assert len(hub.asked) == asked
    assert resolve_weights(NAME) == str(models / NAME / "model.safetensors")


def test_a_cut_answer_is_continued_where_it_broke_off(hub, models):
    hub.cut_after, hub.cuts = 1_000_000, 1
    fetch(NAME)
    assert (models / NAME / "model.safetensors").read_bytes() == CONTENT
    spans = [span for _, span in hub.sent()]
    assert spans == [None, "bytes=1000000-"]


def test_a_new_process_continues_what_an_earlier_one_left(hub, models):
    hub.cut_after, hub.cuts = 0, 100
    with pytest.raises(ConnectionError, match="broke off at 0 of 3000000"):
        fetch(NAME)
    assert not (models / NAME).exists()
    part = next(models.glob(f".{NAME}.*.partial")) / "model.safetensors.part"
    part.write_bytes(CONTENT[:2_500_000])  # as a killed process leaves it
    hub.cuts, before = 0, len(hub.sent())
    fetch(NAME)
    assert [span for _, span in hub.sent()[before:]] == ["bytes=2500000-"]
    assert (models / NAME / "model.safetensors").read_bytes() == CONTENT
    assert not list(models.glob("*.partial"))


def test_a_server_without_ranges_is_read_from_the_start(hub, models):
    hub.cut_after, hub.cuts, hub.ignore_ranges = 1_000_000, 1, True
    fetch(NAME)
    assert (models / NAME / "model.safetensors").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_and_a_stubborn_one_is_not_asked_forever(hub, models, monkeypatch):
    waits = []
    monkeypatch.setattr(fetching.time, "sleep", waits.append)
    hub.status["/OpenGVLab"] = [503, 429]
    fetch(NAME)
    assert waits == [1.0, 2.0]
    hub.status["/OpenGVLab"] = [503] * 50
    (models / NAME / "model.safetensors").unlink()
    with pytest.raises(ConnectionError, match=r"5 times in a row \(the hub answered 503\)"):
        fetch(NAME)
    assert len(hub.status["/OpenGVLab"]) == 45


def test_a_wrong_body_is_deleted_and_named(hub, models):
    hub.corrupt = True
    with pytest.raises(ValueError, match=rf"model.safetensors of OpenGVLab.*instead of {SHA256}, which is pinned"):
        fetch(NAME)
    assert not (models / NAME).exists()
    assert not [path for path in models.rglob("*") if path.is_file() and path.stat().st_size]
    hub.corrupt = False
    assert fetch(NAME).files[0].sha256 == SHA256


def test_a_hub_that_states_another_digest_than_the_pinned_one_is_refused_before_the_download(hub, monkeypatch):
    pin(monkeypatch, sha256="0" * 64)
    with pytest.raises(ValueError, match=f"with sha256 {SHA256}, but 0000"):
        fetch(NAME)
    assert hub.sent() == []


def test_without_a_pin_the_hubs_digests_are_used(hub, monkeypatch):
    pin(monkeypatch, sha256=None)
    hub.corrupt = True
    with pytest.raises(ValueError, match="which is what the hub states"):
        fetch(NAME)
    hub.corrupt = False
    assert fetch(NAME).files[0].checked == "hub"


def test_small_files_are_compared_with_their_git_object_and_python_files_stay_away(hub, models, monkeypatch):
    pin(monkeypatch, sha256=None, files=("*.json", "*.safetensors", "sub/*"), entry=".")
    hub.files = {
        "config.json": b"{}",
        "model.safetensors": CONTENT,
        "code.py": b"x",
        "sub/a.bin": b"a",
        "b/c.json": b"b",
    }
    hub.large, hub.corrupt = False, True
    with pytest.raises(ValueError, match="git object"):
        fetch(NAME)
    hub.corrupt = False
    fetched = fetch(NAME)
    assert [file.path for file in fetched.files] == ["config.json", "model.safetensors", "sub/a.bin"]
    assert {path.name for path in (models / NAME).iterdir()} == {
        "config.json",
        "model.safetensors",
        "sub",
        "source.json",
    }
    assert resolve_weights(NAME) == str(models / NAME)


def test_missing_repositories_files_and_gates_are_named(hub):
    hub.status["/api/models"] = [404, 401]
    for status in (404, 401):
        with pytest.raises(OSError, match=f"answered {status} for OpenGVLab/ViCLIP-B-16-hf at 8484a9cb"):
            plan(NAME)
    planned = plan(NAME)
    hub.files = {"model.bin": b"x"}
    with pytest.raises(OSError, match=r"holds none of model.safetensors"):
        plan(NAME)
    with pytest.raises(OSError, match=r"answered 404 for model.safetensors"):
        fetch(NAME, planned=planned)


def test_offline_says_what_to_copy_where_and_takes_the_copy(hub, models, monkeypatch):
    for variable in ("HEDWIG_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(variable, "1")
        with pytest.raises(ConnectionError, match=rf"{variable} is set.*copy it into '{models / NAME}'"):
            fetch(NAME)
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HEDWIG_OFFLINE", "1")
    folder = models / NAME
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="which was copied there"):
        fetch(NAME)
    (folder / "model.safetensors").write_bytes(CONTENT)
    with pytest.raises(FileNotFoundError, match="hedwig fetch viclip-b16"):
        resolve_weights(NAME)
    assert fetch(NAME).files[0].checked == "pinned"
    assert resolve_weights(NAME) == str(folder / "model.safetensors")
    assert hub.asked == []


def test_an_unreachable_hub_is_a_connection_error(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="cannot be reached"):
        plan(NAME)


def test_a_full_disk_is_noticed_before_the_download(hub, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: type("U", (), {"free": 10**6})())
    with pytest.raises(OSError, match=r"needs 0.11 GB .* set HEDWIG_CACHE"):
        fetch(NAME)
    assert hub.sent() == []


def test_one_fetch_at_a_time(hub, models):
    with fetching._only_one(_made(models / NAME)), pytest.raises(OSError, match="under way"):
        fetch(NAME)


def _made(folder):
    folder.parent.mkdir(parents=True)
    return folder


def test_a_damaged_model_is_fetched_again_and_a_changed_one_is_found_by_its_hash(hub, models):
    fetch(NAME)
    file = models / NAME / "model.safetensors"
    file.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    assert not find(NAME).problems()
    with pytest.raises(ValueError, match="it was deleted"):
        fetch(NAME, rehash=True)
    with pytest.raises(FileNotFoundError, match=r"model.safetensors has no file, 3000000 were fetched"):
        resolve_weights(NAME)
    fetch(NAME)
    assert file.read_bytes() == CONTENT


def test_the_token_goes_to_the_hub_and_into_nothing_that_is_written(hub, models, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(NAME)
    assert set(hub.authorisation) == {"Bearer hf_secret"}
    assert "hf_secret" not in (models / NAME / "source.json").read_text()
