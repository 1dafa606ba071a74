"""An index on object storage as a local folder, without the vectors that are not needed.

Whoever keeps the names needs no vectors and a shard only its own stretch of them, which is the point of shards where
the whole does not fit. The files of the vectors are made as long as they are and left empty, which takes no room on a
disk that knows holes; a stretch is fetched in whole chunks, so that it can be compared with its digests. Sizes are
those of the listing; that they are right is checked by who opens the index.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hedwig.faults import retried
from hedwig.index.files import CHUNK_BYTES, INDEX_FILE, ORIGINALS_FILE
from hedwig.storage import filesystem, is_remote, join, list_files, read_bytes, resolve

__all__ = ["Fetch", "local_index"]

Fetch = Callable[[Path, int, int], None]


@contextmanager
def local_index(folder: str) -> Iterator[tuple[Path, Fetch]]:
    """A local folder of an index, and what brings bytes from and to of one of its files there.

    Args:
        folder: local, where nothing need be brought, or on object storage; then a temporary copy.
    """
    if not is_remote(folder):
        yield Path(resolve(folder)), lambda path, start, stop: None
        return
    scratch = Path(tempfile.mkdtemp(prefix="hedwig-"))

    def fetch(path: Path, start: int, stop: int) -> None:
        if start >= stop:
            return
        source, size = join(folder, path.relative_to(scratch).as_posix()), path.stat().st_size
        last = min(size, -(-stop // CHUNK_BYTES) * CHUNK_BYTES)
        with path.open("r+b") as file:
            for first in range(start // CHUNK_BYTES * CHUNK_BYTES, last, CHUNK_BYTES):
                file.seek(first)
                file.write(_read_range(source, first, min(CHUNK_BYTES, last - first)))

    try:
        for source in list_files(folder, recursive=True):
            target = scratch / source[len(folder.rstrip("/")) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.name in (INDEX_FILE, ORIGINALS_FILE):
                fs, inner = filesystem(source)
                with target.open("wb") as file:
                    file.truncate(fs.get_file_info(inner).size)
            else:
                target.write_bytes(read_bytes(source))
        yield scratch, fetch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@retried
def _read_range(path: str, start: int, length: int) -> bytes:
    fs, inner = filesystem(path)
    with fs.open_input_file(inner) as file:
        return bytes(file.read_at(length, start))
