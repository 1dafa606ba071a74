"""Versions of a run side by side, and the one small object that says which of them is published.

A run folder may hold whole runs of newer models or data under ``versions/0002``, ``versions/0003`` and so on; the run
folder itself is version ``.``. ``published.json`` names the version to serve and the digest of each of its artefacts'
manifests. Object storage renames nothing atomically, so nothing is ever moved into place: publishing and rolling back
each replace this one object, and a reader sees the old version or the new one, whole. What was published is not written
to again, and stays until `hedwig.publishing.garbage` is told to let go of it. Two who publish at once do not harm each
other's files: the later pointer wins.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow.fs

from hedwig import storage

__all__ = [
    "POINTER",
    "VERSIONS",
    "Pointer",
    "Publication",
    "growing_version",
    "list_versions",
    "pointer_token",
    "publish",
    "published_folder",
    "read_pointer",
    "rollback",
    "subfolders",
    "version_folder",
    "write_pointer",
]

POINTER, VERSIONS, ROOT, FORMAT = "published.json", "versions", ".", 1
_NAME = re.compile(r"^(\.|versions/\d{4,})$")


@dataclass(frozen=True)
class Publication:
    """One version that is or was published.

    Attributes:
        version: its folder relative to the run folder: ``.`` or ``versions/NNNN``.
        artefacts: artefact folder in it -> sha256 of its ``manifest.json``.
        published_at: UTC, ISO 8601.
        model_id: of the encoder; empty where the embeddings do not say.
        num_panoramas: rows of the embedding table.
    """

    version: str
    artefacts: Mapping[str, str]
    published_at: str = ""
    model_id: str = ""
    num_panoramas: int = 0


@dataclass(frozen=True)
class Pointer:
    """The content of ``published.json``.

    Attributes:
        current: what is served.
        history: what was published before it and may be gone back to, newest first.
        withdrawn: what was rolled back, newest first.
    """

    current: Publication
    history: tuple[Publication, ...] = ()
    withdrawn: tuple[Publication, ...] = ()
    format: int = field(default=FORMAT)


def read_pointer(run: str) -> Pointer | None:
    """The pointer of a run folder; None where nothing was published.

    Raises:
        ValueError: there is a ``published.json``, and it is not one of ours.
    """
    path = storage.join(storage.resolve(run), POINTER)
    if not storage.exists(path):
        return None
    try:
        content = json.loads(storage.read_bytes(path))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, and this hedwig reads {FORMAT}")
        history, withdrawn = (tuple(map(_publication, content.get(name, ()))) for name in ("history", "withdrawn"))
        return Pointer(_publication(content["current"]), history, withdrawn)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a pointer that hedwig wrote ({error}); publish the run again.") from error


def _publication(record: Mapping[str, Any]) -> Publication:
    publication = Publication(**{k: v for k, v in record.items() if k in Publication.__dataclass_fields__})
    if not _NAME.match(publication.version):  # a pointer must not lead out of its run
        raise ValueError(f"version {publication.version!r} is neither '.' nor versions/NNNN")
    return publication


def write_pointer(run: str, pointer: Pointer) -> None:
    """Replace the run's pointer; a reader sees the old one or the new one."""
    text = json.dumps(asdict(pointer), indent=1) + "\n"
    storage.write_bytes(storage.join(storage.resolve(run), POINTER), text.encode())


def pointer_token(run: str) -> str | None:
    """A text that changes whenever something else is published: for a service that watches the pointer."""
    pointer = read_pointer(run)
    if pointer is None:
        return None
    return f"{pointer.current.version}@{pointer.current.published_at}"


def version_folder(run: str, version: str) -> str:
    """Absolute path or URI of a version's folder, which is laid out like any run."""
    run = storage.resolve(run)
    return run if version == ROOT else storage.join(run, *version.split("/"))


def published_folder(run: str) -> str:
    """The run folder to read: that of the published version, or `run` itself where nothing was published.

    Raises:
        ValueError: an artefact of the published version is not the one that was published.
    """
    pointer = read_pointer(run)
    if pointer is None:
        return storage.resolve(run)
    folder = version_folder(run, pointer.current.version)
    _check_unchanged(folder, pointer.current)
    return folder


def _check_unchanged(folder: str, publication: Publication) -> None:
    for name, digest in publication.artefacts.items():
        place = storage.join(folder, name)
        found = storage.manifest_digest(place) if storage.read_manifest(place) is not None else "missing"
        if found != digest:
            raise ValueError(
                f"{place} is not what was published on {publication.published_at}: its manifest is {found[:12]}, the "
                f"pointer says {digest[:12]}. Publish it again, or `hedwig rollback`."
            )


