import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hedwig import storage
from hedwig.schema import vector_field
from hedwig.storage import Manifest
from hedwig.vectors import read_vectors, vector_array


def publish(folder, **changes):
    settings = {"kind": "t", "config": {"a": 1}, "inputs": {}, "num_in": 2, "num_out": 2}
    return storage.publish(str(folder), **{**settings, **changes})


def test_a_folder_is_an_artefact_only_with_its_manifest(tmp_path):
    storage.write_bytes(str(tmp_path / "part-0.parquet"), b"x")
    assert storage.read_manifest(str(tmp_path)) is None
    made = publish(tmp_path)
    assert storage.read_manifest(str(tmp_path)) == made
    assert made.files == {"part-0.parquet": hashlib.sha256(b"x").hexdigest()}
    assert made.versions["numpy"] == np.__version__


def test_rows_must_add_up(tmp_path):
    with pytest.raises(ValueError, match="3 rows went in but 2 came out and 0 were rejected"):
        publish(tmp_path, num_in=3)
    assert publish(tmp_path, num_in=3, num_rejected=1).num_rejected == 1


def test_fingerprint_depends_on_settings_and_inputs_only():
    base = storage.fingerprint("t", {"a": 1, "b": 2}, {"x": "1"})
    assert base == storage.fingerprint("t", {"b": 2, "a": 1}, {"x": "1"})
    assert base != storage.fingerprint("t", {"a": 1, "b": 3}, {"x": "1"})
    assert base != storage.fingerprint("t", {"a": 1, "b": 2}, {"x": "2"})
    assert base != storage.fingerprint("u", {"a": 1, "b": 2}, {"x": "1"})


def test_a_foreign_manifest_is_refused_by_name(tmp_path):
    (tmp_path / "manifest.json").write_text('{"something": "else"}')
    with pytest.raises(ValueError, match="is not a hedwig manifest"):
        storage.read_manifest(str(tmp_path))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not a hedwig manifest"):
        storage.read_manifest(str(tmp_path))


def test_unknown_keys_of_a_newer_manifest_are_ignored(tmp_path):
    publish(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    assert isinstance(storage.read_manifest(str(tmp_path)), Manifest)


def test_writing_replaces_a_folder_only_on_success(tmp_path):
    target = str(tmp_path / "art")
    with storage.writing(target) as scratch:
        (scratch / "a").write_text("1")
        (scratch / "sub").mkdir()
        (scratch / "sub" / "b").write_text("2")
    publish(target)
    with pytest.raises(RuntimeError, match="halfway"), storage.writing(target) as scratch:
        (scratch / "a").write_text("3")
        raise RuntimeError("halfway")
    assert (tmp_path / "art" / "a").read_text() == "1"
    assert storage.read_manifest(target) is not None
    with storage.writing(target) as scratch:
        (scratch / "c").write_text("4")
    assert sorted(p.name for p in (tmp_path / "art").iterdir()) == ["c"]  # nothing of the old one is left


def test_list_files_hides_the_hidden_and_forgives_absence(tmp_path):
    for name in ("b.parquet", "a.parquet", ".staging/c.parquet", "deep/d.parquet", "e.txt"):
        storage.write_bytes(str(tmp_path / name), b"")
    found = [f.rsplit("/", 1)[1] for f in storage.list_files(str(tmp_path), suffix=".parquet", recursive=True)]
    assert found == ["a.parquet", "b.parquet", "d.parquet"]
    assert storage.list_files(str(tmp_path / "none")) == []


def test_tables_round_trip_with_plain_vectors_and_sorted_ids(tmp_path):
    field = vector_field("v", 2)
    vectors = vector_array(np.arange(6, dtype=np.float32).reshape(3, 2), field)
    table = pa.table({"pano_id": ["c", "a", "b"]}).append_column(field, vectors)
    storage.write_table(str(tmp_path / "part-1.parquet"), table)
    back = storage.read_table(str(tmp_path))
    assert back["pano_id"].to_pylist() == ["a", "b", "c"]
    assert read_vectors(back, "v").tolist() == [[2.0, 3.0], [4.0, 5.0], [0.0, 1.0]]
    column = pq.ParquetFile(tmp_path / "part-1.parquet").metadata.row_group(0).column(1)
    assert column.compression == "UNCOMPRESSED"
    assert "PLAIN_DICTIONARY" not in column.encodings
    assert "RLE_DICTIONARY" not in column.encodings
    with pytest.raises(FileNotFoundError, match=r"holds no part-\*.parquet"):
        storage.read_table(str(tmp_path / "none"))


def test_read_bytes_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image file at"):
        storage.read_bytes(str(tmp_path / "none.jpg"))
    with pytest.raises(FileNotFoundError, match="no image file at"):
        storage.read_bytes(str(tmp_path))


def test_paths():
    assert storage.resolve("a/b.jpg", "/data") == "/data/a/b.jpg"
    assert storage.resolve("/x/b.jpg", "/data") == "/x/b.jpg"
    assert storage.resolve("s3://b/k", "/data") == "s3://b/k"
    assert storage.resolve("k.jpg", "s3://b/dir") == "s3://b/dir/k.jpg"
    assert storage.is_remote("gs://b/k")
    assert not storage.is_remote("file:///x")
    assert storage.join("s3://b/", "a", "c") == "s3://b/a/c"
