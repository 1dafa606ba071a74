import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image
from test_pipelines_rows import task, write_source

from hedwig import storage
from hedwig.config import EmbedConfig
from hedwig.embed import Embedder
from hedwig.panorama import PanoramaSlicer, Slicing
from hedwig.pipelines.chain import Chain, Step, columns_to_batch, frames_field
from hedwig.pipelines.pools import check_operators, lay_out, split_steps
from hedwig.pipelines.rows import map_rows
from hedwig.pipelines.suspects import DecodeChain, GuardedChain
from hedwig.schema import PANORAMAS, captions_schema, embeddings_schema
from hedwig.sources import ImageReader

SMALL = Slicing(num_frames=2, frame_px=8)
SCHEMA = PANORAMAS.append(pa.field("content_hash", pa.string())).append(pa.field("y", pa.float64()))
REASON = "killed its worker 2 times: the process ended while this row was alone in it"


class Cut:
    """Frames full of the row's latitude; fails, kills its process, or notes in a folder when a batch was cut."""

    reads = ("lat", "pano_id")
    writes = ("frames", "content_hash")

    def __init__(self, *, slicing, bad=(), fatal=(), notes=None):
        self.slicing, self.bad, self.fatal, self.notes = slicing, bad, fatal, notes

    def __call__(self, batch):
        lat, side = batch["lat"], self.slicing.frame_px
        if np.isin(lat, self.fatal).any():
            os._exit(1)
        frames = np.empty((len(lat), self.slicing.num_frames, side, side, 3), np.uint8)
        frames[:] = lat.astype(np.uint8)[:, None, None, None, None]
        failure = np.array([f"no frames: {x:g}" if x in self.bad else None for x in lat], dtype=object)
        hashes = np.array([f"hash of {x:g}" for x in lat], dtype=object)
        note(self.notes, "cut", len(lat))
        return {**batch, "frames": frames, "content_hash": hashes, "failure": failure}


class Use:
    """Reads the latitude off the frames."""

    reads = ("frames", "country")
    writes = ("y",)

    def __init__(self, *, bad=(), fatal=(), notes=None, seconds=0.0):
        self.bad, self.fatal, self.notes, self.seconds, self.seen = bad, fatal, notes, seconds, []

    def __call__(self, batch):
        y = batch["frames"].astype(np.float64).mean(axis=(1, 2, 3, 4))
        if np.isin(y, self.fatal).any():
            os._exit(1)
        self.seen += y.tolist()
        time.sleep(self.seconds * len(y))
        note(self.notes, "used", len(y))
        return {**batch, "y": y, "failure": np.array([f"no y: {v:g}" if v in self.bad else None for v in y], object)}


def note(folder, what, rows):
    """Appended in one write, which is whole on a local disk."""
    if folder is not None:
        with open(os.path.join(folder, f"{what}.txt"), "a", encoding="utf-8") as stream:
            stream.write(f"{time.time():.6f} {rows}\n")


def steps(slicing=SMALL, cut=None, use=None):
    return [Step(Cut, {"slicing": slicing, **(cut or {})}), Step(Use, use or {})]


def table(num):
    rows = [
        {"pano_id": f"p{i}", "lat": float(i), "projection": "equirectangular", "split": "train", "image_uri": f"{i}"}
        for i in range(num)
    ]
    return pa.Table.from_pylist(rows, schema=PANORAMAS)


def apart(**settings):
    return EmbedConfig(**{"decode": "apart", "decode_workers": 1, "rows_per_block": 10, "batch_size": 4, **settings})


def test_one_pool_does_everything_unless_decoding_is_apart():
    layout = lay_out("embeddings", steps(), SCHEMA, PANORAMAS, EmbedConfig(num_gpus=0.5), 1000)
    assert [pool.chain for pool in layout.pools] == [GuardedChain]
    assert layout.budget_bytes is None
    assert layout.text() == "read -> embeddings [Cut, Use] (1 actor of 1 CPU, 0.5 GPU) -> write"


