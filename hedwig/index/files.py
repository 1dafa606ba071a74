"""The index on disk: flat arrays, and a header that knows the sha256 of every 32 MiB of them.

FAISS's own format is not used. Of 2,000 mutated FAISS files 382 load silently wrong and 2 abort the process, and 2.6 kB
of header can ask for 7.7 GB; a limit on what the parser may allocate bounds that, but the parser still runs. Here FAISS
parses nothing: `codes.bin` is the memory that it scans, its size is known from the header before anything is allocated,
and every chunk has passed its digest before the first search. The header itself carries its own digest, and the
artefact's manifest lists that of every file, the header's among them.

One sha256 over 1.5 GB takes a second on one core (1.4 GB/s with SHA instructions; blake2b 0.9 GB/s), so the digest is
kept per chunk and the chunks are checked by as many threads as there are cores; hashlib lets go of the GIL. Files are
read for that with `readinto` into one buffer a thread: the pages stay in the system's cache, not in this process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ADDED_FOLDER",
    "CODEBOOK_FILE",
    "HEADER_FILE",
    "INDEX_FILE",
    "INDEX_FILES",
    "ORIGINALS_FILE",
    "REBUILD",
    "REMOVED_FILE",
    "ROWS_FILE",
    "FileDigest",
    "Header",
    "check_digest",
    "link_or_write",
    "open_bytes",
    "read_header",
    "verify_files",
    "write_file",
    "write_header",
]

HEADER_FILE = "index.json"
INDEX_FILE = "codes.bin"
ORIGINALS_FILE = "originals.bin"
CODEBOOK_FILE = "codebook.bin"
REMOVED_FILE = "removed.bin"
ROWS_FILE = "rows.parquet"
ADDED_FOLDER = "added"
_PART_FILES = (HEADER_FILE, INDEX_FILE, ORIGINALS_FILE, CODEBOOK_FILE, REMOVED_FILE, ROWS_FILE)
INDEX_FILES = (*_PART_FILES, *(f"{ADDED_FOLDER}/{name}" for name in _PART_FILES))
REBUILD = "run `hedwig index` again"
FORMAT = 1
CHUNK_BYTES = 32 << 20
MAX_HEADER_BYTES = 16 << 20  # 7 TB of chunks
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class FileDigest:
    """What a file must be: its size and the sha256 of each chunk, in hex."""

    num_bytes: int
    chunk_bytes: int
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Header:
    """The text of `index.json`; `num_rows` counts panoramas, each with `num_frames` vectors."""

    codec: str
    dim: int
    num_cells: int
    num_frames: int
    num_rows: int
    files: Mapping[str, FileDigest] = field(default_factory=dict)


def write_file(path: Path, blocks: Iterable[Any]) -> FileDigest:
    """Write contiguous buffers one after the other under a temporary name, then rename; digests on the way."""
    digests: list[str] = []
    digest, filled, total = hashlib.sha256(), 0, 0
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("wb") as file:
        for block in blocks:
            data = memoryview(block).cast("B") if len(block) else memoryview(b"")
            file.write(data)
            total += len(data)
            while len(data):
                some = data[: CHUNK_BYTES - filled]
                digest.update(some)
                filled += len(some)
                data = data[len(some) :]
                if filled == CHUNK_BYTES:
                    digests.append(digest.hexdigest())
                    digest, filled = hashlib.sha256(), 0
    if filled or not digests:
        digests.append(digest.hexdigest())
    temporary.replace(path)
    return FileDigest(total, CHUNK_BYTES, tuple(digests))


def link_or_write(path: Path, source: Path | None, known: FileDigest | None, blocks: Iterable[Any]) -> FileDigest:
    """The same file again: a hard link where it is on this disk already, for a file of an index is never changed."""
    if source is not None and known is not None and source != path:
        temporary = path.with_name(f".{path.name}.linking")
        try:
            temporary.unlink(missing_ok=True)
            os.link(source, temporary)
            temporary.replace(path)
            return known
        except OSError:  # another disk, or one without links
            temporary.unlink(missing_ok=True)
    return write_file(path, blocks)


def write_header(folder: Path, header: Header) -> FileDigest:
    """Write `index.json` with the digest of its own content."""
    content = asdict(header)
    return write_file(folder / HEADER_FILE, [_text({**content, "sha256": _own_digest(content)})])


def read_header(folder: Path, digests: Mapping[str, str] | None, prefix: str = "") -> Header:
    """Read `index.json`, refusing one that was changed, that is too large or that is not ours.

    Args:
        folder: where it lies.
        digests: file name -> sha256 of the whole file in hex, as a manifest lists them; None: its own digest counts.
        prefix: of the names in `digests`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: see above; or the manifest lists no digest for one of the files.
    """
    path = folder / HEADER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {REBUILD}.")
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise ValueError(f"{path} is no header of an index: it has {path.stat().st_size} bytes; {REBUILD}.")
    if digests is not None:
        check_digest(path, digests.get(prefix + HEADER_FILE), REBUILD)
    try:
        content = json.loads(path.read_bytes())
        claimed = content.pop("sha256")
        if content.pop("format") != FORMAT:
            raise ValueError(f"{path} is of another version of hedwig; {REBUILD}.")
        if _own_digest(content) != claimed:
            raise ValueError(f"{path} is damaged: its content is not what its digest says; {REBUILD}.")
        files = {
            n: FileDigest(f["num_bytes"], f["chunk_bytes"], tuple(f["sha256"])) for n, f in content["files"].items()
        }
        header = Header(**{**content, "files": files})
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no header of an index ({error!r:.80}); {REBUILD}.") from error
    if digests is not None:
        for name in header.files:
            if digests.get(prefix + name) is None:
                raise ValueError(
                    f"The manifest lists no digest for {folder / name}, so it cannot be trusted; {REBUILD}."
                )
    return header


def verify_files(
    folder: Path, files: Mapping[str, FileDigest], spans: Mapping[str, tuple[int, int]] | None = None
) -> None:
    """Compare every chunk with its digest, by as many threads as there are cores; sizes first.

    Args:
        folder: where they lie.
        files: what they must be.
        spans: file name -> the bytes, from and to, that will be read of it; only chunks that hold some of them are
            compared. A file that is not named is compared whole.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not what the header says; the message names it.
    """
    chunks: list[tuple[Path, int, int, str]] = []
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {REBUILD}.")
        if path.stat().st_size != file.num_bytes or len(file.sha256) != max(1, -(-file.num_bytes // file.chunk_bytes)):
            raise ValueError(
                f"{path} is damaged or from another build: it has {path.stat().st_size} bytes and the header says "
                f"{file.num_bytes}; {REBUILD}."
            )
        first, end = (spans or {}).get(name, (0, max(1, file.num_bytes)))
        for number, digest in enumerate(file.sha256):
            start = number * file.chunk_bytes
            if first < end and start < end and first < start + file.chunk_bytes:
                chunks.append((path, start, min(file.chunk_bytes, file.num_bytes - start), digest))
    if not chunks:
        return
    if len(chunks) == 1:
        _verify_chunk(chunks[0])
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            for _ in pool.map(_verify_chunk, chunks):
                pass
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise


def open_bytes(path: Path, *, memory_map: bool, span: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """(n,) uint8, read-only: the file, or its bytes from and to, as memory, mapped or read."""
    start, stop = span or (0, path.stat().st_size)
    if start >= stop:  # nothing cannot be mapped
        return np.empty(0, dtype=np.uint8)
    if memory_map:
        return np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=(stop - start,))
    content = np.fromfile(path, dtype=np.uint8, offset=start, count=stop - start)
    content.setflags(write=False)
    return content


def check_digest(path: Path, expected: str | None, remedy: str) -> None:
    """Refuse a file whose sha256 is not the expected one in hex; `remedy` ends the message.

    Raises:
        ValueError: another digest, or none to compare with.
    """
    if expected is None:
        raise ValueError(f"The manifest lists no digest for {path}, so it cannot be trusted; {remedy}.")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.lower():
        raise ValueError(
            f"{path} is damaged or from another build: its sha256 is {found[:12]}…, the manifest says "
            f"{expected[:12]}…; {remedy}."
        )


def _verify_chunk(chunk: tuple[Path, int, int, str]) -> None:
    path, start, length, expected = chunk
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, length)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        _digest_of(file, buffer, length, digest)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{path} is damaged or from another build: bytes {start} to {start + length} have the sha256 "
            f"{digest.hexdigest()[:12]}…, the header says {expected[:12]}…; {REBUILD}."
        )


def _digest_of(file: RawIOBase, buffer: memoryview, length: int, digest: Any) -> None:
    while length > 0:
        num = file.readinto(buffer[:length])
        if not num:
            return
        digest.update(buffer[:num])
        length -= num


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps({"format": FORMAT, **content}, sort_keys=True, indent=1) + "\n").encode()


def _own_digest(content: Mapping[str, Any] | Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
