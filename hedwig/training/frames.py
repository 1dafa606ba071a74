"""The frames cache: panoramas as uint8 frames on disk, for training an encoder epoch after epoch.

A folder of Parquet files ``part-*.parquet``, one row per panorama: pano_id, lat, lon, split, caption, and the frames as
one fixed-size binary column, plain and uncompressed (a fifth of the time of a list column). The shape (V, S, S, 3) is
in the schema's metadata under ``frames_shape``. It is scratch of a training run, not an artefact: no manifest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from hedwig.storage import join, open_table, write_bytes

__all__ = ["frames_schema", "read_frames", "read_positions", "write_frames"]

SHAPE = b"frames_shape"
BATCH_BYTES = 2**26  # read at once; the scanner reads several batches ahead
COLUMNS = ("pano_id", "lat", "lon", "split", "caption")


def frames_schema(num_frames: int, frame_px: int) -> pa.Schema:
    """Schema of a frames cache of (V, S, S, 3) frames, the shape in its metadata."""
    return _schema((num_frames, frame_px, frame_px, 3))


def _schema(shape: tuple[int, ...]) -> pa.Schema:
    fields = {
        "pano_id": pa.string(),
        "lat": pa.float64(),
        "lon": pa.float64(),
        "split": pa.string(),
        "caption": pa.string(),
        "frames": pa.binary(int(np.prod(shape))),
    }
    return pa.schema(fields, metadata={SHAPE: ",".join(map(str, shape)).encode()})


def write_frames(folder: str, part: str, rows: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """Write one file of a frames cache atomically.

    Args:
        folder: local folder or URI of the cache.
        part: name of the file without ending, unique in the folder; the same name replaces the file.
        rows: pano_id, split (N,) str; lat, lon (N,) degrees; caption (N,) str or None; frames (N, V, S, S, 3) uint8.

    Returns:
        The path of the file.
    """
    frames = np.ascontiguousarray(rows["frames"])
    if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 (N, V, S, S, 3), got {frames.dtype} {frames.shape}.")
    schema = _schema(frames.shape[1:])
    kind = schema.field("frames").type
    columns = [
        pa.array([str(v) for v in rows["pano_id"]], pa.string()),
        pa.array(np.asarray(rows["lat"], dtype=np.float64)),
        pa.array(np.asarray(rows["lon"], dtype=np.float64)),
        pa.array([str(v) for v in rows["split"]], pa.string()),
        pa.array([None if v is None else str(v) for v in rows["caption"]], pa.string()),
        pa.FixedSizeBinaryArray.from_buffers(kind, len(frames), [None, pa.py_buffer(frames)]),
    ]
    table = pa.table(columns, schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, use_dictionary=False, compression="none", write_statistics=False)
    path = join(folder, part if part.startswith("part-") else f"part-{part}")
    write_bytes(f"{path}.parquet", sink.getvalue())
    return f"{path}.parquet"


def read_positions(folder: str) -> pa.Table:
    """Everything but the frames and captions (pano_id, lat, lon, split), sorted by pano_id.

    Raises:
        FileNotFoundError: the folder holds no cache.
        ValueError: a pano_id is there twice.
    """
    table = open_table(folder).to_table(columns=["pano_id", "lat", "lon", "split"]).sort_by("pano_id")
    ids = table["pano_id"].to_numpy(zero_copy_only=False)
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise ValueError(f"{folder!r} holds {twice[0]!r} twice; empty the folder and write the frames again.")
    return table


def read_frames(
    folder: str, pano_ids: Iterable[str] | None = None, *, mapped: bool = False
) -> dict[str, np.ndarray[Any, Any]]:
    """The rows of a frames cache, sorted by pano_id.

    Args:
        folder: local folder or URI of the cache.
        pano_ids: which rows; None for all. Only these are kept.
        mapped: keep the frames in a nameless temporary file that is mapped into memory, for more of them than fit:
            what is not in use is on disk only, and the file is gone with the array or the process.

    Returns:
        pano_id, split, caption (N,) object; lat, lon (N,) float64 degrees; frames (N, V, S, S, 3) uint8.

    Raises:
        FileNotFoundError: the folder holds no cache.
        ValueError: the files hold frames of different shapes, or the shape is not recorded.
    """
    dataset = open_table(folder)
    shapes = {(fragment.physical_schema.metadata or {}).get(SHAPE, b"") for fragment in dataset.get_fragments()}
    if len(shapes) != 1 or b"" in shapes:
        seen = ", ".join(sorted(shape.decode() or "none" for shape in shapes))
        raise ValueError(f"{folder!r} records the frame shapes {seen}; one is needed. Write the frames again.")
    shape = tuple(int(word) for word in shapes.pop().split(b","))
    condition = None if pano_ids is None else ds.field("pano_id").isin(pa.array(list(pano_ids), pa.string()))
    table = dataset.to_table(columns=list(COLUMNS), filter=condition).combine_chunks().sort_by("pano_id")
    rows = {name: table[name].to_numpy(zero_copy_only=False) for name in COLUMNS}
    frames = _room((len(table), *shape), mapped)
    ids, size = table["pano_id"], int(np.prod(shape))
    num_rows = max(1, BATCH_BYTES // size)
    batches = dataset.to_batches(columns=["pano_id", "frames"], filter=condition, batch_size=num_rows)
    for batch in batches:
        if batch.num_rows:
            column = batch["frames"]
            flat = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * size :][: len(column) * size]
            frames[pc.index_in(batch["pano_id"], value_set=ids).to_numpy()] = flat.reshape(-1, *shape)
    return {**rows, "frames": frames}


def _room(shape: tuple[int, ...], mapped: bool) -> np.ndarray[Any, Any]:
    if not mapped or 0 in shape:
        return np.empty(shape, dtype=np.uint8)
    with tempfile.TemporaryFile(prefix="hedwig-frames-") as file:  # the mapping outlives it
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
