"""Ten thousand panoramas, five in a hundred of them broken, and everything that runs the job killed again and again.

On two nodes of one machine (``cluster_configs/local-multinode.sh``): the driver dies 5 times, a worker 10 times, a
whole node twice, all by SIGKILL and at random times, and one panorama kills whatever process decodes it. In the end
every row is embedded or rejected with its reason, once, and the embeddings are those of an undisturbed run.

Slow (a quarter of an hour): .venv/bin/pytest -m slow tests/test_embedding_chaos.py
The size is HEDWIG_CHAOS_NUM, 10000 when it is not set.
"""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from test_cluster_jobs import environment

from hedwig import storage
from hedwig.vectors import read_vectors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

NUM = int(os.environ.get("HEDWIG_CHAOS_NUM", "10000"))
DRIVERS, WORKERS, NODES = 5, 10, 2
BROKEN = ("empty", "cut", "text", "gone", "flipped")  # by turns, every 20th row
DEADLY = NUM // 2 + 7
MARK = b"kills its process"

# The job, as a script: the slicer of a run, but for one image over which its process ends, and slower: workers start in
# seconds, and would be done before they can be killed so often.
JOB = f"""
    import os, signal, sys, time
    import hedwig.pipelines.encode as encode
    from hedwig.config import validate_experiment
    from hedwig.pipelines.embed import embed_listing

    class Slicer(encode.PanoramaSlicer):
        def __call__(self, batch):
            if any({MARK!r} in data for data in batch["image_bytes"]):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.03 * len(batch["image_bytes"]))
            return super().__call__(batch)

    listing, out, deadly, address = sys.argv[1:5]
    if deadly == "deadly":
        encode.PanoramaSlicer = Slicer
    embed_listing(validate_experiment({{
        "name": "chaos", "output": out + "/.work",
        "data": {{"panoramas": listing, "split": {{"method": "column"}}, "max_rejected": 0.2}},
        "encoder": {{"name": "viclip-tiny", "long_captions": "truncate"}},
        "embed": {{"num_actors": 2, "batch_size": 16, "rows_per_block": 64, "num_threads": 1}},
        "training": {{"use_text": False}}, "index": {{"embedding": "image"}},
        "cluster": {{"address": address or None}},
    }}), out)
"""


def kind(number):
    return BROKEN[number // 20 % len(BROKEN)] if number % 20 == 0 else "deadly" if number == DEADLY else "good"


def listing(folder):
    """Small pictures, each its own."""
    rng = np.random.default_rng(0)
    lines = ["pano_id,lat,lon,image_uri"]
    images = folder / "images"
    images.mkdir()
    for n in range(NUM):
        coarse = rng.integers(0, 255, (8, 16, 3), dtype=np.uint8)
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(coarse.repeat(16, 0).repeat(16, 1)), quality=70)
        what = kind(n)
        data = {
            "empty": b"", "cut": data[: len(data) // 2], "text": b"<html>no such panorama</html>", "gone": b"",
            "flipped": b"\x89PNG\r\n\x1a\n" + data, "deadly": data + MARK,
        }.get(what, data)  # fmt: skip
        if what != "gone":
            (images / f"{n:05d}.jpg").write_bytes(data)
        lines.append(f"p{n:05d},{1 + n % 60},{1 + n % 170},images/{n:05d}.jpg")
    (folder / "listing.csv").write_text("\n".join(lines) + "\n")
    return folder / "listing.csv"


def start(folder, out, deadly="", address=""):
    command = [sys.executable, str(folder / "job.py"), str(folder / "listing.csv"), str(out), deadly, address]
    with (folder / f"{out.name}.log").open("a") as log:
        return subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)


