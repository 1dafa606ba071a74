"""Sorting references into their cells, in memory or past it: the same bytes, in whatever order they come.

`write_streamed` is an external counting sort. Batches are written to a scratch file as they come, only their names,
places and cells stay in memory (some 60 bytes and the name each). When all are known, every row knows its place; the
scratch file is dealt in one pass into buckets of neighbouring places that fit into memory, and each bucket is ordered,
coded and appended. Vectors are read and written sequentially, twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from hedwig.index import codecs
from hedwig.index.files import (
    CODEBOOK_FILE,
    INDEX_FILE,
    ORIGINALS_FILE,
    ROWS_FILE,
    FileDigest,
    Header,
    open_bytes,
    write_file,
    write_header,
)

__all__ = ["ROWS_SCHEMA", "References", "check_references", "sorted_rows", "write_rows", "write_streamed"]

ROWS_SCHEMA = pa.schema(
    [
        pa.field("pano_id", pa.string(), nullable=False),
        pa.field("lat", pa.float64(), nullable=False),
        pa.field("lon", pa.float64(), nullable=False),
        pa.field("cell_id", pa.int32(), nullable=False),
    ]
)
_DOUBLE = "pano_id must be unique; {} occur more than once."

Batch = tuple[ArrayLike, ArrayLike, Any, ArrayLike, ArrayLike]


@dataclass(frozen=True, eq=False)
class References:
    """Checked references: vectors (N, V, D) float32 and a table of `ROWS_SCHEMA`, in one order."""

    vectors: NDArray[np.float32]
    rows: pa.Table


def check_references(
    vectors: ArrayLike, cell_ids: ArrayLike, pano_ids: Any, lat: ArrayLike, lon: ArrayLike, num_cells: int | None
) -> References:
    """Columns as they are needed, or an error; whether names are double shows only when they are sorted.

    Raises:
        ValueError: columns of different length, values that are not finite, cells that are out of range.
    """
    x = np.asarray(vectors, dtype=np.float32)
    cells = np.asarray(cell_ids)
    ids = pano_ids if isinstance(pano_ids, pa.Array | pa.ChunkedArray) else np.asarray(pano_ids, dtype=object)
    lats, lons = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    if (
        x.ndim not in (2, 3)
        or 0 in x.shape[1:]
        or any(a.shape != x.shape[:1] for a in (cells, lats, lons))
        or len(ids) != len(x)
    ):
        raise ValueError(
            f"vectors must be (N, D) or (N, V, D) with N cells, ids and positions; got {x.shape}, cells {cells.shape}, "
            f"{len(ids)} ids, lat {lats.shape}, lon {lons.shape}."
        )
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))
        raise ValueError(
            f"{len(bad)} embeddings are not finite, first {str(ids[int(bad[0])])!r}; embed these panoramas again."
        )
    if not (np.isfinite(lats).all() and np.isfinite(lons).all()):
        raise ValueError("A reference without a position is of no use as an answer; leave those rows out.")
    most = np.iinfo(np.int32).max if num_cells is None else num_cells
    if len(x) and (not np.issubdtype(cells.dtype, np.integer) or cells.min() < 0 or cells.max() >= most):
        raise ValueError(
            f"cell_ids must be integers in 0..{most - 1}; got {cells.dtype} from {cells.min()} to {cells.max()}."
        )
    names = ids.cast(pa.string()) if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids, pa.string())
    rows = pa.table([names, lats, lons, cells.astype(np.int32)], schema=ROWS_SCHEMA)
    return References(x if x.ndim == 3 else x[:, None], rows)


def sorted_rows(rows: pa.Table) -> tuple[pa.Table, NDArray[np.int64]]:
    """The table by (cell_id, pano_id) and the order that makes it; names compare by their UTF-8 bytes.

    Raises:
        ValueError: a name occurs twice.
    """
    if pc.count_distinct(rows["pano_id"]).as_py() != len(rows):
        counts = pc.value_counts(rows["pano_id"])
        double = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        raise ValueError(_DOUBLE.format(sorted(double.slice(0, 1000).to_pylist())[:3]))
    order = pc.sort_indices(rows, sort_keys=[("cell_id", "ascending"), ("pano_id", "ascending")])
    return rows.take(order).combine_chunks(), order.to_numpy().astype(np.int64)


def write_rows(folder: Path, rows: pa.Table) -> FileDigest:
    """Write `rows.parquet`."""
    sink = pa.BufferOutputStream()
    plain = ["lat", "lon"]
    pq.write_table(rows, sink, row_group_size=1 << 20, use_dictionary=["cell_id"], compression={
        name: "NONE" if name in plain else "SNAPPY" for name in rows.column_names
    })  # fmt: skip
    return write_file(folder / ROWS_FILE, [sink.getvalue()])


def write_streamed(
    batches: Iterable[Batch], folder: Path, *, num_cells: int | None, codec: str, memory_bytes: int
) -> None:
    """Write an index of all batches into `folder`; see `GeocellIndex.build_streamed`."""
    codecs.check_codec(codec)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sorting-", dir=folder) as scratch:
        arrived = _Arrived.of(batches, Path(scratch), num_cells, codec)
        rows, order = sorted_rows(arrived.rows)
        dim, num_frames = arrived.shape[1], arrived.shape[0]
        most = int(rows["cell_id"][-1].as_py()) + 1 if len(rows) else 0
        sample = arrived.read(order[codecs.sampled(codec, len(order))])
        codebook = codecs.fit(codec, sample.reshape(-1, dim)[: codecs.PQ_SAMPLE], arrived.low, arrived.high)
        digests = {}
        coded = codecs.is_coded(codec)
        if coded:
            # Two files from one pass over the buckets: the originals are written first and read back for the codes.
            digests[ORIGINALS_FILE] = write_file(folder / ORIGINALS_FILE, arrived.in_order(order, memory_bytes))
            digests[CODEBOOK_FILE] = write_file(folder / CODEBOOK_FILE, [codebook])
            originals = open_bytes(folder / ORIGINALS_FILE, memory_map=True).view(np.float16).reshape(-1, dim)
            codes = (
                codecs.encode(codec, originals[block].astype(np.float32), codebook)
                for block in codecs.blocks(len(originals))
            )
            digests[INDEX_FILE] = write_file(folder / INDEX_FILE, codes)
        else:
            digests[INDEX_FILE] = write_file(folder / INDEX_FILE, arrived.in_order(order, memory_bytes))
        digests[ROWS_FILE] = write_rows(folder, rows)
    write_header(folder, Header(codec, dim, num_cells or most, num_frames, len(rows), digests))


@dataclass(frozen=True, eq=False)
class _Arrived:
    """Everything in its order of arrival: vectors in a file, rows in memory."""

    path: Path
    dtype: Any
    shape: tuple[int, int]
    rows: pa.Table
    low: NDArray[np.float32]
    high: NDArray[np.float32]

    @classmethod
    def of(cls, batches: Iterable[Batch], scratch: Path, num_cells: int | None, codec: str) -> _Arrived:
        dtype = np.dtype(np.float32 if codec == "fp32" else np.float16)
        path = scratch / "arrived"
        shape: tuple[int, int] | None = None
        tables = []
        low = high = np.empty(0, dtype=np.float32)
        with path.open("wb") as file:
            for batch in batches:
                some = check_references(*batch, num_cells)
                here = (some.vectors.shape[1], some.vectors.shape[2])
                if shape is None:
                    shape = here
                    low, high = np.full(here[1], np.inf, np.float32), np.full(here[1], -np.inf, np.float32)
                if here != shape:
                    raise ValueError(f"A batch has vectors of the shape {here}, those before it had {shape}.")
                stored = np.ascontiguousarray(some.vectors, dtype=dtype)
                file.write(stored.data)
                tables.append(some.rows)
                flat = stored.reshape(-1, here[1])
                low, high = (
                    np.minimum(low, flat.min(axis=0, initial=np.inf)),
                    np.maximum(high, flat.max(axis=0, initial=-np.inf)),
                )
        if shape is None:
            raise ValueError("There is no batch of references; an index of nothing needs one that is empty.")
        return cls(path, dtype, shape, pa.concat_tables(tables), low.astype(np.float32), high.astype(np.float32))

    def read(self, which: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, V, D) the vectors of some rows by their order of arrival."""
        if not len(which):
            return np.empty((0, *self.shape), dtype=np.float32)
        whole = np.memmap(self.path, self.dtype, "r").reshape(-1, *self.shape)
        forward = np.argsort(which, kind="stable")
        found = np.empty((len(which), *self.shape), dtype=np.float32)
        found[forward] = whole[which[forward]]
        return found

    def in_order(self, order: NDArray[np.int64], memory_bytes: int) -> Iterator[NDArray[Any]]:
        """The stored vectors in the given order, a bucket at a time."""
        width = self.shape[0] * self.shape[1]
        per_bucket = max(1, memory_bytes // (2 * width * self.dtype.itemsize))  # a bucket and its ordered copy
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        if len(order) <= per_bucket:
            yield self._block(self.path, 0, len(order))[order]
            return
        paths = [self.path.with_name(f"bucket-{n}") for n in range(-(-len(order) // per_bucket))]
        for start in range(0, len(order), per_bucket):
            arrived = self._block(self.path, start, min(per_bucket, len(order) - start))
            bucket = rank[start : start + len(arrived)] // per_bucket
            for number in np.unique(bucket):
                with paths[number].open("ab") as file:
                    file.write(arrived[bucket == number].data)
        for number, path in enumerate(paths):
            first = number * per_bucket
            ranks = rank[np.sort(order[first : first + per_bucket])] - first
            arrived = self._block(path, 0, len(ranks))
            path.unlink()
            yield arrived[np.argsort(ranks)]

    def _block(self, path: Path, start: int, num: int) -> NDArray[Any]:
        width = self.shape[0] * self.shape[1]
        flat = np.fromfile(path, self.dtype, num * width, offset=start * width * self.dtype.itemsize)
        return flat.reshape(num, width)
