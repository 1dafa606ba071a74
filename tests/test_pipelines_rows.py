import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pyarrow as pa
import pytest

from hedwig import storage
from hedwig.config import EmbedConfig
from hedwig.pipelines.chain import Step
from hedwig.pipelines.rows import RowsTask, TooManyRejected, enforce_max_rejected, map_rows
from hedwig.schema import PANORAMAS

SCHEMA = PANORAMAS.append(pa.field("y", pa.float64()))


class Square:
    reads = ("lat",)
    writes = ("y",)

    def __init__(self, *, bad=()):
        self.bad = bad

    def __call__(self, batch):
        failure = np.array([f"bad luck: {x:g}" if x in self.bad else None for x in batch["lat"]], dtype=object)
        return {**batch, "y": batch["lat"] ** 2, "failure": failure}


def write_source(folder, num):
    rows = [
        {"pano_id": f"p{i:04d}", "lat": float(i), "lon": 0.0, "projection": "equirectangular",
         "split": "train" if i % 2 else "test", "image_uri": f"{i}.jpg"}
        for i in range(num)
    ]  # fmt: skip
    storage.write_table(os.path.join(folder, "part-00000.parquet"), pa.Table.from_pylist(rows, schema=PANORAMAS))


def task(tmp_path, **changes):
    settings = {
        "kind": "squares",
        "source": str(tmp_path / "in"),
        "folder": str(tmp_path / "out"),
        "steps": [Step(Square)],
        "schema": SCHEMA,
        "config": {},
        "inputs": {},
        "pool": EmbedConfig(rows_per_block=10, batch_size=4),
        "max_rejected": 0.1,
    }
    return RowsTask(**{**settings, **changes})


def test_rows_come_out_once_and_bad_ones_are_kept(tmp_path, ray_session):
    write_source(str(tmp_path / "in"), 40)
    seen = []
    manifest = map_rows(task(tmp_path, steps=[Step(Square, {"bad": (3.0, 17.0)})]), lambda *counts: seen.append(counts))
    assert (manifest.num_in, manifest.num_out, manifest.num_rejected) == (40, 38, 2)
    assert manifest.rejected_reasons == {"bad luck": 2}
    table = storage.read_table(str(tmp_path / "out"))
    assert table.schema.remove_metadata() == SCHEMA
    assert table["y"].to_pylist() == [float(i) ** 2 for i in range(40) if i not in (3, 17)]
    rejected = storage.read_table(str(tmp_path / "out" / "rejected"))
    assert rejected["pano_id"].to_pylist() == ["p0003", "p0017"]
    assert rejected["reason"].to_pylist() == ["bad luck: 3", "bad luck: 17"]
    assert rejected["image_uri"].to_pylist() == ["3.jpg", "17.jpg"]
    assert not [n for n in os.listdir(tmp_path / "out") if n in (".staging", ".checkpoint")]
    # A killed run left this: parts that are finished, and no manifest. Nothing is computed again.
    (tmp_path / "out" / "manifest.json").unlink()
    again = map_rows(task(tmp_path, steps=[Step(Square, {"bad": (17.0, *range(4, 16))})]))
    assert (again.num_out, again.num_rejected) == (39, 1)  # only the two rejected rows were tried again


def test_only_the_splits_asked_for(tmp_path, ray_session):
    write_source(str(tmp_path / "in"), 12)
    manifest = map_rows(task(tmp_path, keep=("test",)))
    assert (manifest.num_in, manifest.num_out) == (6, 6)
    assert set(storage.read_table(str(tmp_path / "out"))["split"].to_pylist()) == {"test"}


def test_too_many_rejected_is_fatal_and_loses_nothing(tmp_path, ray_session):
    write_source(str(tmp_path / "in"), 20)
    steps = [Step(Square, {"bad": (1.0, 2.0, 3.0)})]
    with pytest.raises(TooManyRejected, match=r"squares: 3 of 20 rows were rejected.*allows 2.*3 x bad luck"):
        map_rows(task(tmp_path, steps=steps))
    assert storage.read_manifest(str(tmp_path / "out")) is None
    manifest = map_rows(task(tmp_path, steps=steps, max_rejected=3))  # a count now
    assert (manifest.num_out, manifest.num_rejected) == (17, 3)


def test_other_settings_do_not_continue_old_work(tmp_path, ray_session):
    write_source(str(tmp_path / "in"), 10)
    map_rows(task(tmp_path))
    (tmp_path / "out" / "manifest.json").unlink()
    manifest = map_rows(task(tmp_path, config={"other": 1}, steps=[Step(Square, {"bad": (5.0,)})]))
    assert manifest.num_rejected == 1


def test_the_limit_is_a_share_or_a_count():
    enforce_max_rejected("t", 5, 100, 0.05, {})
    enforce_max_rejected("t", 5, 100, 5, {})
    with pytest.raises(TooManyRejected):
        enforce_max_rejected("t", 6, 100, 0.05, {"r": 6})
    with pytest.raises(TooManyRejected):
        enforce_max_rejected("t", 1, 100, 0.0, {"r": 1})


DRIVER = """
    import sys, time
    import numpy as np
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from hedwig.config import ClusterConfig
    from hedwig.pipelines.cluster import ray_running
    from hedwig.pipelines.chain import Step
    from hedwig.pipelines.rows import map_rows
    from test_pipelines_rows import task, Square

    class Slow(Square):
        def __call__(self, batch):
            time.sleep(0.15)
            return super().__call__(batch)

    with ray_running(ClusterConfig()):
        map_rows(task(Path({folder!r}), steps=[Step(Slow)]))
"""


def test_sigkill_of_the_driver_loses_and_doubles_nothing(tmp_path, ray_session):
    write_source(str(tmp_path / "in"), 160)
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER.format(tests=os.path.dirname(__file__), folder=str(tmp_path))))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    driver = subprocess.Popen([sys.executable, str(script)], env=environment, start_new_session=True)
    staging = tmp_path / "out" / ".staging"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and driver.poll() is None:
        if staging.is_dir() and len(list(staging.glob("*/*.parquet"))) >= 3:
            break
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    done_before = len(list(staging.glob("*/*.parquet")))
    assert 0 < done_before < 16, "the driver was to be killed in the middle of its work"
    manifest = map_rows(task(tmp_path, steps=[Step(Square)]))
    assert (manifest.num_in, manifest.num_out) == (160, 160)
    ids = storage.read_table(str(tmp_path / "out"))["pano_id"].to_pylist()
    assert ids == [f"p{i:04d}" for i in range(160)]
