"""The same table in few large files, while other artefacts go on knowing it by the name that they know.

A job writes as many files as it has blocks, and object storage answers once per file. Rows keep their order and their
bytes; only files and row groups change. So the artefact stays what it was: its new manifest says for which one it
stands (`hedwig.storage.Manifest`), its digest is still the old one's, and no stage after it, nor the pointer that
publishes it, is out of date.

Killed at any point, the old table or the new one is whole. New files are written aside, read back and compared, copied
beside the old ones, and only then does one write of the manifest make them the table; readers ask the manifest which
files a table has (`hedwig.storage.table_files`). What a killed compaction leaves is taken by the next one, or by
``hedwig gc``. Whoever reads the folder with pyarrow alone sees rows twice until then, and one who is reading while the
old files go fails and must begin again: compact when no job is at work.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hedwig import storage

__all__ = ["Compaction", "compact"]

# Larger files are read no faster, and one file is held in memory twice while it is written.
FILE_BYTES, GROUP_BYTES = 256 * 2**20, 32 * 2**20
ASIDE = ".compacting"


@dataclass(frozen=True)
class Compaction:
    """What became of a table.

    Attributes:
        num_rows: N, before and after.
        files_before: Parquet files before.
        files_after: and after; as many as before where there was nothing to do.
        bytes_before: of these files.
        bytes_after: of these files.
        rows_per_file: in each file but the last.
        rows_per_group: in each row group but a file's last.
    """

    num_rows: int
    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int
    rows_per_file: int
    rows_per_group: int


def compact(folder: str, *, rows_per_file: int | None = None) -> Compaction:
    """Rewrite the table of a finished artefact into files of `rows_per_file` rows.

    Args:
        folder: of the artefact.
        rows_per_file: of each file but the last; None for as many as 256 MiB hold.

    Raises:
        FileNotFoundError: there is no finished artefact, or it holds no table.
        ValueError: rows_per_file is below 1, or the files have different columns.
        RuntimeError: the table was made anew meanwhile, or what was written is not what was read.
    """
    if rows_per_file is not None and rows_per_file < 1:
        raise ValueError(f"rows_per_file is {rows_per_file}; it must be at least 1.")
    folder = storage.resolve(folder)
    manifest = storage.read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder} has no {storage.MANIFEST}: it is no finished table; run its stage first.")
    files = _tidied(folder, manifest)
    if not files:
        raise FileNotFoundError(f"{folder} is a finished {manifest.kind}, and has no part-*.parquet to compact.")
    found = [pq.read_metadata(_opened(path)) for path in files]
    num_rows, size = sum(one.num_rows for one in found), sum(_size(path) for path in files)
    width = max(1, size // max(1, num_rows))
    per_file = rows_per_file or max(1, FILE_BYTES // width)
    per_group = max(1, min(per_file, GROUP_BYTES // width))
    wanted = -(-num_rows // per_file)
    if len(files) <= wanted:
        return Compaction(num_rows, len(files), len(files), size, size, per_file, per_group)
    before = storage.read_bytes(storage.join(folder, storage.MANIFEST))
    prefix, aside = f"part-{hashlib.sha256(before).hexdigest()[:8]}", storage.join(folder, ASIDE)
    digests: dict[str, str] = {}
    written = 0
    for number, table in enumerate(_tables(files, per_file)):
        name = f"{prefix}-{number:05d}.parquet"
        path = storage.join(aside, name)
        storage.write_table(path, table, rows_per_group=per_group)
        if not pq.read_table(_opened(path)).equals(table):
            raise RuntimeError(f"{path} does not hold the rows that were written to it; is the disk at fault?")
        digests[name], written = storage.sha256_of(path), written + table.num_rows
    if written != num_rows:
        raise RuntimeError(f"{written} rows of {num_rows} were written to {aside}; nothing was changed.")
    for name in digests:
        storage.copy_file(storage.join(aside, name), storage.join(folder, name))
    if storage.read_bytes(storage.join(folder, storage.MANIFEST)) != before:
        raise RuntimeError(f"{folder} was made anew while it was compacted; compact it again if it needs it.")
    old = [os.path.basename(path) for path in files]
    kept = {name: digest for name, digest in manifest.files.items() if name not in old}
    record = {"files_before": len(files), "rows_per_file": per_file, "rows_per_group": per_group}
    storage.write_manifest(
        folder,
        replace(
            manifest,
            files={**kept, **digests},
            details={**manifest.details, "compacted": record},
            stands_for=storage.manifest_digest(folder),
        ),
    )
    after = sum(_size(path) for path in _tidied(folder, storage.read_manifest(folder)))
    return Compaction(num_rows, len(files), len(digests), size, after, per_file, per_group)


def _tidied(folder: str, manifest: storage.Manifest | None) -> list[str]:
    """The table's files, after what killed compactions left beside them is gone."""
    files = storage.table_files(folder)
    storage.delete(storage.join(folder, ASIDE))
    listed = manifest is not None and any(os.path.basename(path) in manifest.files for path in files)
    for path in storage.list_files(folder, suffix=".parquet") if listed else ():
        if os.path.basename(path).startswith("part-") and path not in files:
            storage.delete(path)
    return files


def _tables(files: Sequence[str], per_file: int) -> Iterator[pa.Table]:
    """The rows of `files` in their order, `per_file` at a time; one such table is in memory at once."""
    schema, waiting, held = None, list[Any](), 0
    for path in files:
        parquet = pq.ParquetFile(_opened(path))
        found = parquet.schema_arrow
        schema = schema or found
        if not found.equals(schema, check_metadata=False) or [f.metadata for f in found] != [
            f.metadata for f in schema
        ]:
            raise ValueError(f"{path} has other columns than {files[0]}; these are not the files of one table.")
        for batch in parquet.iter_batches(batch_size=min(per_file, 8192)):
            while held + batch.num_rows >= per_file:
                head = per_file - held
                yield pa.Table.from_batches([*waiting, batch.slice(0, head)], schema)
                batch, waiting, held = batch.slice(head), [], 0
            if batch.num_rows:
                waiting, held = [*waiting, batch], held + batch.num_rows
    if held:
        yield pa.Table.from_batches(waiting, schema)


def _opened(path: str) -> Any:
    fs, inner = storage.filesystem(path)
    return fs.open_input_file(inner)


def _size(path: str) -> int:
    fs, inner = storage.filesystem(path)
    return int(fs.get_file_info(inner).size)
