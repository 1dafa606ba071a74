"""The fence around HAProxy: whatever Ray configures, nothing listens beyond loopback."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from hedwig.serving import deployment
from hedwig.serving.deployment import start_ray
from hedwig.serving.fence import fenced_haproxy, haproxy_binary

# The lines of Ray 2.60's template that bind, connect or grant.
CONFIG = """global
    stats socket {folder}/admin.sock mode 666 level admin expose-fd listeners
    stats timeout 30s
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind *:8000
    acl is_hedwig path_beg /
    use_backend hedwig if is_hedwig
backend hedwig
    server replica_1 192.0.2.2:30001 check observe layer4 error-limit 3 on-error mark-down
    server fallback 192.0.2.2:8500 check backup
listen stats
  bind *:8404
  stats enable
"""


def fenced(tmp_path, config, binary="/bin/echo"):
    """Run the script as Ray would; what it said and what it left of the configuration."""
    path = tmp_path / "haproxy.cfg"
    path.write_text(config.replace("{folder}", str(tmp_path)))
    with fenced_haproxy(binary):
        script = os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]
    done = subprocess.run(
        [script, "-db", "-f", str(path), "-dR", "-sf", "77"], capture_output=True, text=True, timeout=60
    )
    return done, path.read_text().splitlines()


def test_every_listener_and_every_replica_is_on_loopback(tmp_path):
    done, lines = fenced(tmp_path, CONFIG)
    assert (done.returncode, done.stdout) == (0, f"-db -f {tmp_path}/haproxy.cfg -dR -sf 77\n")
    assert [line.strip() for line in lines if "bind " in line] == [
        "bind 127.0.0.1:9101",
        "bind 127.0.0.1:8000",
        "bind 127.0.0.1:8404",
    ]
    servers = [line.split()[2] for line in lines if line.strip().startswith("server ")]
    assert servers == ["127.0.0.1:30001", "127.0.0.1:8500"]
    assert f"    stats socket {tmp_path}/admin.sock mode 600 level admin expose-fd listeners" in lines
    added = ["  tune.memory.hot-size 67108864", "  no-memory-trimming"]
    assert lines[:3] == ["global", *added]
    assert len(lines) == len(CONFIG.splitlines()) + len(added)  # and nothing else was touched
    assert "    use_backend hedwig if is_hedwig" in lines


@pytest.mark.parametrize("line", ["bind /tmp/somewhere.sock", "bind fd@3", "bind", "bind abns@x", "bind *:80,*:81"])
def test_what_cannot_be_bound_to_loopback_does_not_start(tmp_path, line):
    done, lines = fenced(tmp_path, CONFIG + f"frontend other\n    {line}\n")
    assert done.returncode == 1
    assert "could not be bound" in done.stderr
    assert "    bind *:8000" in lines  # what Ray wrote is left as it was


def test_haproxy_itself_takes_what_the_fence_leaves(tmp_path):
    binary = haproxy_binary()
    if binary is None:
        pytest.skip("Ray brings no HAProxy here")
    _, lines = fenced(tmp_path, CONFIG)
    (tmp_path / "fenced.cfg").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [binary, "-c", "-f", str(tmp_path / "fenced.cfg")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_environment_is_given_back_and_the_script_is_its_owners(monkeypatch):
    monkeypatch.setenv("RAY_SERVE_HAPROXY_RETRIES", "7")
    before = dict(os.environ)
    with fenced_haproxy("/bin/true"):
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert "empty-response" in os.environ["RAY_SERVE_HAPROXY_RETRY_ON"]
        script = Path(os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"])
        socket = os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]
    assert dict(os.environ) == before
    assert stat.S_IMODE(script.stat().st_mode) == 0o700
    assert stat.S_IMODE(script.parent.stat().st_mode) == 0o700
    assert len(socket) + len("/") + 56 < 90  # Ray puts the node's name in between, HAProxy a suffix behind


def test_haproxy_is_refused_where_it_cannot_be_fenced():
    with pytest.raises(ValueError, match=r"127\.0\.0\.1 only"):
        start_ray("0.0.0.0", "haproxy")


def test_haproxy_is_taken_by_itself_where_it_can_be_fenced(monkeypatch):
    monkeypatch.setattr(deployment, "haproxy_binary", lambda: "/there/haproxy")
    assert deployment._chosen_haproxy("127.0.0.1", "auto") == "/there/haproxy"
    assert deployment._chosen_haproxy("127.0.0.1", "python") is None
    assert deployment._chosen_haproxy("0.0.0.0", "auto") is None
    monkeypatch.setattr(deployment, "haproxy_binary", lambda: None)
    assert deployment._chosen_haproxy("localhost", "auto") is None
    with pytest.raises(ValueError, match="choose proxy: python"):
        deployment._chosen_haproxy("127.0.0.1", "haproxy")
