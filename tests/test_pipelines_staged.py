import os

import numpy as np
import pyarrow as pa
import pytest

from hedwig import storage
from hedwig.pipelines.chain import FAILURE
from hedwig.pipelines.staged import CHECKPOINT, STAGING, Staged, TakenOver, audit

SCHEMA = pa.schema([("pano_id", pa.string()), ("y", pa.float64())])


def write(staged, name, ids, failures=None, epoch=None):
    """A file as Ray leaves it: the columns and each row's failure."""
    failures = failures or [None] * len(ids)
    columns = [pa.array(ids, pa.string()), pa.array(np.arange(len(ids), dtype=float)), pa.array(failures, pa.string())]
    table = pa.Table.from_arrays(columns, names=["pano_id", "y", FAILURE])
    folder = staged.staging if epoch is None else storage.join(staged.folder, STAGING, epoch)
    storage.write_table(storage.join(folder, name), table)


def begin(tmp_path):
    return Staged(str(tmp_path), "squares", SCHEMA)


def ids_of(tmp_path):
    return storage.read_table(str(tmp_path), ["pano_id"])["pano_id"].to_pylist()


def test_what_a_killed_run_left_is_settled_once_and_late_files_are_ignored(tmp_path):
    first = begin(tmp_path)
    assert first.settle() == set()
    write(first, "1.parquet", ["a", "b"], [None, "bad luck: b"])
    storage.write_bytes(storage.join(first.staging, "2.parquet"), b"PAR1 cut off")
    second = begin(tmp_path)  # the first driver was killed
    assert second.settle() == {"a"}  # b gets another chance
    assert storage.read_table(second.checkpoint, prefix="settled")["pano_id"].to_pylist() == ["a"]
    # A worker of the dead run commits now: its rows are done again under the new epoch, and these are not taken.
    write(second, "3.parquet", ["c", "d"], epoch=first.epoch)
    write(second, "4.parquet", ["b", "c", "d"])
    counts = second.publish()
    assert (counts.out, counts.rejected) == (4, 0)
    audit(str(tmp_path), "squares", {"a", "b", "c", "d"})
    second.clear()
    assert sorted(os.listdir(tmp_path)) == ["part-1.parquet", "part-4.parquet"]


def test_late_files_lose_the_ids_that_are_there_already(tmp_path):
    first = begin(tmp_path)
    write(first, "1.parquet", ["a", "b", "c"])
    second = begin(tmp_path)
    second.settle()
    write(second, "2.parquet", ["b", "d"], epoch=first.epoch)  # late, and then the second driver is killed too
    write(second, "3.parquet", ["d", "e"])
    third = begin(tmp_path)
    assert third.settle() == {"a", "b", "c", "d", "e"}
    assert ids_of(tmp_path) == ["a", "b", "c", "d", "e"]
    assert not storage.exists(storage.join(str(tmp_path), STAGING))


def test_settling_may_be_killed_and_begun_again(tmp_path):
    first = begin(tmp_path)
    write(first, "1.parquet", ["a", "b"])
    storage.copy_file(storage.join(first.staging, "1.parquet"), str(tmp_path / "kept"))
    begin(tmp_path).settle()
    third = begin(tmp_path)  # killed after the part was written and before the staged file was deleted
    storage.copy_file(str(tmp_path / "kept"), storage.join(third.folder, STAGING, first.epoch, "1.parquet"))
    assert third.settle() == {"a", "b"}
    assert ids_of(tmp_path) == ["a", "b"]


def test_rejected_rows_stand_beside_the_table_with_their_reasons(tmp_path):
    staged = begin(tmp_path)
    write(staged, "1.parquet", ["a", "b", "c"], [None, "bad luck: b", "bad luck: c"])
    counts = staged.publish()
    assert (counts.out, counts.rejected, counts.reasons) == (1, 2, {"bad luck": 2})
    assert counts.example.startswith("bad luck: ")
    assert storage.read_table(str(tmp_path / "rejected"))["stage"].to_pylist() == ["squares"] * 2
    with pytest.raises(RuntimeError, match="1 lost, 0 doubled and 1 unknown"):
        audit(str(tmp_path), "squares", {"a", "b", "d"})


def test_an_older_run_that_is_still_alive_stops_before_it_publishes(tmp_path):
    first = begin(tmp_path)
    write(first, "1.parquet", ["a"])
    second = begin(tmp_path)
    with pytest.raises(TakenOver, match="taken over by another run"):
        first.publish()
    assert second.settle() == {"a"}
    second.clear()
    assert not storage.exists(storage.join(str(tmp_path), CHECKPOINT))
    with pytest.raises(TakenOver, match="epoch none"):
        first.check()
