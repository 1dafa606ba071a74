import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hedwig import storage
from hedwig.publishing import compact, find_garbage, publish, published_folder
from hedwig.schema import vector_field
from hedwig.vectors import read_vectors, vector_array

NUM, DIM, FILES = 53, 6, 6
VALUES = np.random.default_rng(0).standard_normal((NUM, DIM), dtype=np.float32)
FIELDS = [pa.field("pano_id", pa.string(), nullable=False), pa.field("lat", pa.float64()), vector_field("v", DIM)]


def rows(which):
    columns = [pa.array([f"p{i:03d}" for i in which]), pa.array([None if i % 7 == 0 else float(i) for i in which])]
    return pa.Table.from_arrays([*columns, vector_array(VALUES[which], FIELDS[2])], schema=pa.schema(FIELDS))


def make(folder):
    """A table as a job leaves it: rows in any order in files of any size, one of them empty, and rejected rows."""
    parts = np.array_split(np.random.default_rng(1).permutation(NUM), FILES - 1)
    for i, part in enumerate([*parts, np.zeros(0, np.int64)]):
        storage.write_table(str(folder / f"part-{i}.parquet"), rows(part))
    storage.write_table(str(folder / "rejected" / "part-0.parquet"), pa.table({"pano_id": ["bad"]}))
    storage.publish(
        str(folder), kind="embeddings", config={"a": 1}, inputs={"captions": "x"}, num_in=NUM + 1, num_out=NUM,
        num_rejected=1, details={"model_id": "m"},
    )  # fmt: skip
    return str(folder)


def check(folder, digest):
    table = storage.read_table(folder)
    assert table.equals(rows(np.arange(NUM)))
    np.testing.assert_array_equal(read_vectors(table, "v"), VALUES)
    assert storage.manifest_digest(folder) == digest
    manifest = storage.read_manifest(folder)
    for name, sha256 in manifest.files.items():
        assert storage.sha256_of(storage.join(folder, name)) == sha256
    return manifest


def test_few_files_with_the_same_rows_under_the_same_name(tmp_path):
    folder = make(tmp_path / "embeddings")
    before, digest = storage.read_manifest(folder), storage.manifest_digest(folder)
    order = pa.concat_tables([pq.read_table(f) for f in storage.table_files(folder)])
    done = compact(folder, rows_per_file=20)
    assert (done.num_rows, done.files_before, done.files_after) == (NUM, FILES, 3)
    manifest = check(folder, digest)
    files = storage.list_files(folder, suffix=".parquet")
    assert [pq.read_metadata(f).num_rows for f in files] == [20, 20, 13]
    assert pa.concat_tables([pq.read_table(f) for f in files]).equals(order)
    assert sorted(manifest.files) == sorted([*(os.path.basename(f) for f in files), "rejected/part-0.parquet"])
    same = ("fingerprint", "inputs", "config", "num_in", "num_out", "num_rejected", "finished_at", "versions")
    assert all(getattr(manifest, name) == getattr(before, name) for name in same)
    assert manifest.details["model_id"] == "m"
    assert manifest.details["compacted"]["files_before"] == FILES
    # Once more: from what stands for the first table, and then there is nothing left to do.
    assert compact(folder, rows_per_file=100).files_after == 1
    check(folder, digest)
    names = os.listdir(folder)
    assert compact(folder, rows_per_file=100).files_before == 1
    assert os.listdir(folder) == names
    assert pq.read_schema(storage.list_files(folder, suffix=".parquet")[0]).field("v").metadata == FIELDS[2].metadata


def test_row_groups_and_files_by_bytes(tmp_path, monkeypatch):
    folder = make(tmp_path / "embeddings")
    width = sum(os.path.getsize(f) for f in storage.table_files(folder)) // NUM
    monkeypatch.setattr("hedwig.publishing.compaction.FILE_BYTES", 30 * width)
    monkeypatch.setattr("hedwig.publishing.compaction.GROUP_BYTES", 8 * width)
    done = compact(folder)
    assert (done.rows_per_file, done.rows_per_group, done.files_after) == (30, 8, 2)
    metadata = pq.read_metadata(storage.table_files(folder)[0])
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [8, 8, 8, 6]


