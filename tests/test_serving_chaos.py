"""Parts of a running service are killed, and what it serves is exchanged, while it is asked without a pause.

One Ray in another process serves them all, and nothing but descendants of that process is killed. The long forms
are slow; HEDWIG_CHAOS_S sets their length. Set HEDWIG_CHAOS_OUT to a folder to keep the figures.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import httpx
import numpy as np
import pytest
from test_serving_releases import digest_of, publish, version_folder
from tests_serving import free_port

from hedwig.serving import Client
from hedwig.serving.fence import haproxy_binary

SECONDS = float(os.environ.get("HEDWIG_CHAOS_S", "60"))
ONE = np.zeros((1, 4), dtype="<f4")
REPLICA, CONTROLLER = "ray::ServeReplica:hedwig:locate", "ray::ServeController"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(haproxy_binary() is None, reason="Ray brings no HAProxy here"),
]


class Running:
    """One service and its processes."""

    def __init__(self, run, proxy, replicas):
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "chaos_service.py", run, str(free_port()), proxy, str(replicas)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url, "the service did not start"

    def descendants(self):
        """pid -> command line of every living process below the service."""
        below, names = {}, {}
        for entry in Path("/proc").iterdir():
            try:
                pid = int(entry.name)
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                names[pid] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (OSError, ValueError):
                continue
            if fields[0] != "Z":
                below.setdefault(int(fields[1]), []).append(pid)
        found, waiting = {}, [self.process.pid]
        while waiting:
            for pid in below.get(waiting.pop(), ()):
                found[pid] = names[pid]
                waiting.append(pid)
        return found

    def pids(self, name):
        return [pid for pid, command in self.descendants().items() if command.startswith(name)]

    def haproxies(self):
        return [pid for pid, command in self.descendants().items() if "haproxy -db" in command]

    def listening(self):
        """Addresses, in hex as the kernel has them, on which HAProxy and the replicas listen."""
        sockets = {}
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    sockets[f"socket:[{fields[9]}]"] = fields[1]
        found = set()
        for pid in self.haproxies():
            for link in Path(f"/proc/{pid}/fd").iterdir():
                found.add(sockets.get(os.readlink(link)))
        return found - {None}

    def ask(self):
        """One search by whoever does not try again; the answer."""
        request = urllib.request.Request(
            f"{self.url}/v1/neighbours", ONE.tobytes(), {"Content-Type": "application/octet-stream"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for number, name in enumerate((".", "versions/0002", "versions/0003"), start=1):
        version_folder(folder, name, number)
    return folder


@pytest.fixture(scope="module")
def service(run):
    running = Running(run, "haproxy", 3)
    yield running
    running.close()


class Load:
    """Callers that ask without a pause until told to stop."""

    def __init__(self, service, num_plain=2, num_clients=2):
        self.end = threading.Event()
        self.answers, self.failed = [], []
        self.num = {"plain": 0, "client": 0}
        self.longest_s = 0.0
        kinds = [("plain", self.plain)] * num_plain + [("client", self.client)] * num_clients
        self.service = service
        self.threads = [threading.Thread(target=ask, args=(kind,)) for kind, ask in kinds]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.end.set()
        for thread in self.threads:
            thread.join()

    def plain(self, kind):
        with httpx.Client(trust_env=False, timeout=60) as session:
            headers = {"Content-Type": "application/octet-stream"}
            url, body = f"{self.service.url}/v1/neighbours", ONE.tobytes()

            def ask():
                response = session.post(url, content=body, headers=headers)
                response.raise_for_status()
                return response.json()

            self.repeat(kind, ask)

    def client(self, kind):
        with Client(self.service.url) as client:
            self.repeat(kind, lambda: client.neighbours(ONE).model_dump())

    def repeat(self, kind, ask):
        while not self.end.is_set():
            began = time.monotonic()
            try:
                answer = ask()
                self.answers.append((answer["neighbour_ids"][0], answer["run_digest"]))
            except Exception as error:  # any failure at all counts
                self.failed.append((kind, f"{type(error).__name__}: {error}"))
            self.num[kind] += 1
            self.longest_s = max(self.longest_s, time.monotonic() - began)

    @property
    def last(self):
        """The digest in the last answer."""
        return self.answers[-1][1] if self.answers else None

    def check(self, told):
        """`hedwig.Client` saw no failure; how many the others saw, who do not try again."""
        assert [text for kind, text in self.failed if kind == "client"] == [], told
        return len(self.failed)

    def figures(self, **more):
        failed = {name: sum(kind == name for kind, _ in self.failed) for name in self.num}
        told = {"requests": self.num, "failed": failed, "longest_s": round(self.longest_s, 2), **more}
        if folder := os.environ.get("HEDWIG_CHAOS_OUT"):
            name = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split()[0].split("[")[0]
            Path(folder, f"{name}.json").write_text(json.dumps({**told, "first_failures": self.failed[:5]}))
        return told


def test_twenty_swaps_under_load_fail_nothing_and_mix_nothing(service, run):
    digests = {name: digest_of(run / "versions" / name) for name in ("0002", "0003")} | {run.name: digest_of(run)}
    with Load(service) as load:
        for number in range(20):
            name = ("0002", "0003")[number % 2]
            publish(run, f"versions/{name}")
            deadline, seen = time.monotonic() + 60, 0
            while seen < 10:  # in a row: all replicas have it
                seen = seen + 1 if service.ask()["run_digest"] == digests[name] else 0
                assert time.monotonic() < deadline
    told = load.figures(swaps=20, versions_seen=len({digest for _, digest in load.answers}))
    assert load.failed == [], told
    mixed = [a for a in load.answers if a[0] != [*a[0][:1], a[1]] or digests[a[0][0]] != a[1]]
    assert mixed == []  # an answer's neighbours and its digest are of one version
    assert {digest for _, digest in load.answers} >= {digests["0002"], digests["0003"]}


def test_replicas_killed_under_load_cost_no_request(service):
    kills = 0
    with Load(service) as load:
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends:
            time.sleep(3.0)
            alive = service.pids(REPLICA)
            if len(alive) >= 2:  # a service without any replica can only refuse
                os.kill(alive[kills % len(alive)], signal.SIGKILL)
                kills += 1
    told = load.figures(kills=kills)
    assert kills >= 1
    assert load.check(told) <= kills, (told, load.failed[:3])


def test_proxy_and_controller_killed_recover(service):
    assert service.listening()
    assert all(address.startswith("0100007F:") for address in service.listening())
    took = {}
    for what, pids in (("controller", service.pids(CONTROLLER)), ("proxy", service.haproxies())):
        assert pids, what
        began = time.monotonic()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        good = 0
        while good < 20:
            try:
                service.ask()
                good += 1
            except OSError:
                good = 0
                time.sleep(0.05)
            assert time.monotonic() - began < 120, what
        took[what] = time.monotonic() - began
        time.sleep(1.0)
    Load(service).figures(recovery_s=took)
    assert all(address.startswith("0100007F:") for address in service.listening())
    assert max(took.values()) < 15, took