def test_a_call_holds_whole_batches_of_a_block_where_images_are_fetched_ahead():
    settings = EmbedConfig(batch_size=32, read_ahead=2)
    (pool,) = lay_out("embeddings", steps(), SCHEMA, PANORAMAS, settings, 1000).pools
    assert [pool.call_rows(rows) for rows in (256, 250, 31, 1)] == [256, 224, 32, 32]
    framed = pa.schema([*SCHEMA, frames_field(2, 4)])
    for schema, changed in ((SCHEMA, {"read_ahead": 0}), (framed, {})):
        (pool,) = lay_out("x", steps(), schema, PANORAMAS, settings.model_copy(update=changed), 1000).pools
        assert (pool.read_ahead, pool.call_rows(256)) == (0, 32)
    assert all(pool.read_ahead == 0 for pool in lay_out("x", steps(), SCHEMA, PANORAMAS, apart(), 1000).pools)


def test_apart_cpu_workers_cut_and_the_actors_with_gpus_only_embed():
    settings = apart(num_gpus=1.0, decode_workers=2, max_decode_workers=4, max_actors=2, num_cpus=0.5)
    first, last = (layout := lay_out("embeddings", steps(), SCHEMA, PANORAMAS, settings, 1000)).pools
    assert (first.chain, first.num_cpus, first.num_gpus, first.least, first.most) == (DecodeChain, 1.0, 0.0, 2, 4)
    assert (last.chain, last.num_cpus, last.num_gpus, last.least, last.most) == (GuardedChain, 0.5, 1.0, 1, 2)
    assert [[step.stage for step in pool.steps] for pool in layout.pools] == [[Cut], [Use]]
    assert layout.num_workers == 6
    assert layout.text() == (
        "read -> decode [Cut] (2..4 actors of 1 CPU) -> embed [Use] (1..2 actors of 0.5 CPU, 1 GPU) -> write; "
        "frames in blocks of 4 rows, 1024 MB of them at most"
    )
    assert lay_out("embeddings", steps(), SCHEMA, PANORAMAS, settings, 15).num_workers == 4  # there are two blocks


def test_only_what_is_needed_later_goes_between_the_pools():
    first = lay_out("embeddings", steps(), SCHEMA, PANORAMAS, apart(), 10).pools[0]
    assert set(first.schema.names) == {*PANORAMAS.names, "content_hash", "frames"}
    assert first.schema.field("frames").type.byte_width == 2 * 8 * 8 * 3
    few = pa.schema([("pano_id", pa.string()), ("y", pa.float64())])
    first = lay_out("embeddings", steps(), few, PANORAMAS, apart(), 10).pools[0]
    assert set(first.schema.names) == {"pano_id", "country", "frames"}  # Use reads the country


