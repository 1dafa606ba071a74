"""Jobs on clusters made of real Ray nodes on this machine: two nodes with a token, and GPU nodes that come and go.

Slow (minutes): .venv/bin/pytest -m slow tests/test_cluster_jobs.py
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from hedwig import storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

BIN = Path(sys.executable).parent
STAGES = ("panoramas", "captions", "embeddings", "geocells", "geolocator", "index", "predictions")


def tiny(output, num):
    return {
        "name": "tiny",
        "output": str(output),
        "data": {
            "synthetic": {"num": num, "width": 256, "seed": 3},
            "split": {"block_km": 300, "buffer_km": 1, "val_fraction": 0.15, "test_fraction": 0.25},
        },
        "encoder": {"name": "viclip-tiny"},
        "embed": {"num_actors": 2, "rows_per_block": 16, "batch_size": 8, "num_threads": 1},
        "geocells": {"min_panoramas": 4, "max_panoramas": 12},
        "training": {"projection_dim": 32, "hidden_dim": 0, "epochs": 2, "tau_km": 500},
        "evaluate": {"num_bootstrap": 20},
    }


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")}
    path = os.pathsep.join([str(BIN), kept["PATH"]])
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", **more}


def run(*command, env=None, timeout=1800):
    done = subprocess.run(command, env=env or environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def table(folder):
    """The rows in one order, without where the images lie and when they were written: each run has its own."""
    found = storage.read_table(str(folder)).sort_by("pano_id")
    return found.drop_columns([name for name in ("image_uri", "image_stamp") if name in found.column_names])


def test_a_job_on_two_nodes_makes_what_a_local_run_makes(tmp_path, pytestconfig):
    there, here = tmp_path / "there", tmp_path / "here"
    for output in (there, here):
        (tmp_path / f"{output.name}.yaml").write_text(yaml.safe_dump(tiny(output, 48)))
    script = pytestconfig.rootpath / "cluster_configs" / "local-multinode.sh"
    # The same command twice: the second finds everything up to date. Then a job that fails, and a wrong token.
    commands = (
        'set -e; hedwig submit "$0"; hedwig submit "$0" --json >"$1" 2>"$1.log"; '
        'hedwig submit "$0" data.panoramas=/not/there.csv data.synthetic=null && exit 9 || test $? -eq 2; '
        "env -u RAY_AUTH_TOKEN_PATH RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef "
        'hedwig submit --status x 2>"$1.refused" && exit 9 || test $? -eq 1'
    )
    done = run(
        script, "-n", "1", "-c", "3", "--", "bash", "-c", commands, str(tmp_path / "there.yaml"), str(tmp_path / "b")
    )
    assert "Running entrypoint for job tiny-" in done.stdout
    assert "nothing to do" in (tmp_path / "b.log").read_text()
    record = json.loads((tmp_path / "b").read_text())
    assert (record["status"], record["exit_code"], record["output"]) == ("SUCCEEDED", 0, str(there))
    assert "refused the token" in (tmp_path / "b.refused").read_text()

    run("hedwig", "run", str(tmp_path / "here.yaml"), "--quiet")
    for name in STAGES:
        ours, theirs = (json.loads((output / name / "manifest.json").read_text()) for output in (here, there))
        assert (ours["num_in"], ours["num_out"]) == (theirs["num_in"], theirs["num_out"])
        if name in ("geocells", "index"):
            assert ours["files"] == theirs["files"]
    for name in ("captions", "embeddings", "predictions"):
        assert table(here / name).equals(table(there / name)), name
    model = "geolocator/model.safetensors"
    assert (here / model).read_bytes() == (there / model).read_bytes()


# Prints the number of live nodes with a GPU, twice a second.
COUNT = """
import sys, time
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
while True:
    nodes = client.get_all_node_info().values()
    print(sum(1 for node in nodes if node.state == 0 and node.resources_total.get("GPU", 0) > 0), flush=True)
    time.sleep(0.5)
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


