"""Vectors in tables: one fixed-size binary value a row, whose field says ``dtype`` and ``dim``; written and read here.

A vector is the raw bytes of its components, little-endian, stored PLAIN: five times faster to write and read than a
fixed-size list of the same numbers, and without pyarrow's dictionary, which costs more still. In a single chunk without
nulls nothing is copied: numpy, torch and Arrow look at the bytes that Parquet gave. With pyarrow alone the same is
``np.frombuffer(chunk.buffers()[1], dtype).reshape(-1, dim)`` (slices: mind ``chunk.offset``). This is the only reader:
a table of another form is refused with the way to make it anew. Whole tables that may be larger than memory are read
batch by batch by `read_embeddings`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hedwig.schema import VECTOR_DTYPES, SchemaError, check_columns
from hedwig.storage import open_table

if TYPE_CHECKING:
    import torch

__all__ = [
    "is_vector",
    "read_embeddings",
    "read_lists",
    "read_tensor",
    "read_vectors",
    "vector_array",
    "vector_form",
]


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


@overload
def read_embeddings(
    table: str | Sequence[str], as_: Literal["numpy"] = ..., *, columns: Sequence[str] | None = ...,
    batch_rows: int = ..., where: Any = ...,
) -> Iterator[dict[str, NDArray[Any]]]: ...  # fmt: skip
@overload
def read_embeddings(
    table: str | Sequence[str], as_: Literal["torch"], *, columns: Sequence[str] | None = ...,
    batch_rows: int = ..., where: Any = ...,
) -> Iterator[dict[str, Any]]: ...  # fmt: skip
@overload
def read_embeddings(
    table: str | Sequence[str], as_: Literal["arrow"], *, columns: Sequence[str] | None = ...,
    batch_rows: int = ..., where: Any = ...,
) -> Iterator[pa.Table]: ...  # fmt: skip
def read_embeddings(
    table: str | Sequence[str],
    as_: Literal["numpy", "torch", "arrow"] = "numpy",
    *,
    columns: Sequence[str] | None = ("pano_id", "image_embedding"),
    batch_rows: int = 8192,
    where: Any = None,
) -> Iterator[Any]:
    """The rows of an embedding table, some at a time; only a few batches are in memory, however large the table.

    Args:
        table: its folder, or some of its files; local, s3:// or gs://.
        as_: "numpy": a dict of arrays, vectors (B, D) read-only in their own dtype, texts as objects. "torch": the
            same, vectors and numbers as tensors, vectors over memory that must not be written to. "arrow": a table,
            for `read_vectors`, `read_tensor` and `read_lists`.
        columns: which to read; None for all.
        batch_rows: most rows at a time; fewer come at the end of a row group.
        where: a pyarrow.dataset expression; rows that do not fit it are left out.

    Yields:
        Batches of up to `batch_rows` rows, in the order of the files.

    Raises:
        FileNotFoundError: there is no such table.
        SchemaError: it lacks a column, or holds vectors of another form.
        ValueError: another word than numpy, torch or arrow, or batch_rows below 1.
    """
    if as_ not in ("numpy", "torch", "arrow"):
        raise ValueError(f"as_ is {as_!r}; choose numpy, torch or arrow.")
    if batch_rows < 1:
        raise ValueError(f"batch_rows is {batch_rows}; it must be at least 1.")
    dataset = open_table(table)
    shown = f"The embedding table {table!r}" if isinstance(table, str) else "The embedding table"
    names = dataset.schema.names if columns is None else list(columns)
    check_columns(dataset.schema.names, names, where=shown)
    for name in names:
        if pa.types.is_fixed_size_binary(dataset.schema.field(name).type):
            vector_form(dataset.schema, name, where=shown)
    return _converted(dataset, names, as_, batch_rows, where)


def _converted(dataset: Any, names: list[str], as_: str, batch_rows: int, where: Any) -> Iterator[Any]:
    # Four files at a time hide the storage's latency; the usual 16 batches ahead are a gigabyte of wide vectors.
    ahead = {"batch_readahead": 4, "fragment_readahead": 4}
    for batch in dataset.to_batches(columns=names, filter=where, batch_size=batch_rows, **ahead):
        if batch.num_rows:
            rows = pa.Table.from_batches([batch])
            yield rows if as_ == "arrow" else {name: _column(rows, name, as_ == "torch") for name in names}


def _column(rows: pa.Table, name: str, tensors: bool) -> Any:
    if is_vector(rows.schema.field(name)):
        return read_tensor(rows, name) if tensors else read_vectors(rows, name)
    values = rows[name].to_numpy()
    if not tensors or values.dtype == object:
        return values
    import torch

    return torch.from_numpy(values.copy())