def subfolders(folder: str) -> list[str]:
    """Sorted names of the folders directly in `folder`, hidden ones included."""
    fs, inner = storage.filesystem(folder)
    found = fs.get_file_info(pyarrow.fs.FileSelector(inner, allow_not_found=True))
    return sorted(info.base_name for info in found if info.type == pyarrow.fs.FileType.Directory)


def list_versions(run: str) -> list[str]:
    """The versions that a run folder holds, finished or not, oldest first."""
    run = storage.resolve(run)
    own = [ROOT] if _artefacts(run) else []
    names = [f"{VERSIONS}/{name}" for name in subfolders(storage.join(run, VERSIONS))]
    return own + sorted((n for n in names if _NAME.match(n)), key=_number)


def _number(version: str) -> int:
    return 1 if version == ROOT else int(version.rsplit("/", 1)[-1])


def growing_version(run: str) -> str:
    """The version that new work goes into, beside the published one: the newest unpublished one, or the next number."""
    pointer = read_pointer(run)
    if pointer is None:
        return ROOT
    known = {p.version for p in (pointer.current, *pointer.history, *pointer.withdrawn)}
    versions = list_versions(run)
    last = max([_number(v) for v in [*versions, *known]], default=1)
    fresh = [v for v in versions if v not in known and _number(v) == last]
    return fresh[0] if fresh else f"{VERSIONS}/{last + 1:04d}"


def _artefacts(folder: str) -> dict[str, str]:
    visible = [name for name in subfolders(folder) if not name.startswith(".") and name != VERSIONS]
    finished = [name for name in visible if storage.exists(storage.join(folder, name, storage.MANIFEST))]
    return {name: storage.manifest_digest(storage.join(folder, name)) for name in finished}


def publish(run: str, check: Callable[[str], object], version: str | None = None) -> Pointer:
    """Point at a version: from now on it is the one that is read.

    Args:
        run: the run folder.
        check: called with the version's folder; raises when its parts do not belong together.
        version: ``.`` or ``versions/NNNN``; None for the newest that is neither published nor withdrawn.

    Raises:
        FileNotFoundError: there is no such version, or none that is new.
        ValueError: what `check` says.
    """
    pointer = read_pointer(run)
    versions = list_versions(run)
    if version is None:
        known = {p.version for p in (pointer.current, *pointer.history, *pointer.withdrawn)} if pointer else set()
        fresh = [v for v in versions if v not in known]
        if not fresh:
            at = f"; {pointer.current.version} is published" if pointer else ""
            raise FileNotFoundError(f"{run} holds no version that was not published before{at}. Name one: --version V.")
        version = fresh[-1]
    if version not in versions:
        raise FileNotFoundError(f"{run} holds no version {version!r}; it holds {', '.join(versions) or 'none'}.")
    folder = version_folder(run, version)
    check(folder)
    publication = _describe(version, folder)
    if pointer is None:
        pointer = Pointer(publication)
    else:
        if pointer.current.version == version and pointer.current.artefacts == publication.artefacts:
            return pointer
        others = [p for p in (pointer.current, *pointer.history) if p.version != version]
        withdrawn = tuple(p for p in pointer.withdrawn if p.version != version)
        pointer = replace(pointer, current=publication, history=tuple(others), withdrawn=withdrawn)
    write_pointer(run, pointer)
    return pointer


def _describe(version: str, folder: str) -> Publication:
    embeddings = storage.read_manifest(storage.join(folder, "embeddings"))
    return Publication(
        version=version,
        artefacts=_artefacts(folder),
        published_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        model_id=str(embeddings.details.get("model_id", "")) if embeddings else "",
        num_panoramas=embeddings.num_out if embeddings else 0,
    )


def rollback(run: str) -> Pointer:
    """Point at what was published before; what is left becomes withdrawn and is not published by itself again.

    Raises:
        FileNotFoundError: nothing is published, or nothing was before.
        ValueError: the version to go back to is no longer what was published.
    """
    pointer = read_pointer(run)
    if pointer is None:
        raise FileNotFoundError(f"Nothing is published in {run}; `hedwig publish {run}` comes first.")
    if not pointer.history:
        raise FileNotFoundError(f"Nothing was published in {run} before {pointer.current.version}; it stays.")
    target = pointer.history[0]
    _check_unchanged(version_folder(run, target.version), target)
    pointer = replace(
        pointer, current=target, history=pointer.history[1:], withdrawn=(pointer.current, *pointer.withdrawn)
    )
    write_pointer(run, pointer)
    return pointer
