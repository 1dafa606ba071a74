"""Replicas without Ray, for tests: RUN PORT... serves the published version of RUN at each port, by uvicorn.

The modules are imported once and every server is a fork, so that one that was killed is back at once.
"""

import os
import sys
import time
from pathlib import Path


def load(folder):
    """A locator that names the version it is of."""
    from tests_serving import FakeLocator

    from hedwig import storage

    locator = FakeLocator()
    locator.names = (Path(folder).name, storage.manifest_digest(f"{folder}/index"))
    return locator


def serve(run, port):
    import uvicorn
    from starlette.responses import PlainTextResponse

    from hedwig.publishing import pointer_token
    from hedwig.serving import create_app
    from hedwig.serving.releases import Follower
    from hedwig.serving.replica import open_release

    token = pointer_token(run)
    release = open_release(run, load)
    app = create_app(release.locator, info=release.info, cells=release.cells)

    async def replica(scope, receive, send):
        if scope["type"] == "http" and scope["path"] == "/-/healthz":  # what HAProxy asks; Serve answers it
            await PlainTextResponse("success")(scope, receive, send)
        else:
            await app(scope, receive, send)

    Follower(lambda: pointer_token(run), lambda: open_release(run, load), served=token, period_s=0.1).follow(
        app.state.service
    )
    uvicorn.run(replica, host="127.0.0.1", port=port, log_level="error")


def main(run, *ports):
    import uvicorn  # noqa: F401 - before the forks

    import hedwig.serving.app
    import hedwig.serving.replica  # noqa: F401

    servers = {}
    waiting = list(ports)
    while True:
        for port in waiting:
            pid = os.fork()
            if pid == 0:
                serve(run, int(port))
                os._exit(0)
            servers[pid] = port
        sys.stdout.write("forked\n")
        sys.stdout.flush()
        waiting = [servers.pop(os.wait()[0])]
        time.sleep(0.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
