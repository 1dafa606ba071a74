"""HAProxy as Ray configures it and hedwig fences it, in front of servers that a test started: PORT SERVER_PORT...

It prints "ready", then the process is HAProxy.
"""

import os
import sys
import tempfile
from pathlib import Path

from hedwig.serving.fence import fenced_haproxy, haproxy_binary


def main(port, *servers):
    with fenced_haproxy(haproxy_binary()):
        from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
        from ray.serve.config import HTTPOptions

        folder = Path(tempfile.mkdtemp(prefix="hw-", dir="/tmp"))
        config = HAProxyConfig(
            http_options=HTTPOptions(host="127.0.0.1", port=int(port)),
            is_head=True,
            socket_path=str(folder / "admin.sock"),
            server_state_base=str(folder),
            server_state_file=str(folder / "state"),
            metrics_socket_path=str(folder / "metrics.sock"),
            has_received_routes=True,
            has_received_servers=True,
        )
        replicas = [ServerConfig(name=f"replica_{n}", host="192.0.2.9", port=int(s)) for n, s in enumerate(servers)]
        backend = BackendConfig(name="hedwig", path_prefix="/", app_name="hedwig", servers=replicas)
        (folder / "state").touch()
        path = folder / "haproxy.cfg"
        HAProxyApi(config, {"hedwig": backend}, config_file_path=str(path))._generate_config_file_internal()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        script = os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]
        os.execv(script, [script, "-db", "-f", str(path), "-dR"])


if __name__ == "__main__":
    main(*sys.argv[1:])
