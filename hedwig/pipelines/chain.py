"""Several stages run one after the other on a batch in one process, with the rows that fail set aside and kept.

One row goes in and one row comes out, always: that is what lets Ray Data's checkpoint count rows. A row that a stage
reports in ``failure``, or whose batch raises and which raises alone too, leaves the chain with its reason in the
``failure`` column and nulls in the rest; later stages never see it. So does one that comes with a reason from a chain
before this one. Image bytes live and die in here, and so do frames, unless the schema has a column of them
(`frames_field`), which carries them to a chain in another process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hedwig.schema import check_columns
from hedwig.vectors import is_vector, read_vectors, vector_array

__all__ = ["Chain", "Step", "check_chain", "columns_to_batch", "frames_field", "is_frames"]

Batch = dict[str, NDArray[Any]]
FAILURE = "failure"
FRAMES_SHAPE = b"frames_shape"


@dataclass(frozen=True)
class Step:
    """A stage that will be built inside the worker: its class and the constructor's arguments."""

    stage: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)


def check_chain(columns: Sequence[str], steps: Sequence[Step], wanted: Sequence[str]) -> None:
    """Raise SchemaError when a stage reads what nothing before it provides, or the result lacks a wanted column."""
    present = list(columns)
    for step in steps:
        check_columns(present, step.stage.reads, where=f"The input of {step.stage.__name__}")
        present += [name for name in step.stage.writes if name not in present]
    check_columns(present, wanted, where="The result of " + " -> ".join(s.stage.__name__ for s in steps))


def frames_field(num_frames: int, frame_px: int) -> pa.Field:
    """A column of the (V, S, S, 3) uint8 frames of each row as fixed-size binary, the shape in its metadata."""
    shape = (num_frames, frame_px, frame_px, 3)
    return pa.field("frames", pa.binary(math.prod(shape)), metadata={FRAMES_SHAPE: ",".join(map(str, shape)).encode()})


def is_frames(field: pa.Field) -> bool:
    """Whether a column is a `frames_field`."""
    return FRAMES_SHAPE in (field.metadata or {})


def columns_to_batch(table: pa.Table, names: Sequence[str]) -> Batch:
    """Columns of an Arrow table as numpy arrays: null numbers are NaN, null texts None, vectors (N, D), read-only.

    A row whose vector is null is NaN too. Frames are (N, V, S, S, 3) uint8, read-only; null ones hold any value.
    """
    batch: Batch = {}
    for name in names:
        column = table.column(name)
        if is_vector(table.schema.field(name)):
            batch[name] = read_vectors(table, name)
        elif is_frames(table.schema.field(name)):
            batch[name] = _read_frames(column, table.schema.field(name))
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            batch[name] = column.to_numpy(zero_copy_only=False)
        else:
            batch[name] = _objects(column.to_pylist())
    return batch


def _read_frames(column: pa.ChunkedArray, field: pa.Field) -> NDArray[np.uint8]:
    """A view of the column where it is one chunk."""
    width, shape = field.type.byte_width, tuple(map(int, field.metadata[FRAMES_SHAPE].split(b",")))
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8, count=len(chunk) * width, offset=chunk.offset * width)
        for chunk in column.chunks
        if len(chunk)
    ]
    pixels = parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.uint8), *parts])
    return pixels.reshape(-1, *shape)


def _objects(values: list[Any]) -> NDArray[Any]:
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


