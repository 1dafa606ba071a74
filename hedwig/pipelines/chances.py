"""Another chance for the rejected rows of a finished table, which stays finished unless more rows come out.

A finished table with another manifest makes everything after it stale, so that trying rejected rows again must not
change the manifest where nothing came of it: not when they fail again, not when the attempt raises, not when the
process is killed. The old text is therefore kept aside, in the same folder, until the attempt has ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.parquet as pq

from hedwig import storage

__all__ = ["another_chance", "put_back_manifest"]

ASIDE = ".manifest-before.json"


@contextmanager
def another_chance(folder: str, there: storage.Manifest) -> Iterator[None]:
    """Take the manifest `there` away while the block tries again; it comes back unless more rows are in the table."""
    path = storage.join(folder, storage.MANIFEST)
    storage.write_bytes(storage.join(folder, ASIDE), storage.read_bytes(path))
    # What tells `map_rows` that the rows in the folder are of this very work; a table that was taken over lacks it.
    storage.write_bytes(storage.join(folder, ".asked"), there.fingerprint.encode())
    storage.delete(path)
    try:
        yield
    finally:
        put_back_manifest(folder)


def put_back_manifest(folder: str) -> None:
    """End what `another_chance` began, here or in a process that was killed."""
    path, aside = storage.join(folder, storage.MANIFEST), storage.join(folder, ASIDE)
    if not storage.exists(aside):
        return
    text = storage.read_bytes(aside)
    before = storage.Manifest(**json.loads(text))
    if _num_rows(folder) <= before.num_out:
        storage.write_bytes(path, text)
    storage.delete(aside)


def _num_rows(folder: str) -> int:
    total = 0
    for path in storage.list_files(folder, suffix=".parquet"):
        fs, inner = storage.filesystem(path)
        total += pq.read_metadata(fs.open_input_file(inner)).num_rows
    return total
