"""What lies in a run folder that nothing refers to any more, why, and how large it is; deleting is a second step.

Four kinds: versions that were rolled back, versions that were overtaken before they were published, published versions
older than the number that is kept to go back to, and leftovers of killed work inside finished artefacts. What a
manifest lists or the pointer names is never among them, nor is the version that is growing; leftovers younger than a
day may belong to a job that runs now, and are left alone. The pointer forgets a version before its files go.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.fs

from hedwig import storage
from hedwig.publishing.pointer import (
    ROOT,
    VERSIONS,
    growing_version,
    list_versions,
    read_pointer,
    subfolders,
    version_folder,
    write_pointer,
)

__all__ = ["Garbage", "collect_garbage", "find_garbage"]

LEFTOVER_AGE_S = 24 * 3600.0


@dataclass(frozen=True)
class Garbage:
    """One thing that may go.

    Attributes:
        path: absolute path or URI of a file or folder.
        why: the reason, for people.
        num_bytes: what it holds; files that have other names too (hard links) free less.
        version: the version that goes with it; None for a leftover.
    """

    path: str
    why: str
    num_bytes: int
    version: str | None = None


def find_garbage(run: str, *, keep: int | None = None, leftover_age_s: float = LEFTOVER_AGE_S) -> list[Garbage]:
    """List what may be deleted; nothing is changed.

    Args:
        run: the run folder.
        keep: earlier published versions to keep for `rollback`; None keeps them all.
        leftover_age_s: leftovers younger than this stay.

    Raises:
        ValueError: `keep` is negative, or the pointer is not one of ours.
    """
    if keep is not None and keep < 0:
        raise ValueError(f"keep is {keep}; it must be 0 or more.")
    run = storage.resolve(run)
    doomed = _doomed_versions(run, keep)
    found = [Garbage(p, why, _size(p)[0], v) for v, why in doomed.items() for p in _folders_of(run, v)]
    for version in list_versions(run):
        if version not in doomed:
            found += _leftovers(version_folder(run, version), leftover_age_s)
    return found


def _doomed_versions(run: str, keep: int | None) -> dict[str, str]:
    """Version -> why it may go."""
    pointer = read_pointer(run)
    if pointer is None:
        return {}  # nothing is published: any version may still become so
    versions, growing = list_versions(run), growing_version(run)
    doomed: dict[str, str] = {}
    kept = pointer.history if keep is None else pointer.history[:keep]
    for old in pointer.history[len(kept) :]:
        doomed[old.version] = f"published on {old.published_at}, and {keep} earlier versions are kept"
    for old in pointer.withdrawn:
        doomed[old.version] = f"published on {old.published_at} and rolled back"
    named = {p.version for p in (pointer.current, *pointer.history, *pointer.withdrawn)}
    for version in versions:
        if version not in named and version != growing:
            doomed[version] = f"never published, and {growing} is newer"
    spared = {pointer.current.version, *(p.version for p in kept)}
    return {version: why for version, why in doomed.items() if version in versions and version not in spared}


def _folders_of(run: str, version: str) -> list[str]:
    """What a version consists of: its folder, or for the run itself its artefacts, for the versions lie in there."""
    folder = version_folder(run, version)
    if version != ROOT:
        return [folder]
    names = [name for name in subfolders(folder) if name != VERSIONS and not name.startswith(".")]
    return [p for p in (storage.join(folder, n) for n in names) if storage.exists(storage.join(p, storage.MANIFEST))]


def _leftovers(folder: str, age_s: float) -> list[Garbage]:
    """Hidden folders and files of killed work in finished artefacts, and tables' parts that no manifest lists."""
    found = []
    for name in subfolders(folder):
        artefact = storage.join(folder, name)
        manifest = None if name.startswith(".") or name == VERSIONS else storage.read_manifest(artefact)
        if manifest is None:
            continue  # unfinished work: the next run goes on with it
        fs, inner = storage.filesystem(artefact)
        for info in fs.get_file_info(pyarrow.fs.FileSelector(inner)):
            path = storage.join(artefact, info.base_name)
            size, newest = _size(path)
            if time.time() - newest < age_s:
                continue
            if info.base_name.startswith("."):
                found.append(Garbage(path, "left by work that was killed; the artefact is finished", size))
            elif _is_unlisted_part(info, manifest):
                found.append(Garbage(path, "a part that the artefact's manifest does not list", size))
    return found


def _is_unlisted_part(info: Any, manifest: storage.Manifest) -> bool:
    if info.type != pyarrow.fs.FileType.File or not info.base_name.startswith("part-"):
        return False
    listed = {name for name in manifest.files if os.path.basename(name) == name and name.startswith("part-")}
    return bool(listed) and info.base_name not in listed


def _size(path: str) -> tuple[int, float]:
    """Bytes in a file or folder, and when the newest of it was written (seconds since 1970; 0 where unknown)."""
    fs, inner = storage.filesystem(path)
    info = fs.get_file_info(inner)
    infos = [info]
    if info.type == pyarrow.fs.FileType.Directory:
        infos += fs.get_file_info(pyarrow.fs.FileSelector(inner, recursive=True))
    files = [i for i in infos if i.type == pyarrow.fs.FileType.File]
    times = [(i.mtime_ns or 0) / 1e9 for i in (files or infos)]
    return sum(i.size for i in files), max(times, default=0.0)


def collect_garbage(run: str, garbage: Sequence[Garbage]) -> None:
    """Delete what `find_garbage` found, after the pointer has forgotten the versions that go.

    Raises:
        ValueError: the pointer has moved since, and one of the versions is now published.
    """
    run = storage.resolve(run)
    gone = {g.version for g in garbage if g.version is not None}
    pointer = read_pointer(run)
    if pointer is not None and gone:
        if pointer.current.version in gone:
            raise ValueError(f"{pointer.current.version} is published by now; look again with `hedwig gc --dry-run`.")
        history = tuple(p for p in pointer.history if p.version not in gone)
        withdrawn = tuple(p for p in pointer.withdrawn if p.version not in gone)
        if (history, withdrawn) != (pointer.history, pointer.withdrawn):
            write_pointer(run, replace(pointer, history=history, withdrawn=withdrawn))
    for one in garbage:
        if one.version is not None:  # its manifests first: what is cut off here is unfinished work, not a mixed run
            for path in [one.path, *(storage.join(one.path, name) for name in subfolders(one.path))]:
                storage.delete(storage.join(path, storage.MANIFEST))
        storage.delete(one.path)
