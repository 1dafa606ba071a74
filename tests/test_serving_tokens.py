"""Ray's token: made for its owner alone, and asked for by what we start."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap

import pytest

from hedwig.serving.tokens import ensure_token, tokens_off


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_token_is_made_once_and_for_its_owner_alone(home):
    path = home / ".ray" / "auth_token"
    ensure_token()
    token = path.read_text()
    assert len(bytes.fromhex(token)) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)  # as Ray itself writes it
    ensure_token()
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == (token, 0o600)


def test_what_the_environment_says_is_kept(home, monkeypatch, caplog):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    ensure_token()
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "missing"))
    with pytest.raises(FileNotFoundError, match="RAY_AUTH_TOKEN_PATH"):
        ensure_token()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert tokens_off()
    ensure_token()
    assert "whoever can connect" in caplog.text
    assert not (home / ".ray").exists()


@pytest.mark.slow
def test_the_job_api_of_a_ray_that_we_start_refuses_who_has_no_token(home):
    script = """
        import logging, os, urllib.error, urllib.request
        from pathlib import Path
        import ray
        real = ray.init
        # As hedwig starts it, but with the dashboard, which carries the job API and which we leave out.
        ray.init = lambda **given: real(**{**given, "include_dashboard": True, "dashboard_host": "127.0.0.1",
                                           "dashboard_port": 0, "object_store_memory": 100 << 20})
        from hedwig.config import ClusterConfig
        from hedwig.pipelines.cluster import ray_running
        with ray_running(ClusterConfig(num_cpus=1)):
            url = "http://" + ray._private.worker.global_worker.node.address_info["webui_url"]
            token = (Path.home() / ".ray" / "auth_token").read_text()
            def status(token, method="GET", body=None):
                headers = {"Content-Type": "application/json"}
                if token:
                    headers["Authorization"] = f"Bearer {token}"
                request = urllib.request.Request(url + "/api/jobs/", body, headers, method=method)
                try:
                    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20).status
                except urllib.error.HTTPError as error:
                    return error.code
            job = b'{"entrypoint": "true"}'
            print([status(None), status("wrong"), status(token), status(None, "POST", job), status("x", "POST", job)])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "HOME": str(home)},
    )
    assert done.stdout.strip().splitlines()[-1:] == ["[401, 403, 200, 401, 403]"], done.stderr[-3000:]
