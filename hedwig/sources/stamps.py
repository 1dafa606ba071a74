"""The cheap sign that an image may have changed: its size and the time it was written, as the storage says.

A stamp is recorded with every row that was computed from an image, taken *before* the image is read: one that changes
in between keeps its old stamp and is computed again next time. Equal stamps are believed to mean equal images, as make,
rsync and every incremental backup believe; who overwrites a file and sets its clock back must ask for the hashes of the
contents instead. An image inside a tar has the stamp of the tar.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.fs
from numpy.typing import NDArray

from hedwig import storage
from hedwig.sources.images import addresses_of
from hedwig.sources.tars import is_member

__all__ = ["STAMP", "ImageStamper", "image_stamps"]

STAMP = "image_stamp"
LIST_FROM = 50  # images wanted of one remote folder from which listing it is cheaper than asking for each


class ImageStamper:
    """Add ``image_stamp``, (B,) str or None where an image is not there, to rows that are about to be read."""

    reads = ("image_uri", "bearing_uri")
    writes = (STAMP,)

    def __init__(self) -> None:
        self._ahead: dict[str, list[str | None]] = {}

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The batch with its stamps."""
        rows = addresses_of(batch)
        ahead = self._ahead.pop(repr(rows), None)
        stamps = image_stamps(rows) if ahead is None else ahead
        column = np.empty(len(stamps), dtype=object)
        column[:] = stamps
        return {**batch, STAMP: column}

    def prefetch(self, batch: dict[str, NDArray[Any]]) -> None:
        """Take the stamps of a batch that will be asked for next, with the same rows; of an empty one: forget them.

        They are there when this returns, so what is read after it is read after they were taken.
        """
        rows = addresses_of(batch)
        if rows:
            self._ahead[repr(rows)] = image_stamps(rows)
        else:
            self._ahead.clear()


def image_stamps(rows: Sequence[tuple[str, Sequence[str] | None]], *, list_folders: bool = False) -> list[str | None]:
    """The stamp of each row's image; of a panorama in bearings, of all of them.

    Args:
        rows: image_uri and bearing_uri of each row.
        list_folders: list remote folders of which many images are wanted, instead of asking for each.

    Returns:
        ``"<size>:<nanoseconds since 1970>"``, joined by ";" for several images; None where one is missing or its
        storage tells no time.
    """
    addresses = [list(bearings) if bearings is not None and len(bearings) else [uri] for uri, bearings in rows]
    files = {address: _file_of(str(address)) for some in addresses for address in some}
    known = _stamps_of_files(sorted(set(files.values())), list_folders=list_folders)
    stamps = []
    for some in addresses:
        found = [known.get(files[address]) for address in some]
        stamps.append(None if None in found else ";".join(map(str, found)))
    return stamps


def _file_of(uri: str) -> str:
    return uri.split("#", 1)[0] if is_member(uri) else uri


def _stamps_of_files(files: list[str], *, list_folders: bool) -> dict[str, str]:
    """Address -> stamp of those files that are there."""
    remote: dict[str, list[str]] = {}
    stamps: dict[str, str] = {}
    for file in files:
        # One filesystem object serves all images of a bucket; local paths share one anyway.
        root = "/".join(file.split("/")[:3]) if storage.is_remote(file) else ""
        remote.setdefault(root, []).append(file)
    for some in remote.values():
        fs = storage.filesystem(some[0])[0]
        inner = {storage.filesystem(file)[1] if not storage.is_remote(file) else _inside(file): file for file in some}
        stamps |= {inner[path]: stamp for path, stamp in _ask(fs, list(inner), list_folders).items() if path in inner}
    return stamps


def _inside(uri: str) -> str:
    return uri.split("://", 1)[1].split("?", 1)[0]


def _ask(fs: Any, paths: list[str], list_folders: bool) -> dict[str, str]:
    infos: list[Any] = []
    if list_folders and not isinstance(fs, pyarrow.fs.LocalFileSystem):
        counts = Counter(path.rsplit("/", 1)[0] for path in paths)
        listed = {folder for folder, count in counts.items() if count >= LIST_FROM}
        for folder in sorted(listed):
            infos += fs.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True))
        paths = [path for path in paths if path.rsplit("/", 1)[0] not in listed]
    infos += fs.get_file_info(paths) if paths else []
    there = [info for info in infos if info.type == pyarrow.fs.FileType.File and info.mtime_ns]
    return {info.path: f"{info.size}:{info.mtime_ns}" for info in there}
