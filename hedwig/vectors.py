"""Vectors in tables: one fixed-size binary value a row, whose field says ``dtype`` and ``dim``; written and read here.

A vector is the raw bytes of its components, little-endian, stored PLAIN: five times faster to write and read than a
fixed-size list of the same numbers, and without pyarrow's dictionary, which costs more still. In a single chunk without
nulls nothing is copied: numpy, torch and Arrow look at the bytes that Parquet gave. With pyarrow alone the same is
``np.frombuffer(chunk.buffers()[1], dtype).reshape(-1, dim)`` (slices: mind ``chunk.offset``). This is the only reader:
a table of another form is refused with the way to make it anew.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hedwig.schema import VECTOR_DTYPES, SchemaError, check_columns

if TYPE_CHECKING:
    import torch

__all__ = ["is_vector", "read_lists", "read_tensor", "read_vectors", "vector_array", "vector_form"]


def is_vector(field: pa.Field) -> bool:
    """Whether a field is a vector column: fixed-size binary with ``dtype`` and ``dim`` in its metadata."""
    return pa.types.is_fixed_size_binary(field.type) and {b"dtype", b"dim"} <= set(field.metadata or {})


def vector_form(schema: pa.Schema, name: str, *, where: str = "The table") -> tuple[np.dtype[Any], int]:
    """Component type and D of a vector column.

    Raises:
        SchemaError: there is no such column, it is not a vector, or its width is not what its metadata say.
    """
    check_columns(schema.names, [name], where=where)
    field, where = schema.field(name), where[:1].lower() + where[1:]
    if not is_vector(field):
        raise SchemaError(
            f"Column {name!r} of {where} is {field.type}, expected fixed-size binary whose field "
            "metadata hold dtype and dim. Tables of lists were written by an older hedwig: run `hedwig embed` again."
        )
    word, dim = field.metadata[b"dtype"].decode(), int(field.metadata[b"dim"])
    if word not in VECTOR_DTYPES or np.dtype(word).itemsize * dim != field.type.byte_width:
        raise SchemaError(
            f"Column {name!r} of {where} holds {field.type.byte_width} bytes a row, and its "
            f"metadata say {dim} x {word}; the file is damaged or foreign. Run `hedwig embed` again."
        )
    return np.dtype(word).newbyteorder("<"), dim


def vector_array(values: NDArray[Any], field: pa.Field) -> pa.Array:
    """(N, D) numbers as an Arrow column of `field`; contiguous numbers of its dtype are not copied.

    Raises:
        SchemaError: the vectors do not have the field's D.
    """
    dtype, dim = vector_form(pa.schema([field]), field.name)
    if values.ndim != 2 or values.shape[1] != dim:
        raise SchemaError(f"{field.name}: vectors of shape {values.shape} do not fit a column of {dim} components.")
    raw = np.ascontiguousarray(values, dtype=dtype)
    return pa.FixedSizeBinaryArray.from_buffers(field.type, len(raw), [None, pa.py_buffer(raw)])


def read_vectors(
    table: pa.Table | pa.RecordBatch, name: str, *, missing: float = np.nan, where: str = "The table"
) -> NDArray[Any]:
    """(N, D) of a vector column in its own dtype; rows that are null hold `missing`.

    A view of the column where it is one chunk without nulls, and then read-only; else a copy.
    """
    dtype, dim = vector_form(table.schema, name, where=where)
    column = table.column(name)
    chunks = [c for c in (column.chunks if isinstance(column, pa.ChunkedArray) else [column]) if len(c)]
    parts = [_rows(chunk, dtype, dim) for chunk in chunks]
    if len(parts) == 1 and not chunks[0].null_count:
        return parts[0]
    out = np.concatenate(parts) if parts else np.zeros((0, dim), dtype)
    if column.null_count:
        out[column.is_null().to_numpy(zero_copy_only=False)] = missing
    return out


def _rows(chunk: pa.Array, dtype: np.dtype[Any], dim: int) -> NDArray[Any]:
    content = chunk.buffers()[1]
    start = chunk.offset * dim * dtype.itemsize
    rows = np.frombuffer(content, dtype, count=len(chunk) * dim, offset=start).reshape(-1, dim)
    rows.flags.writeable = False  # Arrow's memory may be shared with other columns and readers
    return rows


def read_tensor(table: pa.Table | pa.RecordBatch, name: str, *, missing: float = np.nan) -> torch.Tensor:
    """`read_vectors` as a tensor over the same memory; it must not be written to."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(read_vectors(table, name, missing=missing))


def read_lists(table: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    """The column as an Arrow array of fixed-size lists over the same memory, for tools that know no bytes."""
    values = read_vectors(table, name)
    valid = table.column(name).is_valid().to_numpy(zero_copy_only=False)
    flat = pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), values.size, [None, pa.py_buffer(np.ascontiguousarray(values))]
    )
    mask = None if valid.all() else pa.array(~valid)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=mask)