@contextmanager
def autoscaling_head(folder):
    """A head without GPUs whose autoscaler starts nodes with one, as processes on this machine."""
    from ray._private.services import get_node_ip_address
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    port, client, agent = (free_port() for _ in range(3))
    gcs = f"{get_node_ip_address()}:{port}"
    node = {"min_workers": 0, "node_config": {}}
    config = {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 0.4,
        "upscaling_speed": 10.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs,
            "launch_multiple": True,  # else one node, however many are asked for
        },
        "auth": {},
        # Ray fills in nothing for a provider that it does not know.
        **{f"{when}setup_commands": [] for when in ("", "head_", "worker_")},
        **{f"{node}_start_ray_commands": [] for node in ("head", "worker")},
        "initialization_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "available_node_types": {
            # The provider knows its head by this name.
            "ray.head.default": {**node, "resources": {"CPU": 3}, "max_workers": 0},
            "gpu": {**node, "resources": {"CPU": 1, "GPU": 1}, "labels": {"hedwig": "embed"}, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
    }
    (folder / "autoscaler.yaml").write_text(yaml.safe_dump(config))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    # As ray.cluster_utils.AutoscalingCluster does, which cannot be used: its template is not in the wheel, and it ends
    # every Ray of the machine. Without the two ids the autoscaler never takes the head for its own, and adds nothing.
    autoscaled = {
        "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    command = (
        "ray", "start", "--head", "--block", f"--port={port}", f"--ray-client-server-port={client}",
        "--include-dashboard=false", f"--dashboard-agent-listen-port={agent}",
        "--min-worker-port=0", "--max-worker-port=0", "--num-cpus=3", f"--object-store-memory={100 << 20}",
        "--disable-usage-stats", f"--temp-dir={folder / 'r'}", f"--autoscaling-config={folder / 'autoscaler.yaml'}",
    )  # fmt: skip

    def started():
        with (folder / "head.log").open("w") as log:
            head = subprocess.Popen(command, env={**env, **autoscaled}, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline and head.poll() is None:
            if "Ray runtime started" in (folder / "head.log").read_text():
                return head
            time.sleep(0.5)
        stop(head)
        return None

    def stop(head):
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(60)
        except subprocess.TimeoutExpired:
            head.kill()
            head.wait()

    # Ray gives a raylet 30 s to start, fixed: on a busy machine that takes more than one attempt.
    head = started() or started() or started()
    assert head is not None, (folder / "head.log").read_text()[-3000:]
    try:
        yield gcs, env
    finally:
        stop(head)


def test_gpu_nodes_come_for_an_embedding_job_and_go_after_it(tmp_path_factory, request, record_property):
    folder = Path(f"/tmp/hedwig-as-{os.getpid()}")  # short: Ray's socket paths have at most 107 characters
    folder.mkdir(mode=0o700)
    request.addfinalizer(lambda: shutil.rmtree(folder, ignore_errors=True))
    work = tmp_path_factory.mktemp("scaling")
    settings = tiny(work / "run", 40)
    settings["embed"] |= {"num_gpus": 1.0, "num_cpus": 0.5}
    (work / "x.yaml").write_text(yaml.safe_dump(settings))
    with (
        autoscaling_head(folder) as (gcs, env),
        subprocess.Popen((sys.executable, "-c", COUNT, gcs), env=env, stdout=subprocess.PIPE, text=True) as counter,
    ):
        command = ("hedwig", "run", str(work / "x.yaml"), "--until", "embed", f"cluster.address={gcs}")
        seen, began, ended, job = [], time.monotonic(), None, None
        with (work / "job.log").open("w") as log:
            for line in counter.stdout:
                now, num = round(time.monotonic() - began, 1), int(line)
                if not seen or num != seen[-1][1]:
                    seen.append((now, num))
                if job is None:
                    began = time.monotonic()
                    job = subprocess.Popen(command, env=env, stdout=log, stderr=log)
                elif ended is None and job.poll() is not None:
                    ended = now
                if (ended is not None and num == 0) or now > 1500:
                    break
        counter.kill()
        assert job is not None, "nobody counted the nodes"
        if job.poll() is None:
            job.kill()
            job.wait()
        assert job.returncode == 0, (work / "job.log").read_text()[-4000:]
        record = {"gpu_nodes": seen, "job_ended_s": ended}
        record_property("autoscaling", record)
        sys.__stdout__.write(f"\nautoscaling: {json.dumps(record)}\n")
    assert max(num for _, num in seen) == 2, (seen, (work / "job.log").read_text()[-4000:])
    assert seen[-1][1] == 0
    manifest = storage.read_manifest(str(work / "run" / "embeddings"))
    assert (manifest.num_in, manifest.num_out) == (40, 40)
