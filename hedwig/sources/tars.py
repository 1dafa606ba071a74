"""WebDataset tars: a listing out of their members, and single images out of them without unpacking.

An image inside a tar is addressed as ``<tar>#<member>@<offset>+<size>``, for instance
``s3://bucket/000.tar#p1.jpg@1536+20480``: one ranged read answers it, on local disk and in object storage alike, and no
process needs an index. The 512 bytes before the data are the member's header, and are checked, so that a tar replaced
since gives an error and not another picture. ``<tar>#<member>`` works too; the offsets of that tar are then looked up
once and kept. Compressed tars cannot be read at an offset and are refused.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa

from hedwig import storage
from hedwig.sources.readers import IMAGE_SUFFIXES, listing_table

__all__ = ["is_member", "read_member", "read_webdataset", "tar_index"]

_ADDRESS = re.compile(r"(?:tar://)?(?P<tar>[^#]+\.tar)#(?P<member>.+?)(?:@(?P<offset>\d+)\+(?P<size>\d+))?")
_HEADER = tarfile.BLOCKSIZE
_BUFFER = 4 * 1024**2  # reading past small members is cheaper than asking object storage for each header
_MAX_JSON = 1024**2
_NAMES = {
    "lat": ("lat", "latitude"),
    "lon": ("lon", "lng", "longitude"),
    "heading": ("heading", "compass_angle", "bearing"),
    "pano_id": ("pano_id",),
    "projection": ("projection",),
    "captured_at": ("captured_at", "datetime", "date"),
    "country": ("country",),
    "sequence": ("sequence", "sequence_id"),
    "split": ("split",),
    "source": ("source",),
    "licence": ("licence", "license"),
    "author": ("author", "creator_username"),
    "sha256": ("sha256",),
    "fov_deg": ("fov_deg",),
}


def is_member(uri: str) -> bool:
    """Whether `uri` addresses a member of a tar."""
    return _ADDRESS.fullmatch(uri) is not None


def read_member(uri: str) -> bytes:
    """The bytes of one member.

    Args:
        uri: ``<tar>#<member>``, with or without ``@<offset>+<size>``; the tar local, s3:// or gs://.

    Raises:
        FileNotFoundError: no such tar, or no such member in it.
        OSError: the storage failed, or the tar is not what the address says.
        ValueError: not such an address.
    """
    found = _ADDRESS.fullmatch(uri)
    if found is None:
        raise ValueError(f"{uri!r} addresses no member of a tar; it must look like shards/000.tar#key.jpg.")
    tar, member = storage.resolve(found["tar"]), found["member"]
    if found["offset"] is not None:
        offset, size = int(found["offset"]), int(found["size"])
    else:
        try:
            offset, size = tar_index(tar)[member]
        except KeyError:
            raise FileNotFoundError(f"{tar} has no member {member!r}") from None
    filesystem, inner = storage.filesystem(tar)
    try:
        with filesystem.open_input_file(inner) as stream:
            stream.seek(offset - _HEADER)
            data = bytes(stream.read(_HEADER + size))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no tar at {tar}") from error
    _check_header(data[:_HEADER], tar, member, size)
    if len(data) != _HEADER + size:
        raise OSError(f"{tar} ends inside its member {member!r}: it was cut short.")
    return data[_HEADER:]


def _check_header(header: bytes, tar: str, member: str, size: int) -> None:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise OSError(
            f"{tar} has no member {member!r} at its place ({error}); it has changed, list it anew."
        ) from error
    # A name over 100 bytes, or not ASCII, stands in full in an extra header before, and cut short in this one.
    known, seen = (name.encode("ascii", "replace") for name in (member, info.name[:90]))
    if info.size != size or not known.startswith(seen):
        raise OSError(f"{tar} has {info.name!r} where {member!r} should be; it has changed, list it anew.")


@lru_cache(maxsize=64)
def tar_index(tar: str) -> dict[str, tuple[int, int]]:
    """Member name to (offset of its data, size) in bytes, of the plain files of an uncompressed tar, in order.

    Kept for the 64 tars looked up last. Of two members of one name the later counts, as in tar itself.

    Raises:
        FileNotFoundError: no such tar.
        OSError: it is damaged or compressed.
    """
    return {info.name: (info.offset_data, info.size) for _, info in _members(storage.resolve(tar))}


def _members(tar: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    filesystem, inner = storage.filesystem(tar)
    try:
        stream = filesystem.open_input_file(inner)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no tar at {tar}") from error
    try:
        with stream, tarfile.open(fileobj=io.BufferedReader(stream, _BUFFER), mode="r:") as archive:
            for info in archive:
                if info.isreg():
                    yield archive, info
    except tarfile.TarError as error:
        raise OSError(f"{tar} is damaged or compressed ({error}); store it as a plain .tar.") from error


def read_webdataset(path: str) -> pa.Table:
    """Tars of ``key.jpg`` (png, webp) and ``key.json``, as WebDataset writes them.

    The JSON holds an object with ``lat`` and ``lon`` (or ``latitude``, ``lng``, ``longitude``) and any other column of
    a listing by its name or a common synonym. A missing ``pano_id`` becomes the key. Images without JSON have no
    position; JSON without an image has no ``image_uri``.

    Args:
        path: A tar, or a folder of them; local, s3:// or gs://.

    Returns:
        Table of `hedwig.sources.readers.LISTING`, one row per key and tar, in order.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: a tar is damaged or compressed.
    """
    path = storage.resolve(path)
    tars = [path] if path.endswith(".tar") else storage.list_files(path, suffix=".tar")
    if not tars:
        raise FileNotFoundError(f"No .tar file at {path!r}.")
    rows = [row for tar in tars for row in _samples(tar)]
    columns = {name: [row.get(name) for row in rows] for name in (*_NAMES, "image_uri")}
    return listing_table(columns, len(rows))


def _samples(tar: str) -> list[dict[str, Any]]:
    samples: dict[str, dict[str, Any]] = {}
    for archive, info in _members(tar):
        folder, name = os.path.split(info.name.removeprefix("./"))
        key, dot, suffix = name.partition(".")  # WebDataset's rule: the key ends at the first dot of the name
        if not key or not dot:
            continue
        sample = samples.setdefault(f"{folder}/{key}" if folder else key, {})
        if f".{suffix.lower()}" in IMAGE_SUFFIXES:
            sample.setdefault("image_uri", f"{tar}#{info.name}@{info.offset_data}+{info.size}")
        elif suffix.lower() == "json" and info.size <= _MAX_JSON:
            member = archive.extractfile(info)
            sample.update(_from_json(member.read() if member is not None else b""))
    for key, sample in samples.items():
        sample["pano_id"] = sample.get("pano_id") or key
    return [sample for sample in samples.values() if len(sample) > 1]


def _from_json(data: bytes) -> dict[str, Any]:
    """The columns of a listing in a JSON object; one that cannot be read gives none, and the row no position."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {"lat": "unreadable JSON"}
    if not isinstance(content, dict):
        return {"lat": "unreadable JSON"}
    lower = {str(name).lower(): value for name, value in content.items()}
    return {
        name: next((lower[word] for word in words if lower.get(word) is not None), None)
        for name, words in _NAMES.items()
        if any(word in lower for word in words)
    }
