import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch

from hedwig import storage
from hedwig.schema import SchemaError, vector_field
from hedwig.vectors import (
    is_vector,
    read_embeddings,
    read_lists,
    read_tensor,
    read_vectors,
    vector_array,
    vector_form,
)


def table_of(values, dtype="float32", name="v"):
    field = vector_field(name, values.shape[1], dtype)
    return pa.Table.from_arrays([vector_array(values, field)], schema=pa.schema([field]))


VALUES = np.random.default_rng(0).standard_normal((7, 5), dtype=np.float32)


def test_nothing_is_copied_from_parquet_to_numpy_torch_and_arrow(tmp_path):
    storage.write_table(str(tmp_path / "part-0.parquet"), table_of(VALUES))
    table = pq.read_table(tmp_path / "part-0.parquet")
    assert table.schema.field("v").metadata == {b"dtype": b"float32", b"dim": b"5"}
    address = table["v"].chunk(0).buffers()[1].address
    rows = read_vectors(table, "v")
    np.testing.assert_array_equal(rows, VALUES)
    assert rows.ctypes.data == address
    assert not rows.flags.writeable
    tensor = read_tensor(table, "v")
    assert tensor.data_ptr() == address
    assert torch.equal(tensor, torch.from_numpy(VALUES))
    lists = read_lists(table, "v")
    assert lists.type == pa.list_(pa.float32(), 5)
    assert lists.flatten().buffers()[1].address == address
    assert lists.to_pylist() == VALUES.tolist()


def test_with_pyarrow_alone_as_the_docstring_says(tmp_path):
    storage.write_table(str(tmp_path / "part-0.parquet"), table_of(VALUES))
    table = pq.read_table(tmp_path / "part-0.parquet")
    field, chunk = table.schema.field("v"), table["v"].chunk(0)
    dtype, dim = field.metadata[b"dtype"].decode(), int(field.metadata[b"dim"])
    np.testing.assert_array_equal(np.frombuffer(chunk.buffers()[1], dtype).reshape(-1, dim), VALUES)


def test_chunks_slices_filters_and_nulls_keep_their_rows():
    table = pa.concat_tables([table_of(VALUES[:3]), table_of(VALUES[:0]), table_of(VALUES[3:])])
    np.testing.assert_array_equal(read_vectors(table, "v"), VALUES)
    np.testing.assert_array_equal(read_vectors(table.slice(2, 3), "v"), VALUES[2:5])
    np.testing.assert_array_equal(read_vectors(table.slice(4), "v"), VALUES[4:])
    mask = np.array([True, False, True, True, False, False, True])
    np.testing.assert_array_equal(read_vectors(table.filter(pa.array(mask)), "v"), VALUES[mask])
    holes = table.take(pa.array([2, None, 5]))
    got = read_vectors(holes, "v")
    np.testing.assert_array_equal(got[[0, 2]], VALUES[[2, 5]])
    assert np.isnan(got[1]).all()
    assert (read_vectors(holes, "v", missing=0.0)[1] == 0).all()
    assert read_lists(holes, "v").to_pylist() == [VALUES[2].tolist(), None, VALUES[5].tolist()]
    assert read_vectors(table.slice(0, 0), "v").shape == (0, 5)
    np.testing.assert_array_equal(read_vectors(table.to_batches()[0], "v"), VALUES[:3])


def test_half_precision_says_so_and_reads_back():
    table = table_of(VALUES, "float16")
    assert table.schema.field("v").type == pa.binary(10)
    assert read_vectors(table, "v").dtype == np.float16
    np.testing.assert_array_equal(read_vectors(table, "v"), VALUES.astype(np.float16))


