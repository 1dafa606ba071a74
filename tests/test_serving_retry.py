"""HAProxy as Ray configures it, behind our fence, repeats what a replica took with it when it died.

The replicas are the application under uvicorn, as Serve runs it behind HAProxy, without Ray around them: they are back
at once, and may be killed as often as one likes. HEDWIG_CHAOS_S sets the length of the slow form.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_serving_chaos import Load, Running
from test_serving_releases import digest_of, publish, version_folder
from tests_serving import free_port, wait_until_ready

from hedwig.serving.fence import haproxy_binary

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(haproxy_binary() is None, reason="Ray brings no HAProxy here")


class Fronted(Running):
    """Forked servers with HAProxy in front."""

    def __init__(self, run, num):
        ports = [str(free_port()) for _ in range(num)]
        front = str(free_port())
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen([sys.executable, HERE / "forked_servers.py", run, *ports], **piped)
        self.proxy = subprocess.Popen([sys.executable, HERE / "haproxy_in_front.py", front, *ports], **piped)
        self.url = f"http://127.0.0.1:{front}"
        wait_until_ready(self.url, self.proxy, 120)

    def pids(self):
        return sorted(self.descendants())

    def haproxies(self):
        return [self.proxy.pid]

    def close(self):
        for pid in [self.process.pid, *self.pids(), self.proxy.pid]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.proxy.wait()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for number, name in enumerate((".", "versions/0002", "versions/0003"), start=1):
        version_folder(folder, name, number)
    running = Fronted(str(folder), 3)
    running.run = folder
    yield running
    running.close()


def killed_under_load(service, seconds, every_s):
    kills = 0
    with Load(service) as load:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(every_s)
            alive = service.pids()
            os.kill(alive[kills % len(alive)], signal.SIGKILL)
            kills += 1
    told = load.figures(kills=kills)
    plain = load.check(told)
    # Not repeated: an answer whose head was sent when its replica died. Without retries it is about two a kill.
    assert plain <= kills, (told, load.failed[:3])
    return told


def swapped_under_load(service, num):
    run = service.run
    digests = {name: digest_of(run / "versions" / name) for name in ("0002", "0003")} | {run.name: digest_of(run)}
    with Load(service) as load:
        for number in range(num):
            name = ("0002", "0003")[number % 2]
            publish(run, f"versions/{name}")
            deadline, seen = time.monotonic() + 60, 0
            while seen < 10:  # in a row: all replicas have it
                seen = seen + 1 if service.ask()["run_digest"] == digests[name] else 0
                seen = min(seen, 9) if load.last != digests[name] else seen
                assert time.monotonic() < deadline
    told = load.figures(swaps=num)
    assert load.failed == [], (told, load.failed[:3])
    mixed = [a for a in load.answers if a[0] != [*a[0][:1], a[1]] or digests[a[0][0]] != a[1]]
    assert mixed == []  # an answer's neighbours and its digest are of one version
    assert {digest for _, digest in load.answers} >= {digests["0002"], digests["0003"]}
    return told


def test_two_kills_and_two_swaps_cost_no_request(service):
    addresses = service.listening()
    assert len(addresses) == 3  # the service, statistics, metrics
    assert all(address.startswith("0100007F:") for address in addresses)
    swapped_under_load(service, 2)
    assert killed_under_load(service, 2.0, 1.0)["kills"] == 2


@pytest.mark.slow
def test_a_replica_killed_every_three_seconds_costs_no_request(service):
    killed_under_load(service, float(os.environ.get("HEDWIG_CHAOS_S", "60")), 3.0)


@pytest.mark.slow
def test_twenty_swaps_cost_no_request_and_mix_nothing(service):
    swapped_under_load(service, 20)
