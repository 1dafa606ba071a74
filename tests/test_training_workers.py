"""Whatever the number of workers, and wherever rows come from, the same is learnt; fewer go on where one is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from hedwig.benchmark.train import synthetic_table
from hedwig.geocells import Geocells
from hedwig.storage import read_table
from hedwig.training import head, train_geolocator
from hedwig.training.rows import StreamedRows, make_plan

ROWS, DIM, CELLS = 960, 32, 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    synthetic_table(str(folder), num_rows=ROWS, dim=DIM, num_cells=CELLS)
    return folder


def curve(world: Path, tmp_path: Path, **options) -> list[float]:
    """The training loss of every epoch."""
    defaults = {
        "projection_dim": 16,
        "tau_km": 2000.0,
        "epochs": 6,
        "batch_size": 96,
        "learning_rate": 3e-3,
        "num_workers": 0,
        "checkpoint_interval_s": 0.0,
    }
    train_geolocator(
        embeddings=str(world / "embeddings"),
        geocells=str(world / "geocells"),
        output=str(tmp_path / "out"),
        scratch=str(tmp_path / "scratch"),
        run_name="run",
        **{**defaults, **options},
    )
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


class Shard:
    """A worker's share of a dataset, as Ray hands it out."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def iter_batches(self, *, batch_size, batch_format, local_shuffle_buffer_size, local_shuffle_seed):
        assert batch_format == "pyarrow"
        assert local_shuffle_buffer_size >= 2 * batch_size
        order = np.random.default_rng(local_shuffle_seed).permutation(len(self.table))
        for start in range(0, len(order), batch_size):
            yield self.table.take(order[start : start + batch_size])


def test_streamed_rows_are_those_of_the_table(world):
    cells = Geocells.load(str(world / "geocells"))
    plan = make_plan(str(world / "embeddings"), cells, image_column="image_embedding", text_column="text_embedding")
    table = read_table(str(world / "embeddings"))
    ids = pa.array(cells.assign(table["lat"].to_numpy(), table["lon"].to_numpy()))
    rows = StreamedRows(plan, Shard(table.append_column("cell_id", ids)))
    batches = list(rows.batches(100, num_rows=950, seed=3))
    assert [len(batch.lat) for batch in batches] == [100] * 9 + [50]
    kept = head.CachedRows(plan, "train", rank=0, world=1)
    place = {tuple(row): i for i, row in enumerate(kept.image.tolist())}
    seen = set()
    for batch in batches:
        at = [place[tuple(row)] for row in batch.image.tolist()]
        seen.update(at)
        for name in ("text", "cell_ids", "lat", "lon"):
            assert torch.equal(getattr(batch, name), getattr(kept, name)[at])
    assert len(seen) == 950
    first, again, other = (next(rows.batches(100, num_rows=950, seed=seed)).lat for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def only_streaming(settings: dict) -> None:
    """The worker of `hedwig.training.head`, where training rows may not be kept."""
    from hedwig.training import head

    kept = head.CachedRows

    class NoneOfTraining(kept):
        def __init__(self, plan, split, **share):
            if split == "train":
                raise AssertionError("the training rows were to be streamed")
            super().__init__(plan, split, **share)

    head.CachedRows = NoneOfTraining
    original(settings)


original = head._worker


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_table_above_the_budget_is_streamed_and_gives_the_same_curve(
    world, tmp_path, ray_session, monkeypatch, num_workers
):
    small = ROWS * DIM * 4 / 2**30 / num_workers * 0.99  # GiB per worker, a hundredth too little
    # A batch of all rows: what is learnt depends on the rows, and not on their order.
    for batch_size, tolerance in ((ROWS, 1e-4), (96, 0.03)):
        here = tmp_path / str(batch_size)
        kept = curve(world, here / "kept", batch_size=batch_size, memory_budget_gib=small / 0.98)
        with monkeypatch.context() as patch:
            patch.setattr(head, "_worker", only_streaming)
            streamed = curve(
                world, here / "streamed", batch_size=batch_size, num_workers=num_workers, memory_budget_gib=small
            )
        assert streamed == pytest.approx(kept, rel=tolerance)
        assert kept == sorted(kept, reverse=True)  # something is learnt in every epoch
        assert kept[-1] < (0.99 if batch_size == ROWS else 0.95) * kept[0]


@pytest.mark.slow
def test_two_workers_give_the_curve_of_one(world, tmp_path, ray_session):
    """With batches of a tenth of the rows, which are not the same rows then: the curves are close, not equal."""
    one, two = (curve(world, tmp_path / str(n), num_workers=n, epochs=8) for n in (1, 2))
    assert two == pytest.approx(one, rel=0.03)
    assert one[-1] < 0.9 * one[0]
    alone = curve(world, tmp_path / "here", num_workers=0, epochs=8)
    assert one == pytest.approx(alone, rel=1e-5)


SCRIPT = """
import json, os, sys, threading, time
from pathlib import Path
sys.path.insert(0, {tests!r})
os.environ["PYTHONPATH"] = {tests!r}
import ray
from ray.cluster_utils import Cluster
import test_training_workers as toy
from hedwig.training import head

log = Path({log!r})

def worker(settings):
    import ray.train
    from hedwig.training import head
    whole = head._Fit.epoch
    def epoch(self, *args, **kwargs):
        time.sleep({pause})
        whole(self, *args, **kwargs)
        context = ray.train.get_context()
        if context.get_world_rank() == 0:
            with open(log, "a") as file:
                file.write(f"{{len(self.history)}} {{context.get_world_size()}}\\n")
    head._Fit.epoch = epoch
    original(settings)

original = head._worker
head._worker = worker
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
second = cluster.add_node(num_cpus=1) if {two} else None
ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)

def lose():
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        time.sleep(0.2)
    cluster.remove_node(second, allow_graceful=False)

if second is not None:
    threading.Thread(target=lose, daemon=True).start()
curve = toy.curve(Path({world!r}), Path({here!r}), num_workers=2, min_workers=1, epochs={epochs})
print(json.dumps(curve))
ray.shutdown()
cluster.shutdown()
"""


def run_apart(world: Path, tmp_path: Path, *, two: bool, epochs: int) -> tuple[list[float], list[tuple[int, int]]]:
    """The curve, and (epochs done, workers) at the end of each epoch, on a cluster of one or two CPUs of its own."""
    log = tmp_path / "log"
    text = SCRIPT.format(
        tests=str(Path(__file__).parent), log=str(log), world=str(world), here=str(tmp_path), two=two, epochs=epochs,
        pause=1.0 if two else 0.0,
    )  # fmt: skip
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(text))
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=500
    )
    seen = [tuple(int(word) for word in line.split()) for line in log.read_text().splitlines()]
    return json.loads(done.stdout.splitlines()[-1]), seen


@pytest.mark.slow
def test_where_there_is_room_for_one_worker_one_trains(world, tmp_path):
    found, seen = run_apart(world, tmp_path, two=False, epochs=3)
    assert seen == [(1, 1), (2, 1), (3, 1)]
    assert found == pytest.approx(curve(world, tmp_path / "here", epochs=3), rel=1e-5)


@pytest.mark.slow
def test_when_a_node_is_lost_the_other_worker_goes_on(world, tmp_path):
    found, seen = run_apart(world, tmp_path, two=True, epochs=12)
    sizes = [size for _, size in seen]
    assert sizes[0] == 2
    assert sizes[-1] == 1
    assert seen[-1] == (12, 1)
    assert next(number for number, size in seen if size == 1) > 1  # not from nothing
    assert found == pytest.approx(curve(world, tmp_path / "here", epochs=12), rel=0.05)
