import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hedwig import storage
from hedwig.schema import SchemaError, vector_field
from hedwig.vectors import is_vector, read_lists, read_tensor, read_vectors, vector_array, vector_form


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
