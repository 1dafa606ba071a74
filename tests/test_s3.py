"""The job on a real object store, undisturbed and through a proxy that fails every tenth request.

Needs a server that the ``AWS_ENDPOINT_URL`` variable names, with ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``;
older stores also want ``AWS_REQUEST_CHECKSUM_CALCULATION=when_required``. Run it with ``make s3-test``.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from faulty_proxy import FaultyProxy

from hedwig import faults, storage
from hedwig.config import EmbedConfig
from hedwig.embed import Embedder
from hedwig.panorama import PanoramaSlicer, Slicing
from hedwig.pipelines import rows
from hedwig.pipelines.chain import Chain, Step
from hedwig.schema import PANORAMAS, embeddings_schema
from hedwig.sources import ImageReader
from hedwig.vectors import read_vectors

NUM = 40
pytestmark = [
    pytest.mark.s3,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:Please install grpcio-status:ImportWarning"),  # smart_open asks for gs:// too
]

DRIVER = """
    import json, sys
    from hedwig import faults, storage
    from hedwig.config import ClusterConfig, EmbedConfig
    from hedwig.embed import Embedder
    from hedwig.panorama import PanoramaSlicer, Slicing
    from hedwig.pipelines.chain import Step
    from hedwig.pipelines.cluster import ray_running
    from hedwig.pipelines.rows import RowsTask, map_rows
    from hedwig.schema import embeddings_schema
    from hedwig.sources import ImageReader

    source, folder = sys.argv[1:]
    steps = [
        Step(ImageReader, {"num_threads": 4}),
        Step(PanoramaSlicer, {"slicing": Slicing(frame_px=64)}),
        Step(Embedder, {"encoder_name": "viclip-tiny", "batch_size": 4, "device": "cpu"}),
    ]
    with ray_running(ClusterConfig(num_cpus=4)):
        manifest = map_rows(RowsTask(
            kind="embeddings", source=source, folder=folder, steps=steps, schema=embeddings_schema(128, 128),
            config={}, inputs={}, pool=EmbedConfig(rows_per_block=4, batch_size=4), max_rejected=0,
        ))
    print(json.dumps({"num_out": manifest.num_out, "retries": faults.num_retries()}))
