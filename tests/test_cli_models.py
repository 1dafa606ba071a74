"""The commands fetch, models and bench as a user types them, in a process of their own, against a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys

import pytest
from hub import COMMIT, Hub, serving

from hedwig.models.viclip import TINY, random_viclip, save_viclip

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MAIN = "from hedwig.cli import main; main()"


@pytest.fixture
def hub(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": CONTENT, "preprocessor_config.json": b"{}", "run.py": b"x"}
    with serving(Hub(files, licence="cc-by-nc-4.0")) as served:
        yield served


@pytest.fixture
def hedwig(tmp_path):
    def run(*arguments, url="http://127.0.0.1:9", stdin=subprocess.DEVNULL, **variables):
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HEDWIG_"))}
        env |= {
            "HEDWIG_CACHE": str(tmp_path / "cache"),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": url,
            **variables,
        }
        command = [sys.executable, "-c", MAIN, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, stdin=stdin)

    return run


def test_fetch_shows_the_terms_then_downloads_then_finds(hub, hedwig, tmp_path):
    done = hedwig("fetch", "streetclip", url=hub.url)
    assert done.returncode == 2
    assert "add --yes" in done.stderr
    for shown in (
        "geolocal/StreetCLIP",
        COMMIT,
        "7 kB",
        "not for commercial use; the hub's tag: cc-by-nc-4.0",
        "not pinned",
    ):
        assert shown in done.stderr
    assert hub.sent() == []
    done = hedwig("fetch", "streetclip", "--yes", "--json", url=hub.url)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    folder = tmp_path / "cache" / "models" / "streetclip"
    assert (result["downloaded"], result["entry"]) == (True, str(folder))
    assert {file["path"]: file["checked"] for file in result["files"]} == {
        "config.json": "hub", "model.safetensors": "hub", "preprocessor_config.json": "hub"
    }  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    asked = len(hub.asked)
    done = hedwig("fetch", "streetclip", "--verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("streetclip is here: ")
    assert "not pinned" in done.stdout
    assert len(hub.asked) == asked
    rows = {row["name"]: row for row in json.loads(hedwig("models", "list", "--json").stdout)["models"]}
    assert (rows["streetclip"]["state"], rows["streetclip"]["path"]) == ("here", str(folder))
    assert (rows["viclip-l14"]["state"], rows["viclip-l14"]["path"]) == ("not here", None)


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"y\n", 0)])
def test_on_a_terminal_it_asks(hub, hedwig, tmp_path, answer, code):
    terminal, side = pty.openpty()
    os.write(terminal, answer)
    done = hedwig("fetch", "streetclip", url=hub.url, stdin=side)
    assert done.returncode == code, done.stderr
    assert "Download? [y/N]" in done.stderr
    assert (tmp_path / "cache" / "models" / "streetclip").exists() is (code == 0)
    os.close(terminal)
    os.close(side)


def test_a_wrong_digest_and_offline_and_a_misspelt_name_are_said(hub, hedwig, tmp_path):
    done = hedwig("fetch", "viclip-b16", "--yes", url=hub.url)
    assert done.returncode == 1
    assert f"with sha256 {SHA256}, but af9cfba8" in done.stderr
    assert hub.sent() == []
    done = hedwig("fetch", "viclip-b16", "--yes", url=hub.url, HEDWIG_OFFLINE="1")
    assert done.returncode == 1
    assert f"copy it into '{tmp_path / 'cache' / 'models' / 'viclip-b16'}'" in done.stderr
    assert hedwig("fetch", "viclip-b61").returncode == 2


def test_list_warns(hedwig):
    text = hedwig("models", "list").stdout
    assert "viclip-l14  (not here)" in text
    assert "unclear: the repository names no licence" in text
    assert "about 1.71 GB" in text
    assert "unknown here; hedwig fetch shows the hub's tag" in text


def test_check_says_what_a_file_is_and_refuses_a_wrong_one(hedwig, tmp_path):
    file = tmp_path / "model.safetensors"
    save_viclip(random_viclip(TINY, 0), file)
    done = hedwig("models", "check", file, "--name", "viclip-b16", "--json")
    assert done.returncode == 3, done.stderr
    identity = json.loads(done.stdout)
    assert (identity["architecture"], identity["loads"], identity["good"]) == ("viclip-tiny", True, False)
    assert identity["problem"].startswith("it is viclip-tiny, not viclip-b16")
    assert hedwig("models", "check", tmp_path / "none").returncode == 2


def test_bench_embed_prints_figures(hedwig):
    done = hedwig("bench", "embed", "--model", "viclip-tiny", "--device", "cpu", "--seconds", "0", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["clips_per_s"] > 0
    assert 0 < figures["ratio_to_ceiling"] < 2
    done = hedwig("bench", "embed", "--model", "viclip-tiny", "--weights", "viclip-l14")
    assert done.returncode == 2
    assert "run: hedwig fetch viclip-l14" in done.stderr