class Chain:
    """Run `steps` on Arrow batches and return the columns of `schema` plus ``failure``.

    Args:
        steps: the stages, built here once.
        schema: the result's columns; those that the input has and no stage writes are passed through untouched.
            A ``failure`` that the input has is kept, and its row is shown to no stage.

    Attributes:
        spent: of the last batch: ``rows, rejected, bytes_in`` (of images), and ``wall_s:STAGE`` and ``cpu_s:STAGE`` of
            each stage; CPU seconds are those of all threads of the process.
    """

    def __init__(self, steps: Sequence[Step], schema: pa.Schema) -> None:
        self.spent: dict[str, float] = {}
        self._schema = schema
        self._stages = [step.stage(**step.arguments) for step in steps]
        self._written = {name for step in steps for name in step.stage.writes}
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def __call__(self, table: pa.Table) -> pa.Table:
        """(B,) rows in, (B,) rows out, in the same order."""
        wanted = {n for s in self._stages for n in (*s.reads, *getattr(s, "reads_if_there", ()))}
        needed = wanted & set(table.column_names)
        batch = columns_to_batch(table, sorted(needed))
        size = table.num_rows
        failures: list[str | None] = table[FAILURE].to_pylist() if FAILURE in table.column_names else [None] * size
        alive = np.flatnonzero([reason is None for reason in failures])
        if len(alive) < size:
            batch = {name: column[alive] for name, column in batch.items()}
        self.spent = {"rows": size, "bytes_in": 0}
        for stage in self._stages:
            if len(alive) == 0:
                break
            fetches, wall, cpu = "image_bytes" not in batch, time.perf_counter(), time.process_time()
            batch, reasons = _apply(stage, batch, len(alive))
            name = type(stage).__name__
            self.spent[f"wall_s:{name}"] = time.perf_counter() - wall
            self.spent[f"cpu_s:{name}"] = time.process_time() - cpu
            if fetches and "image_bytes" in batch:
                self.spent["bytes_in"] = sum(map(_num_bytes, batch["image_bytes"]))
            keep = np.array([reason is None for reason in reasons], dtype=bool)
            for row, reason in zip(alive, reasons, strict=True):
                failures[row] = reason
            if not keep.all():
                alive, batch = alive[keep], {name: column[keep] for name, column in batch.items()}
        self.spent["rejected"] = size - len(alive)
        return self._result(table, batch, alive, failures)

    def prefetch(self, table: pa.Table) -> Future[None]:
        """Let the stages that fetch begin, in their order, with what a later call will need; without rows: forget it.

        It happens in a thread of its own. The call must wait for the end of it, which is not the end of the fetching.
        """
        return self._ahead.submit(self._prefetch, table)

    def _prefetch(self, table: pa.Table) -> None:
        for stage in self._stages:
            if hasattr(stage, "prefetch") and set(stage.reads) <= set(table.column_names):
                stage.prefetch(columns_to_batch(table, stage.reads))

    def rejected(self, table: pa.Table, reason: str) -> pa.Table:
        """What comes out when every row has failed for one reason, without trying any."""
        return self._result(table, {}, np.empty(0, np.int64), [reason] * table.num_rows)

    def _result(self, table: pa.Table, batch: Batch, alive: NDArray[Any], failures: list[str | None]) -> pa.Table:
        slots = np.full(table.num_rows, -1, dtype=np.int64)
        slots[alive] = np.arange(len(alive))
        take = pa.array(slots, mask=slots < 0) if len(alive) < table.num_rows else None
        columns = []
        for column in self._schema:
            # What a stage writes wins: a prediction's lat and lon must never be the input's, which are the truth.
            if column.name in table.column_names and column.name not in self._written:
                columns.append(table.column(column.name).cast(column.type))
            elif len(alive):
                values = _to_arrow(batch[column.name], column)
                columns.append(values if take is None else values.take(take))
            else:
                columns.append(pa.nulls(table.num_rows, column.type))
        nullable = pa.schema([f.with_nullable(True) for f in self._schema] + [pa.field(FAILURE, pa.string())])
        return pa.Table.from_arrays([*columns, pa.array(failures, pa.string())], schema=nullable)


def _num_bytes(image: Any) -> int:
    """Of one image, or of all of a panorama in bearings; 0 of one that could not be read."""
    if isinstance(image, list):
        return sum(map(_num_bytes, image))
    return len(image) if isinstance(image, bytes) else 0


def _apply(stage: Any, batch: Batch, size: int) -> tuple[Batch, list[str | None]]:
    """The batch with the stage's columns, and each row's reason for failing or None."""
    try:
        result = stage(dict(batch))
        failure = result.pop(FAILURE, None)
        return result, [None] * size if failure is None else list(failure)
    except PermissionError:
        raise  # a service that answers nobody with this key: no row will do better, so the job stops
    except (ValueError, OSError, ArithmeticError, TypeError, IndexError, KeyError, RuntimeError) as error:
        if size == 1:
            return batch, [f"{type(stage).__name__} failed: {type(error).__name__}: {error}"]
    # One bad row raised for the whole batch: find it by trying each row alone.
    parts, reasons = [], []
    for row in range(size):
        part, reason = _apply(stage, {name: column[row : row + 1] for name, column in batch.items()}, 1)
        reasons += reason
        if reason[0] is None:
            parts.append((row, part))
    if not parts:
        return batch, reasons
    merged: Batch = {}
    for name, example in parts[0][1].items():
        column = np.zeros((size, *example.shape[1:]), dtype=example.dtype)
        for row, part in parts:
            column[row] = part[name][0]
        merged[name] = column
    return merged, reasons


def _to_arrow(values: NDArray[Any], field: pa.Field) -> pa.Array:
    if is_vector(field):
        return vector_array(values, field)
    kind = field.type
    if pa.types.is_fixed_size_binary(kind):
        raw = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
        if raw.shape[1] != kind.byte_width:
            raise ValueError(f"{field.name}: {raw.shape[1]} bytes a row do not fit a column of {kind.byte_width}.")
        return pa.FixedSizeBinaryArray.from_buffers(kind, len(raw), [None, pa.py_buffer(raw)])
    if pa.types.is_list(kind):
        return pa.array([None if row is None else np.asarray(row).tolist() for row in values], kind)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return pa.array(np.asarray(values), kind)
    return pa.array(values.tolist(), kind)
