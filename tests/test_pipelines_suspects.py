import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from test_pipelines_rows import Square, task, write_source

from hedwig import storage
from hedwig.pipelines.chain import Step
from hedwig.pipelines.rows import map_rows
from hedwig.pipelines.suspects import MAX_DEATHS, MAX_FRUITLESS_STARTS, GuardedChain, Suspects

REASON = "killed its worker 2 times: the process ended while this row was alone in it"


def test_a_row_is_rejected_after_it_was_alone_in_workers_that_died():
    notes = Suspects()
    assert notes.begin("w0", ["a", "b", "c"]) == (False, None)
    assert notes.begin("w", ["a", "b", "c"]) == (False, None)  # the first death may have been chance
    for number in range(1, MAX_DEATHS + 1):  # b killed w0 and w in company, and kills w1 and w2 alone
        worker = f"w{number}"
        assert notes.begin(worker, ["a", "b", "c"]) == (True, None)
        assert notes.begin(worker, ["a"]) == (False, None)
        notes.done(["a"])
        assert notes.begin(worker, ["b"]) == (False, None)
        assert notes.num_deaths() == number - 1
    assert notes.begin("w3", ["a", "b", "c"]) == (True, None)
    one_by_one, reason = notes.begin("w3", ["b"])
    assert not one_by_one
    assert reason.startswith(REASON)
    assert notes.begin("w3", ["c"]) == (False, None)


def test_who_finishes_is_no_suspect_and_a_death_beside_it_is_forgiven():
    notes = Suspects()
    notes.begin("w0", ["a", "b"])
    notes.done(["a", "b"])
    assert notes.begin("w1", ["a", "b"]) == (False, None)  # done again after a lost node: nobody died over them
    notes.begin("w2", ["c"])
    notes.begin("w3", ["c"])
    assert notes.num_deaths() == 1
    notes.done(["c"])
    assert notes.num_deaths() == 0


def test_workers_that_die_without_finishing_anything_are_stopped():
    notes = Suspects(num_actors=3)
    for _ in range(3 + MAX_FRUITLESS_STARTS):
        assert notes.start() is None
    assert "13 workers died" in notes.start()
    notes.done(["a"])
    assert notes.start() is None


class Here:
    """The handle of an actor that is in this process."""

    def __init__(self, notes):
        self._notes = notes

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self._notes, name))


BEGUN = {name: threading.Event() for name in "abcdefg"}


class Fetch:
    """Says which rows it was told of before their turn."""

    reads, writes = ("pano_id",), ("seen",)

    def __call__(self, batch):
        return {**batch, "seen": np.array([float(BEGUN[name].is_set()) for name in batch["pano_id"]])}

    def prefetch(self, batch):
        for name in batch["pano_id"]:
            BEGUN[name].set()


class Wait:
    """Does not go on before the next two batches of two were begun."""

    reads, writes = ("pano_id",), ("y",)

    def __call__(self, batch):
        for name in "abcdefg":
            if ord(name) <= ord(batch["pano_id"][-1]) + 4:
                assert BEGUN[name].wait(30)
        return {**batch, "y": np.zeros(len(batch["pano_id"]))}


def test_the_next_batches_are_begun_while_one_is_worked_on_unless_a_worker_has_died_over_them(monkeypatch):
    monkeypatch.setattr("ray.get", lambda value: value)
    notes, schema = Suspects(), pa.schema([("pano_id", pa.string()), ("seen", pa.float64())])
    table = pa.table({"pano_id": list("abcdefg")})
    ahead = GuardedChain([Step(Fetch), Step(Wait)], schema, Here(notes), batch_size=2, read_ahead=2)
    out = ahead(table)
    assert out["pano_id"].to_pylist() == list("abcdefg")
    assert out["seen"].to_pylist() == [1.0] * 7
    assert not any(out["failure"].to_pylist())
    for event in BEGUN.values():
        event.clear()
    notes.begin("another", ["c"])
    careful = GuardedChain([Step(Fetch)], schema, Here(notes), batch_size=2, read_ahead=2)
    assert careful(table)["seen"].to_pylist() == [0.0] * 7
    assert not any(event.is_set() for event in BEGUN.values())


class Deadly(Square):
    """Ends its process over one row and never returns from another."""

    def __init__(self, *, fatal=(), endless=(), broken=False):
        super().__init__()
        self.fatal, self.endless = fatal, endless
        if broken:
            os._exit(1)

    def __call__(self, batch):
        if any(x in self.fatal for x in batch["lat"]):
            os._exit(1)
        if any(x in self.endless for x in batch["lat"]):
            time.sleep(3600)
        return super().__call__(batch)


@pytest.mark.slow  # every death costs the start of a worker
@pytest.mark.timeout(900)
def test_deadly_rows_are_rejected_and_their_neighbours_go_on(tmp_path, ray_session):
    write_source(str(tmp_path / "in"), 40)
    steps = [Step(Deadly, {"fatal": (5.0,), "endless": (33.0,)})]
    manifest = map_rows(task(tmp_path, steps=steps, timeout_s=5.0))
    assert (manifest.num_in, manifest.num_out, manifest.num_rejected) == (40, 38, 2)
    assert manifest.rejected_reasons == {"killed its worker 2 times": 2}
    rejected = storage.read_table(str(tmp_path / "out" / "rejected"))
    assert rejected["pano_id"].to_pylist() == ["p0005", "p0033"]
    assert "or it took longer than 5 s" in rejected["reason"].to_pylist()[0]
    done = storage.read_table(str(tmp_path / "out"))
    assert done["y"].to_pylist() == [float(i) ** 2 for i in range(40) if i not in (5, 33)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_that_cannot_be_built_ends_the_job(tmp_path, ray_session):
    write_source(str(tmp_path / "in"), 10)
    with pytest.raises(Exception, match="workers died"):
        map_rows(task(tmp_path, steps=[Step(Deadly, {"broken": True})]))