def processes(*words):
    """Ids of processes whose command line holds all the words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if all(word in text for word in words):
                found.append(int(entry.name))
    return found


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


class Node:
    """A second node of the cluster, whose every process can be killed at once."""

    def __init__(self, folder):
        self.number, self.folder = 0, folder
        self.start()

    def start(self):
        from test_cluster_jobs import free_port

        self.number += 1
        self.temp = f"{self.folder}/n{self.number}"
        command = (
            "ray", "start", "--block", "--disable-usage-stats", "--num-cpus=4", f"--object-store-memory={100 << 20}",
            f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0",
            f"--address={os.environ['HEDWIG_CLUSTER']}", f"--node-ip-address=127.0.1.{10 + self.number}",
            f"--temp-dir={self.temp}",
        )  # fmt: skip
        with open(f"{self.folder}/node{self.number}.log", "w") as log:
            self.process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)

    def kill(self):
        """The raylet, which takes its workers with it, and then the rest."""
        killed = sum(kill(pid) for pid in processes("raylet", self.temp))
        for pid in processes(self.temp):
            kill(pid)
        kill(self.process.pid)
        self.process.wait()
        return killed


def wait_for_progress(out, driver):
    """Until another file of embeddings was written, so that what dies has worked; at most two minutes."""
    folder, deadline = out / ".work" / "embeddings", time.monotonic() + 120
    before = set(folder.rglob("*.parquet"))
    while time.monotonic() < deadline and driver.poll() is None and set(folder.rglob("*.parquet")) <= before:
        time.sleep(0.2)


def chaos(folder):
    """Run as the command of the cluster: kill, and start again, until everything has been killed often enough."""
    rng, out, address = random.Random(0), folder / "disturbed", os.environ["HEDWIG_CLUSTER"]
    temp = os.environ["HEDWIG_CHAOS_TEMP"]
    node, killed = Node(temp), Counter()
    began, driver = time.monotonic(), start(folder, out, "deadly", address)
    wanted = ["worker"] * WORKERS + ["driver"] * DRIVERS + ["node"] * NODES
    rng.shuffle(wanted)
    wait_for_progress(out, driver)
    while wanted and driver.poll() is None:
        what = wanted[0]
        if what == "driver":
            driver.kill()
            driver.wait()
            killed["driver"] += 1
            driver = start(folder, out, "deadly", address)
        elif what == "node":
            if not node.kill():
                continue
            killed["node"] += 1
            node.start()
        else:
            workers = processes("ray::", "GuardedChain")
            if not workers or not kill(rng.choice(workers)):
                time.sleep(0.5)
                continue
            killed["worker"] += 1
        wanted.pop(0)
        wait_for_progress(out, driver)
        time.sleep(rng.uniform(0, 2))
    code = driver.wait()
    node.kill()
    record = {"killed": killed, "left": wanted, "exit_code": code, "seconds": round(time.monotonic() - began)}
    (folder / "record.json").write_text(json.dumps(record))


def test_every_row_is_embedded_or_rejected_once_whatever_is_killed(tmp_path, pytestconfig, request):
    import shutil
    import tempfile

    (tmp_path / "job.py").write_text(textwrap.dedent(JOB))
    listing(tmp_path)
    undisturbed = start(tmp_path, tmp_path / "undisturbed")
    assert undisturbed.wait(3000) == 0, (tmp_path / "undisturbed.log").read_text()[-3000:]
    short = tempfile.mkdtemp(prefix="hc-", dir="/tmp")  # Ray's socket paths have at most 107 characters
    request.addfinalizer(lambda: shutil.rmtree(short, ignore_errors=True))
    script = pytestconfig.rootpath / "cluster_configs" / "local-multinode.sh"
    command = [script, "-n", "0", "-c", "4", "--", sys.executable, __file__, str(tmp_path)]
    env = environment(HEDWIG_CHAOS_TEMP=short, PYTHONPATH=str(Path(__file__).parent))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=4500)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "record.json").read_text())
    sys.__stdout__.write(f"\nchaos: {json.dumps(record)}\n")
    assert record["exit_code"] == 0, (tmp_path / "disturbed.log").read_text()[-4000:]
    if NUM >= 10_000:
        assert record["killed"] == {"driver": DRIVERS, "worker": WORKERS, "node": NODES}

    good = [f"p{n:05d}" for n in range(NUM) if kind(n) == "good"]
    there, quiet = (storage.read_table(str(tmp_path / name)) for name in ("disturbed", "undisturbed"))
    assert there["pano_id"].to_pylist() == good
    rejected = storage.read_table(str(tmp_path / "disturbed" / "rejected"))
    reasons = dict(zip(rejected["pano_id"].to_pylist(), rejected["reason"].to_pylist(), strict=True))
    assert len(reasons) == rejected.num_rows == NUM - len(good)
    by_kind = {what: Counter() for what in (*BROKEN, "deadly")}
    for name, reason in reasons.items():
        by_kind[kind(int(name[1:]))][reason.split(":")[0]] += 1
    sys.__stdout__.write(f"reasons: {json.dumps(by_kind)}\n")
    assert all("not found" in reasons[f"p{n:05d}"] for n in range(NUM) if kind(n) == "gone")
    assert reasons[f"p{DEADLY:05d}"].startswith("killed its worker 2 times")
    assert sum("killed" in reason for reason in reasons.values()) == 1
    manifest = storage.read_manifest(str(tmp_path / "disturbed"))
    assert (manifest.num_in, manifest.num_out, manifest.num_rejected) == (NUM, len(good), NUM - len(good))

    same = quiet.filter([i != f"p{DEADLY:05d}" for i in quiet["pano_id"].to_pylist()])
    assert same["pano_id"].equals(there["pano_id"])
    assert same["content_hash"].equals(there["content_hash"])
    for name in ("image_embedding", "text_embedding"):
        np.testing.assert_allclose(read_vectors(there, name), read_vectors(same, name), atol=1e-5)


if __name__ == "__main__":
    chaos(Path(sys.argv[1]))
