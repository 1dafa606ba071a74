"""One sorted part of an index with its rows: made from vectors, written, and read back after every check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hedwig.index import codecs
from hedwig.index.building import ROWS_SCHEMA, write_rows
from hedwig.index.files import (
    CODEBOOK_FILE,
    INDEX_FILE,
    ORIGINALS_FILE,
    REBUILD,
    REMOVED_FILE,
    ROWS_FILE,
    FileDigest,
    Header,
    link_or_write,
    open_bytes,
    read_header,
    verify_files,
    write_file,
    write_header,
)
from hedwig.index.segment import Segment

__all__ = ["Stored", "read_stored", "write_stored"]

_WRITTEN_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class Stored:
    """A segment, the references it belongs to, and where it lies on disk if it does.

    Attributes:
        header: what `index.json` says of it; its digests are empty until it is written.
        segment: the vectors, V after V for each row.
        rows: table of `ROWS_SCHEMA` in the order of the vectors.
        folder: where its files are.
    """

    header: Header
    segment: Segment
    rows: pa.Table
    folder: Path | None = None

    @classmethod
    def of(
        cls,
        vectors: NDArray[np.float32],
        rows: pa.Table,
        codec: str,
        num_cells: int,
        codebook: NDArray[np.float32] | None = None,
    ) -> Stored:
        """Code sorted vectors (N, V, D) of sorted rows; with a codebook that is given nothing is learnt."""
        num_frames, dim = vectors.shape[1:]
        original = np.float32 if codec == "fp32" else np.float16
        flat = np.ascontiguousarray(vectors, dtype=original).reshape(-1, dim)
        if codebook is None:
            which = codecs.sampled(codec, len(rows))
            sample = flat.reshape(-1, num_frames, dim)[which].reshape(-1, dim)[: codecs.PQ_SAMPLE]
            low, high = flat.min(axis=0, initial=np.inf), flat.max(axis=0, initial=-np.inf)
            codebook = codecs.fit(codec, sample.astype(np.float32), low.astype(np.float32), high.astype(np.float32))
        if codec in ("fp16", "fp32"):
            codes = flat.view(np.uint8).reshape(len(flat), codecs.code_bytes(codec, dim))
        else:
            codes = np.empty((len(flat), codecs.code_bytes(codec, dim)), dtype=np.uint8)
            for block in codecs.blocks(len(flat)):
                codes[block] = codecs.encode(codec, flat[block].astype(np.float32), codebook)
        segment = Segment(codec, dim, codes, flat, codebook, _starts(rows, num_cells, num_frames))
        return cls(Header(codec, dim, num_cells, num_frames, len(rows)), segment, rows)

    def fits(self, main: Stored) -> bool:
        """Whether this is a part of the same index as `main`."""
        a, b = self.header, main.header
        return (a.codec, a.dim, a.num_cells, a.num_frames) == (b.codec, b.dim, b.num_cells, b.num_frames) and bool(
            np.array_equal(self.segment.codebook, main.segment.codebook)
        )


def write_stored(
    folder: Path, part: Stored, more: Mapping[str, FileDigest], removed: NDArray[np.int64] | None = None
) -> FileDigest:
    """Write a part and its header; large files that are on this disk already become links.

    Args:
        folder: made if it is not there.
        part: what to write.
        more: files that the header shall vouch for besides.
        removed: rows that are passed over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    segment, coded = part.segment, part.segment.codec in ("sq8", "pq")
    arrays: dict[str, NDArray[Any]] = {INDEX_FILE: segment.codes}
    if coded:
        arrays |= {ORIGINALS_FILE: segment.originals, CODEBOOK_FILE: segment.codebook}
    files = dict(more)
    for name, array in arrays.items():
        source = None if part.folder is None else part.folder / name
        whole = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        pieces = (whole[start : start + _WRITTEN_BYTES] for start in range(0, len(whole), _WRITTEN_BYTES))
        files[name] = link_or_write(folder / name, source, part.header.files.get(name), pieces)
    files[ROWS_FILE] = write_rows(folder, part.rows)
    if removed is not None and len(removed):
        files[REMOVED_FILE] = write_file(folder / REMOVED_FILE, [removed])
    return write_header(folder, replace(part.header, files=files))


