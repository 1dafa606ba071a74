"""One sorted part of an index with its rows: made from vectors, written, and read back after every check.

It is read back in two steps, because who has the names need not have the vectors: `Listed` knows who is in which cell,
and maps the vectors of all cells or of some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hedwig.index import codecs
from hedwig.index.building import ROWS_SCHEMA, write_rows
from hedwig.index.files import (
    ADDED_FOLDER,
    CODEBOOK_FILE,
    HEADER_FILE,
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

__all__ = ["Listed", "Stored", "read_listed", "read_parts", "write_stored"]

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
        if not codecs.is_coded(codec):
            codes = flat.view(np.uint8).reshape(len(flat), codecs.code_bytes(codec, dim))
        else:
            codes = np.empty((len(flat), codecs.code_bytes(codec, dim)), dtype=np.uint8)
            for block in codecs.blocks(len(flat)):
                codes[block] = codecs.encode(codec, flat[block].astype(np.float32), codebook)
        segment = Segment(codec, dim, codes, flat, codebook, _starts(rows, num_cells, num_frames))
        return cls(Header(codec, dim, num_cells, num_frames, len(rows)), segment, rows)


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
    segment, coded = part.segment, part.segment.is_coded
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


@dataclass(frozen=True, eq=False)
class Listed:
    """A part on disk without its vectors.

    Attributes:
        header: what `index.json` says of it.
        folder: where its files are.
        rows: table of `ROWS_SCHEMA`, or some of its columns, in the order of the vectors.
        starts: (C + 1,) int64; cell c holds the vectors ``starts[c]`` to ``starts[c + 1]``.
        codebook: what the codec learnt.
    """

    header: Header
    folder: Path
    rows: pa.Table
    starts: NDArray[np.int64]
    codebook: NDArray[np.float32]

    def fits(self, main: Listed) -> bool:
        """Whether this is a part of the same index as `main`."""
        a, b = self.header, main.header
        return (a.codec, a.dim, a.num_cells, a.num_frames) == (b.codec, b.dim, b.num_cells, b.num_frames) and bool(
            np.array_equal(self.codebook, main.codebook)
        )

    def vectors(
        self,
        cells: range | None = None,
        *,
        memory_map: bool = True,
        checked: bool = False,
        fetch: Callable[[Path, int, int], None] | None = None,
    ) -> Segment:
        """The vectors of consecutive cells, or of all; they are numbered from the first of these on.

        Args:
            cells: which; the other cells of the segment are empty.
            memory_map: leave the vectors on disk and let the system keep what is used; else read them.
            checked: the files have passed their digests already; else those bytes are compared that will be read.
            fetch: brings bytes from and to of a file there first, where they may be missing.

        Raises:
            ValueError: a file is not what it should be.
        """
        header = self.header
        these = range(header.num_cells) if cells is None else cells
        first, stop = int(self.starts[these.start]), int(self.starts[these.stop])
        widths = {INDEX_FILE: codecs.code_bytes(header.codec, header.dim)}
        if codecs.is_coded(header.codec):
            widths[ORIGINALS_FILE] = 2 * header.dim
        spans = {name: (first * width, stop * width) for name, width in widths.items()}
        if fetch is not None:
            for name, span in spans.items():
                fetch(self.folder / name, *span)
        if not checked:
            verify_files(self.folder, {name: header.files[name] for name in spans}, spans)
        codes = open_bytes(self.folder / INDEX_FILE, memory_map=memory_map, span=spans[INDEX_FILE])
        original = np.float32 if header.codec == "fp32" else np.float16
        if ORIGINALS_FILE in spans:
            originals = open_bytes(self.folder / ORIGINALS_FILE, memory_map=True, span=spans[ORIGINALS_FILE])
        else:
            originals = codes
        return Segment(
            header.codec,
            header.dim,
            codes.reshape(-1, widths[INDEX_FILE]),
            originals.view(original).reshape(-1, header.dim),
            self.codebook,
            np.clip(self.starts, first, stop) - first,
        )


def read_listed(
    folder: Path,
    digests: Mapping[str, str] | None,
    *,
    prefix: str = "",
    columns: list[str] | None = None,
    vectors_too: bool = False,
    memory_map: bool = True,
) -> Listed:
    """Read a part but for its vectors: the header, then sizes, then digests, and only then what is in the files.

    Args:
        folder: where it lies.
        digests: see `read_header`.
        prefix: likewise.
        columns: of the rows; None for all. `cell_id` must be among them.
        vectors_too: compare the vectors with their digests as well, in the same pass.
        memory_map: of the rows.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not what it should be.
    """
    header = read_header(folder, digests, prefix)
    _check_header(folder, header)
    verify_files(folder, header.files, None if vectors_too else {INDEX_FILE: (0, 0), ORIGINALS_FILE: (0, 0)})
    schema = pq.read_schema(folder / ROWS_FILE)
    if not schema.equals(ROWS_SCHEMA):
        raise ValueError(f"{folder / ROWS_FILE} has the columns {schema.names}, not ours; {REBUILD}.")
    table = pq.read_table(folder / ROWS_FILE, columns=columns, memory_map=memory_map)
    if len(table) != header.num_rows:
        raise ValueError(f"{folder / ROWS_FILE} has {len(table)} rows instead of {header.num_rows}; {REBUILD}.")
    codebook = np.empty(0, np.float32)
    if codecs.is_coded(header.codec):
        shape = codecs.codebook_shape(header.codec, header.dim)
        codebook = np.fromfile(folder / CODEBOOK_FILE, np.float32).reshape(shape)
    return Listed(header, folder, table, _starts(table, header.num_cells, header.num_frames), codebook)


def read_parts(
    folder: Path,
    digests: Mapping[str, str] | None,
    *,
    columns: list[str] | None = None,
    vectors_too: bool = False,
    memory_map: bool = True,
) -> tuple[list[Listed], NDArray[np.int64]]:
    """All parts of an index, the added one last, and the rows that are passed over; see `read_listed`.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not what it should be, or the files do not belong together.
    """
    read = partial(read_listed, columns=columns, vectors_too=vectors_too, memory_map=memory_map)
    main = read(folder, digests)
    parts, removed = [main], np.empty(0, dtype=np.int64)
    if f"{ADDED_FOLDER}/{HEADER_FILE}" in main.header.files:
        parts.append(read(folder / ADDED_FOLDER, digests, prefix=f"{ADDED_FOLDER}/"))
    if REMOVED_FILE in main.header.files:
        removed = np.fromfile(folder / REMOVED_FILE, dtype=np.int64)
    num = sum(len(part.rows) for part in parts)
    if not parts[-1].fits(main) or (len(removed) and not 0 <= removed.min() <= removed.max() < num):
        raise ValueError(f"The parts of {folder} do not belong together; {REBUILD}.")
    return parts, removed


def _check_header(folder: Path, header: Header) -> None:
    """A header that is ours and whose sizes follow from its own numbers: nothing is allocated on its word."""
    codecs.check_codec(header.codec)
    numbers = (header.dim, header.num_frames, header.num_cells, header.num_rows)
    if any(type(n) is not int for n in numbers) or min(numbers) < 0 or min(numbers[:2]) < 1:
        raise ValueError(f"{folder} has a header that is not ours: {header.codec} {numbers}; {REBUILD}.")
    num = header.num_rows * header.num_frames
    sizes = {INDEX_FILE: num * codecs.code_bytes(header.codec, header.dim)}
    if codecs.is_coded(header.codec):
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