def test_blocks_are_as_small_as_the_budget_asks():
    """One worker and one actor have 8 blocks under way: 8 rows of 8 x 224 x 224 x 3 bytes each fit into 80 MB."""
    large = steps(Slicing(num_frames=8, frame_px=224))
    row = 8 * 224 * 224 * 3
    layout = lay_out("embeddings", large, SCHEMA, PANORAMAS, apart(batch_size=32, frames_budget_mb=80), 10)
    assert (layout.pools[0].batch_size, layout.pools[1].batch_size) == (80_000_000 // (8 * row), 32)
    assert layout.block_bytes == layout.pools[0].batch_size * row
    with pytest.raises(ValueError, match=rf"frames_budget_mb=9 is too little.*Set it to {math.ceil(8 * row / 1e6)} "):
        lay_out("embeddings", large, SCHEMA, PANORAMAS, apart(frames_budget_mb=9), 10)
    assert lay_out("embeddings", large, SCHEMA, PANORAMAS, apart(frames_budget_mb=10), 10).pools[0].batch_size == 1


def test_stages_that_cut_nothing_cannot_be_divided():
    with pytest.raises(ValueError, match=r"needs a stage that cuts frames.*the stages are Use\. Set embed"):
        split_steps([Step(Use)])
    with pytest.raises(ValueError, match="one after it that uses them"):
        split_steps([Step(Cut, {"slicing": SMALL})])


def test_two_chains_give_what_one_gives_and_each_row_keeps_its_reason():
    whole = steps(cut={"bad": (1.0, 4.0)}, use={"bad": (2.0,)})
    first, last = lay_out("embeddings", whole, SCHEMA, PANORAMAS, apart(), 6).pools
    between = Chain(first.steps, first.schema)(table(6))
    second = Chain(last.steps, last.schema)
    out = second(between)
    alone = Chain(whole, SCHEMA)(table(6))
    good = pc.is_null(pc.field("failure"))
    assert out.filter(good).cast(alone.schema).equals(alone.filter(good))
    assert alone["failure"].equals(out["failure"])
    assert out["failure"].to_pylist() == [None, "no frames: 1", "no y: 2", None, "no frames: 4", None]
    assert out["y"].to_pylist() == [0.0, None, None, 3.0, None, 5.0]
    assert second._stages[0].seen == [0.0, 2.0, 3.0, 5.0]  # never a row without frames
    assert (second.spent["rows"], second.spent["rejected"]) == (6, 3)
    nothing = second(Chain(first.steps, first.schema).rejected(table(2), "all lost"))
    assert nothing["failure"].to_pylist() == ["all lost", "all lost"]


def test_a_block_is_as_large_whatever_failed_in_it():
    """Ray cuts blocks by their bytes, and a worker that died must send the same ones again."""
    first = lay_out("embeddings", steps(), SCHEMA, PANORAMAS, apart(), 10).pools[0]
    chain = Chain(first.steps, first.schema)
    fine, lost = chain(table(4)), chain.rejected(table(4), "killed its worker")
    single = pa.concat_tables([chain.rejected(table(1), "x"), *(chain(table(4).slice(i, 1)) for i in (1, 2, 3))])
    target = 4 * 2 * 8 * 8 * 3
    assert all(target < each.nbytes < 1.5 * target for each in (fine, lost, single))


def test_frames_come_back_as_they_were_in_one_chunk_or_several():
    frames = np.random.default_rng(0).integers(0, 256, (5, 2, 8, 8, 3), dtype=np.uint8)
    field = frames_field(2, 8)
    column = pa.FixedSizeBinaryArray.from_buffers(field.type, 5, [None, pa.py_buffer(frames)])
    kept = pa.table([column], schema=pa.schema([field]))
    assert (columns_to_batch(kept.slice(1, 3), ["frames"])["frames"] == frames[1:4]).all()
    parts = pa.concat_tables([kept.slice(3), kept.slice(0, 2)])
    assert (columns_to_batch(parts, ["frames"])["frames"] == frames[[3, 4, 0, 1]]).all()
    assert columns_to_batch(kept.slice(5), ["frames"])["frames"].shape == (0, 2, 8, 8, 3)


def test_a_plan_that_joins_decoding_to_the_model_is_refused():
    layout = lay_out("embeddings", steps(), SCHEMA, PANORAMAS, apart(), 10)
    first, last = "MapBatches(DecodeChain)", "MapBatches(GuardedChain)"
    check_operators(["Input", "ReadParquet", first, last, "Write"], layout)
    check_operators(["Input", "ReadParquet", f"MapBatches(_Keep)->{first}", last, "Write"], layout)
    with pytest.raises(RuntimeError, match=r"and MapBatches\(GuardedChain\) are not operators of their own"):
        check_operators(["Input", "ReadParquet", f"{first}->{last}", "Write"], layout)
    check_operators(["Input", last], lay_out("predictions", steps(), SCHEMA, PANORAMAS, EmbedConfig(), 10))


def embedding_task(folder, pool):
    """24 panoramas on a tiny encoder, one of them broken and one missing."""
    slicing = Slicing(num_frames=4, frame_px=64)
    options = {"encoder_name": "viclip-tiny", "batch_size": 4, "num_frames": 4, "device": "cpu", "num_threads": 1}
    return task(
        folder, kind="embeddings", schema=embeddings_schema(128, 128), pool=pool, max_rejected=2,
        folder=str(folder / f"out-{pool.decode}"),
        steps=[Step(ImageReader), Step(PanoramaSlicer, {"slicing": slicing}), Step(Embedder, options)],
    )  # fmt: skip


def write_images(folder, num):
    rng, rows = np.random.default_rng(0), []
    for i in range(num):
        path = folder / f"{i:03d}.jpg"
        Image.fromarray(rng.integers(0, 255, (8, 16, 3), dtype=np.uint8)).resize((256, 128)).save(path, quality=90)
        rows.append(
            {"pano_id": f"p{i:03d}", "projection": "equirectangular", "split": "train", "image_uri": str(path),
             "caption": f"place {i % 5}", "caption_num_tokens": 2}
        )  # fmt: skip
    (folder / "003.jpg").write_bytes((folder / "003.jpg").read_bytes()[:300])
    (folder / "010.jpg").unlink()
    storage.write_table(str(folder / "in" / "part-0.parquet"), pa.Table.from_pylist(rows, schema=captions_schema()))


def test_both_layouts_give_the_same_bytes_and_only_apart_has_two_operators(tmp_path, ray_session):
    write_images(tmp_path, 24)
    tables, measured, rejected = [], [], []
    for pool in (EmbedConfig(batch_size=4, rows_per_block=12), apart(rows_per_block=12, frames_budget_mb=2)):
        asked = embedding_task(tmp_path, pool)
        manifest = map_rows(asked)
        assert (manifest.num_in, manifest.num_out, manifest.num_rejected) == (24, 22, 2)
        tables.append(storage.read_table(asked.folder).sort_by("pano_id"))
        bad = storage.read_table(storage.join(asked.folder, "rejected")).sort_by("pano_id")
        rejected.append(bad.select(["pano_id", "image_uri", "reason"]).to_pylist())
        measured.append(manifest.details["measured"])
        assert len(list(Path(asked.folder).glob("part-*"))) == 2  # a file for each block of 12, not for each of frames
    assert tables[0].equals(tables[1])
    assert rejected[0] == rejected[1]
    assert [row["pano_id"] for row in rejected[0]] == ["p003", "p010"]
    one, two = ([name for name in each["operators"] if "Chain" in name] for each in measured)
    assert one == ["MapBatches(GuardedChain)"]
    assert two == ["MapBatches(DecodeChain)", "MapBatches(GuardedChain)"]
    assert [(each["rows"], each["rejected"], each["workers"]) for each in measured] == [(24, 2, 1), (24, 2, 2)]
    assert measured[1]["wall_s"].keys() == {"ImageReader", "PanoramaSlicer", "Embedder"}
    assert measured[1]["bytes_in"] == measured[0]["bytes_in"] > 0
    assert measured[1]["plan"].startswith("read -> decode [ImageReader, PanoramaSlicer] (1 actor of 1 CPU) -> embed")


def most_frames(folder):
    """The most rows that were cut and not yet used, from the notes of both sides."""
    events = []
    for what, sign in (("cut", 1), ("used", -1)):
        lines = [line.split() for line in (folder / f"{what}.txt").read_text().splitlines()]
        events += [(float(at), sign * int(rows)) for at, rows in lines]
    return int(np.cumsum([rows for _, rows in sorted(events)]).max())


@pytest.mark.parametrize("rows_at_most", [16, pytest.param(60, marks=pytest.mark.slow)])
def test_frames_in_the_store_stay_within_the_budget(tmp_path, ray_session, rows_at_most):
    """Cutting takes no time and using them 30 ms a row, so that without a limit nearly all rows wait at once."""
    slicing = Slicing(num_frames=8, frame_px=144)
    row = 8 * 144 * 144 * 3
    write_source(str(tmp_path / "in"), 60)
    whole = steps(slicing, {"notes": str(tmp_path)}, {"notes": str(tmp_path), "seconds": 0.03})
    budget = math.ceil(rows_at_most * row / 1e6) if rows_at_most < 60 else 1000
    pool = apart(rows_per_block=30, batch_size=2, frames_budget_mb=budget)
    manifest = map_rows(task(tmp_path, steps=whole, schema=SCHEMA, pool=pool))
    assert (manifest.num_in, manifest.num_out) == (60, 60)
    assert storage.read_table(str(tmp_path / "out"))["y"].to_pylist() == [float(i) for i in range(60)]
    assert (most_frames(tmp_path) <= 16) == (rows_at_most == 16)


@pytest.mark.slow  # every death costs the start of a worker
@pytest.mark.timeout(900)
def test_rows_that_kill_either_worker_are_rejected_and_their_neighbours_go_on(tmp_path, ray_session):
    write_source(str(tmp_path / "in"), 60)
    whole = steps(cut={"fatal": (5.0,), "bad": (7.0,)}, use={"fatal": (33.0,), "bad": (8.0,)})
    manifest = map_rows(task(tmp_path, steps=whole, schema=SCHEMA, pool=apart(rows_per_block=30), max_rejected=4))
    assert (manifest.num_in, manifest.num_out, manifest.num_rejected) == (60, 56, 4)
    rejected = storage.read_table(str(tmp_path / "out" / "rejected")).sort_by("pano_id")
    assert rejected["pano_id"].to_pylist() == ["p0005", "p0007", "p0008", "p0033"]
    reasons = rejected["reason"].to_pylist()
    assert [reason.split(":")[0] for reason in reasons] == [
        "killed its worker 2 times", "no frames", "no y", "killed its worker 2 times",
    ]  # fmt: skip
    assert reasons[0].startswith(REASON)
    done = storage.read_table(str(tmp_path / "out")).sort_by("pano_id")
    assert done["y"].to_pylist() == [float(i) for i in range(60) if i not in (5, 7, 8, 33)]
    assert done["content_hash"].to_pylist()[-1] == "hash of 59"


DRIVER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from hedwig.config import ClusterConfig
    from hedwig.pipelines.cluster import ray_running
    from hedwig.pipelines.rows import map_rows
    from test_pipelines_pools import SCHEMA, apart, steps, task

    with ray_running(ClusterConfig()):
        whole = steps(use={{"seconds": 0.1}})
        map_rows(task(Path({folder!r}), steps=whole, schema=SCHEMA, pool=apart()))
"""


@pytest.mark.slow  # a Ray of its own
@pytest.mark.timeout(600)
def test_sigkill_of_the_driver_loses_and_doubles_nothing(tmp_path, ray_session):
    write_source(str(tmp_path / "in"), 120)
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER.format(tests=os.path.dirname(__file__), folder=str(tmp_path))))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    with open(tmp_path / "driver.log", "w", encoding="utf-8") as log:
        driver = subprocess.Popen(
            [sys.executable, str(script)], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    staging = tmp_path / "out" / ".staging"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and driver.poll() is None and len(list(staging.glob("*/*.parquet"))) < 3:
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    log = (tmp_path / "driver.log").read_text()
    assert 0 < len(list(staging.glob("*/*.parquet"))) < 12, f"the driver was to be killed in the middle of it:\n{log}"
    manifest = map_rows(task(tmp_path, steps=steps(), schema=SCHEMA, pool=apart()))
    assert (manifest.num_in, manifest.num_out) == (120, 120)
    assert manifest.details["measured"]["rows"] < 120  # what was there before is not done again
    done = storage.read_table(str(tmp_path / "out")).sort_by("pano_id")
    assert done["y"].to_pylist() == [float(i) for i in range(120)]