def read_stored(
    folder: Path, digests: Mapping[str, str] | None, *, prefix: str = "", memory_map: bool = True
) -> Stored:
    """Read a part: the header, then sizes, then digests, and only then what is in the files.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not what it should be.
    """
    header = read_header(folder, digests, prefix)
    _check_header(folder, header)
    verify_files(folder, header.files)
    table = pq.read_table(folder / ROWS_FILE, memory_map=memory_map)
    if not table.schema.equals(ROWS_SCHEMA):
        raise ValueError(f"{folder / ROWS_FILE} has the columns {table.schema.names}, not ours; {REBUILD}.")
    if len(table) != header.num_rows:
        raise ValueError(f"{folder / ROWS_FILE} has {len(table)} rows instead of {header.num_rows}; {REBUILD}.")
    coded = header.codec in ("sq8", "pq")
    codes = open_bytes(folder / INDEX_FILE, memory_map=memory_map)
    original = np.float32 if header.codec == "fp32" else np.float16
    originals = open_bytes(folder / ORIGINALS_FILE, memory_map=True) if coded else codes
    shape = codecs.codebook_shape(header.codec, header.dim)
    codebook = np.fromfile(folder / CODEBOOK_FILE, np.float32).reshape(shape) if coded else np.empty(0, np.float32)
    segment = Segment(
        header.codec,
        header.dim,
        codes.reshape(-1, codecs.code_bytes(header.codec, header.dim)),
        originals.view(original).reshape(-1, header.dim),
        codebook,
        _starts(table, header.num_cells, header.num_frames),
    )
    return Stored(header, segment, table, folder)


def _check_header(folder: Path, header: Header) -> None:
    """A header that is ours and whose sizes follow from its own numbers: nothing is allocated on its word."""
    codecs.check_codec(header.codec)
    numbers = (header.dim, header.num_frames, header.num_cells, header.num_rows)
    if any(type(n) is not int for n in numbers) or min(numbers) < 0 or min(numbers[:2]) < 1:
        raise ValueError(f"{folder} has a header that is not ours: {header.codec} {numbers}; {REBUILD}.")
    num = header.num_rows * header.num_frames
    sizes = {INDEX_FILE: num * codecs.code_bytes(header.codec, header.dim)}
    if header.codec in ("sq8", "pq"):
        sizes[ORIGINALS_FILE] = 2 * num * header.dim
        sizes[CODEBOOK_FILE] = 4 * int(np.prod(codecs.codebook_shape(header.codec, header.dim)))
    for name, size in sizes.items():
        if name not in header.files or header.files[name].num_bytes != size:
            raise ValueError(f"{folder / name} should have {size} bytes by its header, and has not; {REBUILD}.")
    if ROWS_FILE not in header.files or header.num_cells > 1 << 24:
        raise ValueError(f"{folder} has a header that is not ours: {header.num_cells} cells; {REBUILD}.")


def _starts(rows: pa.Table, num_cells: int, num_frames: int) -> NDArray[np.int64]:
    """(C + 1,) where each cell's vectors begin.

    Raises:
        ValueError: the rows are not sorted by cell, or name one that is not there.
    """
    cells = rows["cell_id"].to_numpy()
    if len(cells) and (cells[0] < 0 or cells[-1] >= num_cells or (np.diff(cells) < 0).any()):
        raise ValueError(f"{ROWS_FILE} is not sorted by cells 0..{num_cells - 1}; {REBUILD}.")
    counts = np.bincount(cells, minlength=num_cells) if len(cells) else np.zeros(num_cells, dtype=np.int64)
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]) * num_frames
