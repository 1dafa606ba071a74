"""Files on a local disk, s3:// or gs://, by one set of functions; the only place that knows where a path leads.

Single images go through boto3 or smart_open, everything else through pyarrow filesystems. A file is written under a
temporary name and renamed, or appears in object storage when its upload is complete, so that no reader sees half of
one. What fails for a while is tried again (`hedwig.faults`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs

from hedwig.faults import open_options, read_s3, remote_filesystem, retried

__all__ = [
    "copy_file",
    "delete",
    "exists",
    "filesystem",
    "is_folder",
    "is_remote",
    "join",
    "list_files",
    "local_copy",
    "read_bytes",
    "replacing",
    "resolve",
    "sha256_of",
    "write_bytes",
    "writing",
]


def is_remote(path: str) -> bool:
    """Whether `path` names object storage (``scheme://``) instead of a local file."""
    return "://" in path and not path.startswith("file://")


def resolve(path: str, base: str | None = None) -> str:
    """An absolute path or URI; relative ones start from `base` (a folder) or the working directory."""
    if is_remote(path):
        return path
    path = path.removeprefix("file://")
    if base is not None and not os.path.isabs(path):
        return join(base, path)
    return os.path.abspath(os.path.expanduser(path))


def join(folder: str, *parts: str) -> str:
    """Append `parts` to a local folder or a URI."""
    return "/".join([folder.rstrip("/"), *parts]) if is_remote(folder) else os.path.join(folder, *parts)


def filesystem(path: str) -> tuple[Any, str]:
    """The pyarrow filesystem of `path` and the path inside it.

    Endpoint, region, patience and anonymity come from the variables in `hedwig.faults`, credentials from the standard
    chains. An older S3-compatible store that answers 411 needs ``AWS_REQUEST_CHECKSUM_CALCULATION=when_required``.
    """
    if is_remote(path):
        return remote_filesystem(path)
    return pa.fs.LocalFileSystem(), resolve(path)


@retried
def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    fs, inner = filesystem(path)
    return bool(fs.get_file_info(inner).type != pa.fs.FileType.NotFound)


@retried
def is_folder(path: str) -> bool:
    """Whether `path` is a folder (on object storage: a prefix of something)."""
    fs, inner = filesystem(path)
    return bool(fs.get_file_info(inner).type == pa.fs.FileType.Directory)


@retried
def list_files(folder: str, *, suffix: str = "", recursive: bool = False) -> list[str]:
    """Sorted full paths of the visible files in `folder` that end with `suffix`; none where there is no folder."""
    fs, inner = filesystem(folder)
    found = fs.get_file_info(pa.fs.FileSelector(inner, recursive=recursive, allow_not_found=True))
    names = [info.path[len(inner.rstrip("/")) + 1 :] for info in found if info.type == pa.fs.FileType.File]
    visible = [n for n in names if n.endswith(suffix) and not any(part.startswith(".") for part in n.split("/"))]
    return [join(folder, n) for n in sorted(visible)]


@retried
def read_bytes(uri: str) -> bytes:
    """The bytes at a local path, ``s3://`` or ``gs://`` address.

    Raises:
        FileNotFoundError: nothing is there, or it is no file.
        OSError: the storage failed; the message names the address.
    """
    if not is_remote(uri):
        try:
            return Path(resolve(uri)).read_bytes()
        except (IsADirectoryError, NotADirectoryError, FileNotFoundError) as error:
            raise FileNotFoundError(f"no image file at {uri}") from error
    if uri.startswith("s3://"):
        return read_s3(uri)
    import smart_open

    try:
        with smart_open.open(uri, "rb", transport_params=open_options(uri)) as stream:
            return bytes(stream.read())
    except Exception as error:  # botocore's and urllib3's are neither OSError nor ValueError
        raise OSError(f"cannot read {uri}: {type(error).__name__}: {error}") from error


@retried
def write_bytes(path: str, data: bytes | pa.Buffer) -> None:
    """Write a whole file atomically: a reader sees the old content or the new, never half."""
    if is_remote(path):
        fs, inner = filesystem(path)
        with fs.open_output_stream(inner) as stream:  # an object appears only when its upload completes
            stream.write(data)
        return
    with replacing(path) as stream:
        stream.write(data)


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A stream whose content becomes the local file `path` when the block ends without an error."""
    target = Path(resolve(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    with open(temporary, "wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, target)


@retried
def delete(path: str) -> None:
    """Remove a file, or a folder with all it holds; nothing there is no error."""
    fs, inner = filesystem(path)
    kind = fs.get_file_info(inner).type
    if kind == pa.fs.FileType.Directory:
        fs.delete_dir(inner)
    elif kind == pa.fs.FileType.File:
        fs.delete_file(inner)


@retried
def copy_file(source: str, target: str) -> None:
    """Copy one file; on one local disk as a hard link."""
    if not is_remote(source) and not is_remote(target):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, target)
        return
    fs, inner = filesystem(source)
    other, place = filesystem(target)
    pa.fs.copy_files(inner, place, source_filesystem=fs, destination_filesystem=other)


@retried
def sha256_of(path: str) -> str:
    """Digest of a file, read once from its beginning to its end."""
    digest = hashlib.sha256()
    fs, inner = filesystem(path)
    with fs.open_input_stream(inner) as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def writing(folder: str) -> Iterator[Path]:
    """A local scratch folder whose files move into `folder` when the block ends without an error.

    For the stages whose libraries write only local files (FAISS, GeoParquet, safetensors). What `folder` held before
    is replaced; its manifest goes first, so that a crash in between leaves an unfinished artefact, not a mixed one.
    """
    scratch = Path(tempfile.mkdtemp(prefix="hedwig-"))
    try:
        yield scratch
        delete(folder)
        for path in sorted(p for p in scratch.rglob("*") if p.is_file()):
            write_bytes(join(folder, *path.relative_to(scratch).parts), path.read_bytes())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def local_copy(folder: str) -> Iterator[Path]:
    """`folder` as a local path: itself when it is local, else a temporary copy."""
    if not is_remote(folder):
        yield Path(resolve(folder))
        return
    scratch = Path(tempfile.mkdtemp(prefix="hedwig-"))
    try:
        for path in list_files(folder, recursive=True):
            target = scratch / path[len(folder.rstrip("/")) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read_bytes(path))
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
