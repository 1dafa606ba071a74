"""A service in a process of its own, for tests that kill its parts: run it with RUN PORT PROXY REPLICAS.

It prints its address when it is ready and ends when its standard input does.
"""

import sys
from pathlib import Path

import ray

from hedwig import storage
from hedwig.serving import start, start_ray, stop


def load(folder):
    """A locator that names the version it is of."""
    from tests_serving import FakeLocator

    locator = FakeLocator()
    locator.names = (Path(folder).name, storage.manifest_digest(f"{folder}/index"))
    return locator


def main(run, port, proxy, replicas):
    for attempt in range(6):
        try:
            start_ray(proxy=proxy, num_cpus=int(replicas) + 1)
            break
        except Exception:  # Ray waits 30 s for its own processes, and a busy machine is slower than that
            if attempt == 5:
                raise
            ray.shutdown()
    import chaos_service  # not __main__: the replicas import it

    sys.stdout.write(
        start(
            run,
            port=int(port),
            load=chaos_service.load,
            num_replicas=int(replicas),
            look_every_s=0.25,
            num_cpus=0.5,
            decode="thread",
            ready_timeout_s=300.0,
        )
        + "\n"
    )
    sys.stdout.flush()
    sys.stdin.read()
    stop(ray_too=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
