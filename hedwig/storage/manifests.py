"""What makes a folder an artefact: ``manifest.json``, written last, and the digests by which artefacts know each other.

The manifest carries a *fingerprint* (what was asked: kind, settings, inputs) and the digests of its files (what came
out): a stage whose fingerprint is already there has nothing to do.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hedwig.schema import SCHEMA_VERSION
from hedwig.storage.files import copy_file, delete, exists, join, list_files, read_bytes, sha256_of, write_bytes

__all__ = [
    "MANIFEST",
    "Manifest",
    "clone",
    "fingerprint",
    "manifest_digest",
    "publish",
    "read_manifest",
    "write_manifest",
]

MANIFEST = "manifest.json"
_PACKAGES = ("hedwig", "ray", "torch", "open_clip_torch", "faiss-cpu", "numpy", "pyarrow", "Pillow", "simplejpeg")


@dataclass(frozen=True)
class Manifest:
    """What a finished artefact says about itself; the text of ``manifest.json``.

    `stands_for` is set where the same rows were put into other files: the digest of the manifest that was there before,
    under which other artefacts know this one.
    """

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
    stands_for: str = ""

    def __post_init__(self) -> None:
        if self.num_in != self.num_out + self.num_rejected:
            raise ValueError(
                f"{self.kind}: {self.num_in} rows went in but {self.num_out} came out and {self.num_rejected} were "
                "rejected; rows were lost or doubled. This is a bug: keep the folder and report it."
            )


def fingerprint(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Digest of what was asked for: the same settings on the same inputs have the same fingerprint."""
    text = json.dumps([kind, SCHEMA_VERSION, config, inputs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_digest(folder: str) -> str:
    """The name under which other artefacts refer to this one: sha256 of its manifest, or of the one it stands for."""
    path = join(folder, MANIFEST)
    content = read_bytes(path)
    return _parsed(content, path).stands_for or hashlib.sha256(content).hexdigest()


def read_manifest(folder: str) -> Manifest | None:
    """The manifest of a finished artefact; None when the folder is absent or unfinished.

    Raises:
        ValueError: there is a manifest, and it is not one of ours.
    """
    path = join(folder, MANIFEST)
    return _parsed(read_bytes(path), path) if exists(path) else None


def _parsed(text: bytes, path: str) -> Manifest:
    try:
        return Manifest(**{k: v for k, v in json.loads(text).items() if k in Manifest.__dataclass_fields__})
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a hedwig manifest ({error}); delete the folder to make it anew.") from error


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
    write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Replace the manifest of `folder`: from now on this is the artefact."""
    write_bytes(join(folder, MANIFEST), (json.dumps(asdict(manifest), indent=1) + "\n").encode())


def clone(source: str, target: str) -> None:
    """Make `target` the same artefact as `source`, its manifest last; on one local disk the files are hard links.

    Links are safe because a file of an artefact is replaced and never changed.
    """
    delete(target)
    for path in [f for f in list_files(source, recursive=True) if not f.endswith(f"/{MANIFEST}")]:
        copy_file(path, join(target, path[len(source.rstrip("/")) + 1 :]))
    copy_file(join(source, MANIFEST), join(target, MANIFEST))


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
    return {path[base:]: sha256_of(path) for path in listed if not path[base:].startswith(tuple(skip))}