"""


@pytest.fixture(scope="module")
def endpoint():
    url = os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        pytest.skip("no object store: set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return url


@pytest.fixture(scope="module")
def bucket(endpoint):
    """A bucket with the panoramas and their table."""
    import boto3

    from hedwig.benchmark.preprocessing import synthetic_panoramas

    name = f"hedwig-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    images = synthetic_panoramas(4)
    for i in range(NUM):
        storage.write_bytes(f"s3://{name}/images/{i:03d}.jpg", images[i % 4])
    found = storage.list_files(f"s3://{name}/images", suffix=".jpg")
    assert found == [f"s3://{name}/images/{i:03d}.jpg" for i in range(NUM)]
    rows = [
        {"pano_id": f"p{i:03d}", "projection": "equirectangular", "split": "train", "image_uri": uri}
        for i, uri in enumerate(found)
    ]
    table = pa.Table.from_pylist(rows, schema=PANORAMAS)
    table = table.append_column("caption", pa.array([f"street {i}" for i in range(NUM)]))
    table = table.append_column("caption_num_tokens", pa.array([4] * NUM, pa.int32()))
    storage.write_table(f"s3://{name}/source/part-0.parquet", table)
    return f"s3://{name}"


def start(tmp_path, bucket, folder, url):
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    environment = {**os.environ, "AWS_ENDPOINT_URL": url, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), f"{bucket}/source", f"{bucket}/{folder}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def finish(driver):
    out, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0
    return json.loads(out.splitlines()[-1])


def test_the_job_gives_the_same_bytes_through_faults_and_kills(tmp_path, endpoint, bucket):
    assert finish(start(tmp_path, bucket, "plain", endpoint))["num_out"] == NUM
    plain = storage.read_table(f"{bucket}/plain")
    assert storage.read_manifest(f"{bucket}/plain").num_out == NUM
    with FaultyProxy(endpoint, share=0.1) as proxy:
        first = start(tmp_path, bucket, "faulty", proxy.url)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and first.poll() is None:
            if len(storage.list_files(f"{bucket}/faulty/.staging", suffix=".parquet", recursive=True)) >= 2:
                break
            time.sleep(0.3)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        result = finish(start(tmp_path, bucket, "faulty", proxy.url))  # at once: the dead driver's workers still live
        assert result["num_out"] == NUM
        assert set(proxy.faults) >= {"500", "503", "silence"}
        assert sum(proxy.faults.values()) > 0.05 * proxy.num_requests
        (tmp_path / "faults.json").write_text(
            json.dumps({**proxy.faults, "requests": proxy.num_requests, "retries": result["retries"]})
        )
    faulty = storage.read_table(f"{bucket}/faulty")
    assert faulty["pano_id"].to_pylist() == plain["pano_id"].to_pylist() == [f"p{i:03d}" for i in range(NUM)]
    assert faulty["content_hash"].equals(plain["content_hash"])
    for name in ("image_embedding", "text_embedding"):
        np.testing.assert_array_equal(read_vectors(faulty, name), read_vectors(plain, name))
    assert storage.read_manifest(f"{bucket}/faulty").num_out == NUM
    left = storage.list_files(f"{bucket}/faulty", recursive=True)
    assert not [path for path in left if not path.endswith((".parquet", "manifest.json"))]


def test_a_listing_is_embedded_from_the_store_into_the_store(bucket):
    lines = [f"p{i:03d},{1 + i},{1 + i},{bucket}/images/{i:03d}.jpg" for i in range(6)]
    text = "\n".join(["pano_id,lat,lon,image_uri", *lines, f"gone,1,2,{bucket}/images/none.jpg", ""])
    storage.write_bytes(f"{bucket}/listings/some.csv", text.encode())
    command = [
        sys.executable, "-c", "from hedwig.cli import main; main()", "embed", f"{bucket}/listings/some.csv",
        "embed.batch_size=2", "--model", "viclip-tiny", "--out", f"{bucket}/tables/some", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    result = json.loads(done.stdout)
    assert (result["output"], result["num_in"], result["num_out"]) == (f"{bucket}/tables/some", 7, 6)
    table = storage.read_table(f"{bucket}/tables/some")
    assert table["pano_id"].to_pylist() == [f"p{i:03d}" for i in range(6)]
    work = storage.read_manifest(f"{bucket}/tables/some/.work/embeddings")
    assert work.num_out == 6
    rejected = storage.read_table(f"{bucket}/tables/some/rejected")
    assert rejected["pano_id"].to_pylist() == ["gone"]


def steps():
    return [
        Step(ImageReader, {"num_threads": 4}),
        Step(PanoramaSlicer, {"slicing": Slicing(frame_px=64), "num_threads": 1}),
        Step(Embedder, {"encoder_name": "viclip-tiny", "batch_size": 4, "device": "cpu"}),
    ]


def test_staging_resume_and_publication_through_faults_without_ray(endpoint, bucket, monkeypatch):
    """The same flow with the chain in this process, broken off in the middle."""
    blocks = iter([99, 3, 99])

    def in_process(task, ids, done, staged, progress):
        table = storage.read_table(task.source)
        table = table.filter(pc.invert(pc.is_in(table["pano_id"], pa.array(sorted(done), pa.string()))))
        chain, most = Chain(task.steps, task.schema), next(blocks)
        for number, start in enumerate(range(0, table.num_rows, 4)):
            if number == most:
                raise InterruptedError("killed")
            name = f"{uuid.uuid4().hex}_{number:06}-0.parquet"
            storage.write_table(storage.join(staged.staging, name), chain(table.slice(start, 4)))
        return {}

    def embed(folder):
        return rows.map_rows(
            rows.RowsTask(
                kind="embeddings", source=f"{bucket}/source", folder=f"{bucket}/{folder}", steps=steps(),
                schema=embeddings_schema(128, 128), config={}, inputs={}, pool=EmbedConfig(), max_rejected=0,
            )
        )  # fmt: skip

    monkeypatch.setattr(rows, "_measured_run", in_process)
    assert embed("direct").num_out == NUM
    direct = storage.read_table(f"{bucket}/direct")
    with FaultyProxy(endpoint, share=0.1, seed=2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        before = faults.num_retries()
        with pytest.raises(InterruptedError):
            embed("broken")
        manifest = embed("broken")
        broken = storage.read_table(f"{bucket}/broken")
        assert sum(proxy.faults.values()) > 0.05 * proxy.num_requests
        assert faults.num_retries() > before
    assert (manifest.num_in, manifest.num_out, manifest.num_rejected) == (NUM, NUM, 0)
    assert broken["pano_id"].equals(direct["pano_id"])
    assert broken["content_hash"].equals(direct["content_hash"])
    for name in ("image_embedding", "text_embedding"):
        np.testing.assert_array_equal(read_vectors(broken, name), read_vectors(direct, name))


def test_single_calls_are_tried_again_and_counted(endpoint, bucket, monkeypatch):
    with FaultyProxy(endpoint, share=0.4, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr(faults, "FIRST_PAUSE_S", 0.01)
        before = faults.num_retries()
        contents = [storage.read_bytes(f"{bucket}/images/{i:03d}.jpg") for i in range(12)]
        retries = faults.num_retries() - before
        with pytest.raises(FileNotFoundError, match="no image file"):
            storage.read_bytes(f"{bucket}/images/none.jpg")
        assert len(storage.list_files(f"{bucket}/images")) == NUM
        storage.write_bytes(f"{bucket}/new/a", contents[0])
        storage.copy_file(f"{bucket}/new/a", f"{bucket}/new/b")
        assert storage.read_bytes(f"{bucket}/new/b") == contents[0]
        storage.delete(f"{bucket}/new")
        assert storage.list_files(f"{bucket}/new") == []
    assert contents[0] == contents[4] == contents[8]
    assert len(set(contents)) == 4
    assert retries >= 3  # each fault of a read: there is no other layer that would hide one
