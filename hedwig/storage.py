"""Where artefacts live: a folder with ``manifest.json``, written last, on a local disk, s3:// or gs://.

A folder without a manifest is unfinished work and never read as a result. The manifest carries a *fingerprint* (what
was asked: kind, settings, inputs) and the digests of its files (what came out): a stage whose fingerprint is already
there has nothing to do. Tables go through pyarrow filesystems, single images through boto3 or smart_open; credentials
come from the standard chains and are never read or stored here. Files are written under a temporary name and renamed,
so that no reader ever sees half of one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq

from hedwig.faults import read_s3, remote_filesystem, retried
from hedwig.schema import SCHEMA_VERSION

__all__ = [
    "MANIFEST",
    "Manifest",
    "clone",
    "delete",
    "exists",
    "filesystem",
    "fingerprint",
    "is_folder",
    "is_remote",
    "join",
    "list_files",
    "local_copy",
    "manifest_digest",
    "publish",
    "read_bytes",
    "read_manifest",
    "read_table",
    "resolve",
    "write_bytes",
    "write_parquet",
    "write_table",
    "writing",
]

MANIFEST = "manifest.json"
_PACKAGES = ("hedwig", "ray", "torch", "open_clip_torch", "faiss-cpu", "numpy", "pyarrow", "Pillow", "simplejpeg")


@dataclass(frozen=True)
class Manifest:
    """What a finished artefact says about itself; the text of ``manifest.json``."""

    kind: str
    fingerprint: str
    num_in: int
    num_out: int
    num_rejected: int
    config: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    rejected_reasons: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    finished_at: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.num_in != self.num_out + self.num_rejected:
            raise ValueError(
                f"{self.kind}: {self.num_in} rows went in but {self.num_out} came out and {self.num_rejected} were "
                "rejected; rows were lost or doubled. This is a bug: keep the folder and report it."
            )


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

    For S3, the endpoint and the credentials come from the ``AWS_*`` variables and files. An older S3-compatible store
    that answers 411 needs ``AWS_REQUEST_CHECKSUM_CALCULATION=when_required``.
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
        with smart_open.open(uri, "rb") as stream:
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
    with _replacing(path) as stream:
        stream.write(data)


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
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


def clone(source: str, target: str) -> None:
    """Make `target` the same artefact as `source`, its manifest last; on one local disk the files are hard links.

    Links are safe because a file of an artefact is replaced and never changed.
    """
    delete(target)
    for path in [f for f in list_files(source, recursive=True) if not f.endswith(f"/{MANIFEST}")]:
        copy_file(path, join(target, path[len(source.rstrip("/")) + 1 :]))
    copy_file(join(source, MANIFEST), join(target, MANIFEST))


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
def read_table(folder: str, columns: Sequence[str] | None = None, *, prefix: str = "part-") -> pa.Table:
    """All rows of the Parquet files ``{prefix}*.parquet`` directly in `folder`, sorted by pano_id when it is read.

    Raises:
        FileNotFoundError: `folder` holds no such file.
    """
    files = [f for f in list_files(folder, suffix=".parquet") if os.path.basename(f).startswith(prefix)]
    if not files:
        raise FileNotFoundError(f"{folder} holds no {prefix}*.parquet; run the stage that writes it first.")
    fs = filesystem(folder)[0]
    dataset = pa.dataset.dataset([filesystem(f)[1] for f in files], filesystem=fs, format="parquet")
    table = dataset.to_table(columns=list(columns) if columns is not None else None)
    return table.sort_by("pano_id") if "pano_id" in table.column_names else table


def write_table(path: str, table: pa.Table) -> None:
    """Write one Parquet file atomically, in the form of `write_parquet`."""
    if is_remote(path):
        sink = pa.BufferOutputStream()
        write_parquet(table, sink)
        write_bytes(path, sink.getvalue())
    else:
        with _replacing(path) as stream:
            write_parquet(table, stream)


def write_parquet(table: pa.Table, sink: Any) -> None:
    """Encode a Parquet file into a stream. Vectors are stored plain: dictionaries cost 4x the time, save nothing."""
    plain = {f.name for f in table.schema if pa.types.is_floating(f.type) or pa.types.is_fixed_size_binary(f.type)}
    packing = {name: "NONE" if name in plain else "SNAPPY" for name in table.column_names}
    packed = [name for name in table.column_names if name not in plain]
    numbers = [f.name for f in table.schema if not pa.types.is_fixed_size_binary(f.type)]  # bytes have no useful least
    pq.write_table(table, sink, compression=packing, use_dictionary=packed, write_statistics=numbers)


def fingerprint(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Digest of what was asked for: the same settings on the same inputs have the same fingerprint."""
    text = json.dumps([kind, SCHEMA_VERSION, config, inputs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_digest(folder: str) -> str:
    """sha256 of ``manifest.json``: the name under which other artefacts refer to this one."""
    return hashlib.sha256(read_bytes(join(folder, MANIFEST))).hexdigest()


def read_manifest(folder: str) -> Manifest | None:
    """The manifest of a finished artefact; None when the folder is absent or unfinished.

    Raises:
        ValueError: there is a manifest, and it is not one of ours.
    """
    path = join(folder, MANIFEST)
    if not exists(path):
        return None
    try:
        content = json.loads(read_bytes(path))
        return Manifest(**{k: v for k, v in content.items() if k in Manifest.__dataclass_fields__})
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a hedwig manifest ({error}); delete the folder to make it anew.") from error


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _digests(folder: str, skip: Sequence[str]) -> dict[str, str]:
    base = len(folder.rstrip("/")) + 1
    listed = [path for path in list_files(folder, recursive=True) if os.path.basename(path) != MANIFEST]
    return {path[base:]: _sha256(path) for path in listed if not path[base:].startswith(tuple(skip))}


@retried
def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    fs, inner = filesystem(path)
    with fs.open_input_stream(inner) as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def publish(
    folder: str,
    *,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    num_in: int,
    num_out: int,
    num_rejected: int = 0,
    rejected_reasons: Mapping[str, int] | None = None,
    details: Mapping[str, Any] | None = None,
    seconds: float = 0.0,
    skip: Sequence[str] = (),
) -> Manifest:
    """Digest the files of `folder`, but for those under `skip`, and write its manifest: now it is an artefact.

    Raises:
        ValueError: ``num_in != num_out + num_rejected``.
    """
    manifest = Manifest(
        kind=kind,
        fingerprint=fingerprint(kind, config, inputs),
        num_in=num_in,
        num_out=num_out,
        num_rejected=num_rejected,
        config=dict(config),
        inputs=dict(inputs),
        rejected_reasons=dict(rejected_reasons or {}),
        files=_digests(folder, skip),
        details=dict(details or {}),
        versions=_versions(),
        finished_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=round(seconds, 3),
    )
    write_bytes(join(folder, MANIFEST), (json.dumps(asdict(manifest), indent=1) + "\n").encode())
    return manifest


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