def test_what_is_published_stays_published(tmp_path):
    make(tmp_path / "embeddings")
    storage.write_bytes(str(tmp_path / "index" / "index.faiss"), b"x")
    digests = {"embeddings": storage.manifest_digest(str(tmp_path / "embeddings"))}
    storage.publish(str(tmp_path / "index"), kind="index", config={}, inputs=digests, num_in=NUM, num_out=NUM)
    publish(str(tmp_path), lambda folder: None)
    compact(str(tmp_path / "embeddings"), rows_per_file=100)
    assert published_folder(str(tmp_path)) == str(tmp_path)
    assert storage.read_manifest(str(tmp_path / "index")).inputs == {
        "embeddings": storage.manifest_digest(str(tmp_path / "embeddings"))
    }
    storage.clone(str(tmp_path / "embeddings"), str(tmp_path / "other"))
    check(str(tmp_path / "other"), digests["embeddings"])


class Killed(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


def test_killed_before_any_step_the_table_is_whole_and_the_next_one_finishes(tmp_path, monkeypatch):
    steps = ("write_table", "copy_file", "write_manifest", "delete")
    real = {name: getattr(storage, name) for name in steps}
    deaths = 0
    for last in range(100):
        folder = make(tmp_path / f"{last}")
        digest, left = storage.manifest_digest(folder), [last]

        def dying(name, left=left):
            def step(*arguments, **options):
                if left[0] == 0:
                    raise Killed(name)
                left[0] -= 1
                return real[name](*arguments, **options)

            return step

        for name in steps:
            monkeypatch.setattr(storage, name, dying(name))
        try:
            compact(folder, rows_per_file=20)
            break
        except Killed:
            deaths += 1
        finally:
            for name in steps:
                monkeypatch.setattr(storage, name, real[name])
        check(folder, digest)
        found = find_garbage(str(tmp_path), leftover_age_s=-1.0)  # what is left is known to gc, and is not the table
        assert not {g.path for g in found} & set(storage.table_files(folder))
        assert compact(folder, rows_per_file=20).files_after == 3
        check(folder, digest)
        assert sorted(os.listdir(folder)) == sorted(
            [*(os.path.basename(f) for f in storage.table_files(folder)), "manifest.json", "rejected"]
        )
        assert len(storage.table_files(folder)) == 3
    assert deaths >= 3 + 3 + 1 + FILES  # written, copied, made the table, and the old ones deleted


def test_a_stage_that_was_made_anew_meanwhile_is_left_alone(tmp_path, monkeypatch):
    folder = make(tmp_path / "embeddings")
    real = storage.copy_file

    def slow(source, target):
        real(source, target)
        storage.publish(folder, kind="embeddings", config={"a": 2}, inputs={}, num_in=NUM, num_out=NUM)

    monkeypatch.setattr(storage, "copy_file", slow)
    with pytest.raises(RuntimeError, match="made anew while it was compacted"):
        compact(folder, rows_per_file=20)
    assert storage.read_manifest(folder).config == {"a": 2}


def test_what_is_not_written_as_it_was_read_is_not_published(tmp_path, monkeypatch):
    folder = make(tmp_path / "embeddings")
    digest = storage.manifest_digest(folder)
    real = storage.write_table
    monkeypatch.setattr(storage, "write_table", lambda path, table, **options: real(path, table.slice(1), **options))
    with pytest.raises(RuntimeError, match="does not hold the rows that were written"):
        compact(folder, rows_per_file=20)
    check(folder, digest)


def test_what_cannot_be_compacted_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished table"):
        compact(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="at least 1"):
        compact(str(tmp_path), rows_per_file=0)
    storage.write_bytes(str(tmp_path / "cells" / "cells.json"), b"{}")
    storage.publish(str(tmp_path / "cells"), kind="geocells", config={}, inputs={}, num_in=1, num_out=1)
    with pytest.raises(FileNotFoundError, match=r"finished geocells, and has no part-\*\.parquet"):
        compact(str(tmp_path / "cells"))
    folder = make(tmp_path / "mixed")
    storage.write_table(f"{folder}/part-5.parquet", pa.table({"pano_id": ["x"]}))
    with pytest.raises(ValueError, match="other columns"):
        compact(folder)


def test_parts_that_the_manifest_does_not_list_are_not_read(tmp_path):
    folder = make(tmp_path / "embeddings")
    storage.write_table(f"{folder}/part-stray.parquet", rows(np.arange(3)))
    assert storage.read_table(folder).num_rows == NUM
    (tmp_path / "embeddings" / "manifest.json").write_text(json.dumps({"of": "somebody else"}))
    assert storage.read_table(folder).num_rows == NUM + 3
    (tmp_path / "embeddings" / "manifest.json").unlink()  # unfinished: all that is there
    assert len(storage.table_files(folder)) == FILES + 1