def test_other_forms_are_refused_with_the_way_out():
    lists = pa.table({"v": pa.FixedSizeListArray.from_arrays(pa.array(VALUES.ravel()), 5)})
    with pytest.raises(SchemaError, match=r"expected fixed-size binary.*older hedwig: run `hedwig embed` again"):
        read_vectors(lists, "v")
    bare = table_of(VALUES).cast(pa.schema([pa.field("v", pa.binary(20))]))
    assert not is_vector(bare.schema.field("v"))
    with pytest.raises(SchemaError, match="metadata hold dtype and dim"):
        vector_form(bare.schema, "v")
    for wrong in ({"dtype": "float32", "dim": "4"}, {"dtype": "int8", "dim": "20"}):
        with pytest.raises(SchemaError, match="holds 20 bytes a row"):
            vector_form(pa.schema([pa.field("v", pa.binary(20), metadata=wrong)]), "v")
    with pytest.raises(SchemaError, match=r"The table lacks the column\(s\) w"):
        vector_form(lists.schema, "w")
    with pytest.raises(SchemaError, match=r"shape \(7, 5\) do not fit a column of 6"):
        vector_array(VALUES, vector_field("v", 6))


@pytest.fixture
def stored(tmp_path):
    """Three files of 3, 0 and 4 rows, with a null vector and a null position among them."""
    fields = [pa.field("pano_id", pa.string()), pa.field("lat", pa.float64()), pa.field("n", pa.int32())]
    schema = pa.schema([*fields, vector_field("image_embedding", 5)])
    vectors = table_of(VALUES, name="image_embedding").take(pa.array([0, 1, None, 3, 4, 5, 6]))["image_embedding"]
    lat = pa.array([0.5, None, 2.5, 3.5, 4.5, 5.5, 6.5])
    names = pa.array([f"p{i}" for i in range(7)])
    whole = pa.Table.from_arrays([names, lat, pa.array(range(7), pa.int32()), vectors], schema=schema)
    for number, (start, size) in enumerate([(0, 3), (3, 0), (3, 4)]):
        storage.write_table(str(tmp_path / f"part-{number}.parquet"), whole.slice(start, size))
    return str(tmp_path)


def test_a_stored_table_is_read_batch_by_batch(stored):
    batches = list(read_embeddings(stored, columns=None, batch_rows=2))
    assert [len(b["pano_id"]) for b in batches] == [2, 1, 2, 2]
    assert [i for b in batches for i in b["pano_id"]] == [f"p{i}" for i in range(7)]
    found = np.concatenate([b["image_embedding"] for b in batches])
    assert np.isnan(found[2]).all()
    np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(VALUES, 2, 0))
    assert not batches[0]["image_embedding"].flags.owndata
    assert np.isnan(batches[0]["lat"]).tolist() == [False, True]
    (only,) = read_embeddings(storage.table_files(stored)[2:], where=ds.field("lat") > 4)
    assert list(only) == ["pano_id", "image_embedding"]
    np.testing.assert_array_equal(only["image_embedding"], VALUES[4:])


def test_a_stored_table_as_tensors_and_as_arrow(stored):
    last = list(read_embeddings(stored, "torch", columns=["pano_id", "n", "lat", "image_embedding"]))[-1]
    assert torch.equal(last["image_embedding"], torch.from_numpy(VALUES[3:]))
    assert last["n"].tolist() == [3, 4, 5, 6]
    assert last["lat"].dtype == torch.float64
    assert last["pano_id"].tolist() == ["p3", "p4", "p5", "p6"]
    tables = list(read_embeddings(stored, "arrow"))
    assert pa.concat_tables(tables)["pano_id"].to_pylist() == [f"p{i}" for i in range(7)]
    np.testing.assert_array_equal(read_vectors(tables[-1], "image_embedding"), VALUES[3:])


def test_a_table_that_cannot_be_read_is_refused_before_the_first_batch(stored, tmp_path):
    with pytest.raises(SchemaError, match=r"The embedding table '.*' lacks the column\(s\) embedding"):
        read_embeddings(stored, columns=["embedding"])
    with pytest.raises(ValueError, match="choose numpy, torch or arrow"):
        read_embeddings(stored, "pandas")
    with pytest.raises(ValueError, match="batch_rows is 0"):
        read_embeddings(stored, batch_rows=0)
    with pytest.raises(FileNotFoundError, match="run the stage that writes it"):
        read_embeddings(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="empty list"):
        read_embeddings([])
    storage.write_table(str(tmp_path / "old" / "part-0.parquet"), pa.table({"v": pa.array([b"12"], pa.binary(2))}))
    with pytest.raises(SchemaError, match="expected fixed-size binary whose field metadata"):
        read_embeddings(str(tmp_path / "old"), columns=["v"])
