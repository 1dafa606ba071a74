"""Tables of Parquet files: which files a table has, reading them, and the one form in which ours are written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from hedwig.faults import retried
from hedwig.storage.files import filesystem, is_remote, list_files, replacing, write_bytes
from hedwig.storage.manifests import read_manifest

__all__ = ["open_table", "read_table", "table_files", "write_parquet", "write_table"]


def table_files(folder: str, prefix: str = "part-") -> list[str]:
    """The Parquet files of a table: those that its manifest lists, else all that are there.

    What lies beside the listed ones was left by a compaction that was killed, and must not be read.
    """
    there = [f for f in list_files(folder, suffix=".parquet") if os.path.basename(f).startswith(prefix)]
    try:
        manifest = read_manifest(folder) if there else None
    except ValueError:
        manifest = None  # somebody else's file of that name
    return [f for f in there if manifest and os.path.basename(f) in manifest.files] or there


def open_table(table: str | Sequence[str], *, prefix: str = "part-") -> Any:
    """The pyarrow dataset of a table's folder, or of some of its files; no row has been read yet.

    Raises:
        FileNotFoundError: the folder holds no such file, or there are none.
    """
    files = table_files(table, prefix) if isinstance(table, str) else list(table)
    if not files:
        where = table if isinstance(table, str) else "An empty list of files"
        raise FileNotFoundError(f"{where} holds no {prefix}*.parquet; run the stage that writes it first.")
    return pa.dataset.dataset([filesystem(f)[1] for f in files], filesystem=filesystem(files[0])[0], format="parquet")


@retried
def read_table(folder: str, columns: Sequence[str] | None = None, *, prefix: str = "part-") -> pa.Table:
    """All rows of the Parquet files ``{prefix}*.parquet`` directly in `folder`, sorted by pano_id when it is read.

    Raises:
        FileNotFoundError: `folder` holds no such file.
    """
    table = open_table(folder, prefix=prefix).to_table(columns=list(columns) if columns is not None else None)
    return table.sort_by("pano_id") if "pano_id" in table.column_names else table


def write_table(path: str, table: pa.Table, *, rows_per_group: int | None = None) -> None:
    """Write one Parquet file atomically, in the form of `write_parquet`."""
    if is_remote(path):
        sink = pa.BufferOutputStream()
        write_parquet(table, sink, rows_per_group=rows_per_group)
        write_bytes(path, sink.getvalue())
    else:
        with replacing(path) as stream:
            write_parquet(table, stream, rows_per_group=rows_per_group)


def write_parquet(table: pa.Table, sink: Any, *, rows_per_group: int | None = None) -> None:
    """Encode a Parquet file into a stream. Vectors are stored plain: dictionaries cost 4x the time, save nothing."""
    plain = {f.name for f in table.schema if pa.types.is_floating(f.type) or pa.types.is_fixed_size_binary(f.type)}
    packing = {name: "NONE" if name in plain else "SNAPPY" for name in table.column_names}
    packed = [name for name in table.column_names if name not in plain]
    numbers = [f.name for f in table.schema if not pa.types.is_fixed_size_binary(f.type)]  # bytes have no useful least
    pq.write_table(
        table, sink, compression=packing, use_dictionary=packed, write_statistics=numbers, row_group_size=rows_per_group
    )
