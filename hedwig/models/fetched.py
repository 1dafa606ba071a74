"""The released models that are here: where they are kept, what is recorded of them, what a setting's name means.

A model's folder is ``models/NAME`` in the cache, and it is there only if it is whole: ``source.json`` in it says what
was fetched, from where, under which terms and with which digests. Looking a model up compares sizes and records;
reading every byte again is `verify`. Nothing here talks to a network.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hedwig.models.catalogue import CATALOGUE, ReleasedModel, released

__all__ = [
    "Fetched",
    "FetchedFile",
    "adopt",
    "cache_folder",
    "check_pinned",
    "file_sha256",
    "file_size",
    "find",
    "model_folder",
    "resolve_weights",
    "verify",
    "write_source",
]

SOURCE = "source.json"


@dataclass(frozen=True)
class FetchedFile:
    """A file that is here; `checked` says with what it was compared: pinned, hub, or "" for nothing."""

    path: str
    size: int
    sha256: str
    checked: str


@dataclass(frozen=True)
class Fetched:
    """A model that is here, as its source.json says."""

    name: str
    repo: str
    revision: str | None
    licence: str | None
    licence_tag: str | None
    fetched_at: str
    files: tuple[FetchedFile, ...]
    folder: Path

    @property
    def entry(self) -> Path:
        """The file or folder that a setting points to."""
        return self.folder / released(self.name).entry

    def problems(self) -> list[str]:
        """What is wrong with it as far as sizes and records show, without reading the files."""
        sizes = {file.path: file_size(self.folder / file.path) for file in self.files}
        found = [
            f"{file.path} has {'no file' if sizes[file.path] is None else f'{sizes[file.path]} bytes'}, "
            f"{file.size} were fetched"
            for file in self.files
            if sizes[file.path] != file.size
        ]
        model = released(self.name)
        entry = {file.path: file.sha256 for file in self.files}.get(model.entry)
        if model.sha256 is not None and entry != model.sha256:
            found.append(f"{model.entry} was recorded with sha256 {entry}, {model.sha256} is pinned")
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "folder": str(self.folder), "entry": str(self.entry)}


def file_size(path: Path) -> int | None:
    """Bytes of a file, None if there is none."""
    return path.stat().st_size if path.is_file() else None


def model_folder(name: str, cache: str | Path | None = None) -> Path:
    """Where the model of that name is or would be."""
    return cache_folder(cache) / "models" / name


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where fetched things are kept: `cache`, else ``$HEDWIG_CACHE``, else ~/.cache/hedwig."""
    return Path(cache or os.environ.get("HEDWIG_CACHE") or "~/.cache/hedwig").expanduser()


def find(name: str, *, cache: str | Path | None = None) -> Fetched | None:
    """The fetched model of that name, or None; its `problems` are not looked at."""
    released(name)
    folder = model_folder(name, cache)
    try:
        record = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        files = tuple(FetchedFile(**file) for file in record.pop("files"))
        return Fetched(**record, files=files, folder=folder)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(folder / SOURCE)!r} is damaged ({error}); delete it and fetch {name} again.") from error


def resolve_weights(weights: str, *, cache: str | Path | None = None) -> str:
    """The path that a setting such as ``encoder.weights`` means.

    Args:
        weights: a name of the catalogue, or anything else, which is returned as it is.
        cache: as in `cache_folder`.

    Raises:
        FileNotFoundError: the catalogue knows the name, and the model is not here or not whole.
    """
    if weights not in {model.name for model in CATALOGUE}:
        return weights
    found = find(weights, cache=cache)
    if found is None:
        raise FileNotFoundError(
            f"The weights {weights!r} are not in {str(model_folder(weights, cache))!r}; run: hedwig fetch {weights}"
        )
    problems = found.problems()
    if problems:
        raise FileNotFoundError(
            f"The weights {weights!r} are damaged: {'; '.join(problems)}. Run: hedwig fetch {weights}"
        )
    return str(found.entry)


def adopt(name: str, *, cache: str | Path | None = None) -> Fetched | None:
    """Check and record files that somebody copied into the model's folder; None if they are not all there.

    Of a model whose files are known by patterns only, the configurations among them say which ones are needed.

    Raises:
        ValueError: the file whose checksum is pinned is another one. It stays, since it was not put there by hedwig.
    """
    model, folder = released(name), model_folder(name, cache)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SOURCE]
    there = [path for path in (path.relative_to(folder).as_posix() for path in paths) if model.wants(path)]
    if (folder / SOURCE).exists() or not there or not _whole(model, folder, there):
        return None
    files = []
    for path in there:
        pinned = path == model.entry and model.sha256 is not None
        digest = file_sha256(folder / path)
        if pinned and digest != model.sha256:
            raise ValueError(
                f"{str(folder / path)!r}, which was copied there, has sha256 {digest}, but {model.sha256} is pinned; "
                f"copy it again, or delete it and run: hedwig fetch {name}"
            )
        files.append(FetchedFile(path, (folder / path).stat().st_size, digest, "pinned" if pinned else ""))
    revision = model.revision if any(file.checked for file in files) else None
    return write_source(model, folder, files, revision, None)


def _whole(model: ReleasedModel, folder: Path, there: list[str]) -> bool:
    """Whether copied files are a whole model, as far as they tell themselves."""
    literal = {pattern for pattern in model.files if "*" not in pattern}
    if literal:
        return literal <= set(there)
    entry = folder / model.entry
    try:
        if not (entry / "model_index.json").is_file():
            return _whole_model(entry, ("*.safetensors",))
        index = json.loads((entry / "model_index.json").read_text(encoding="utf-8"))
        parts = [entry / name for name, made_by in index.items() if isinstance(made_by, list) and made_by[0]]
        # Tokenizers, schedulers and processors have configurations of other names, and no weights.
        return all(
            _whole_model(part, ("*.safetensors", "*.bin"))
            if (part / "config.json").is_file()
            else any(part.glob("*_config.json"))
            for part in parts
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return False  # cut off in the middle of a JSON file


def _whole_model(folder: Path, weights: tuple[str, ...]) -> bool:
    """Whether a folder holds a configuration and all weights, none of them cut off."""
    from safetensors import SafetensorError, safe_open

    if not (folder / "config.json").is_file():
        return False
    json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files = {path.name: path for pattern in weights for path in folder.glob(pattern)}
    shards = {
        shard
        for index in folder.glob("*.safetensors.index.json")
        for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    }
    try:
        for path in files.values():
            if path.suffix == ".safetensors":
                with safe_open(path, framework="numpy"):
                    pass
    except SafetensorError:
        return False
    return bool(files) and shards <= set(files)


def check_pinned(name: str, sha256: str) -> None:
    """Compare the digest of a fetched model's entry, as it is now, with the one that the catalogue pins, if any.

    Raises:
        ValueError: it is another file than was fetched, though of the same size.
    """
    pinned = released(name).sha256
    if pinned not in (None, sha256):
        raise ValueError(
            f"The fetched weights {name!r} have sha256 {sha256}, but {pinned} is pinned: the file was changed after it "
            f"was fetched. Delete {str(model_folder(name))!r} and run: hedwig fetch {name}"
        )


def verify(found: Fetched) -> None:
    """Read every byte again.

    Raises:
        ValueError: a file is not what was fetched; the message names it, and it was deleted.
    """
    for file in found.files:
        digest = file_sha256(found.folder / file.path)
        if digest != file.sha256:
            (found.folder / file.path).unlink()
            raise ValueError(
                f"{str(found.folder / file.path)!r} has sha256 {digest}, {file.sha256} was fetched; it was deleted. "
                f"Run: hedwig fetch {found.name}"
            )


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_source(
    model: ReleasedModel, folder: Path, files: list[FetchedFile], revision: str | None, licence_tag: str | None
) -> Fetched:
    """Write source.json into `folder`, which makes its files a fetched model."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    result = Fetched(model.name, model.repo, revision, model.licence, licence_tag, now, tuple(files), folder)
    record = {key: value for key, value in asdict(result).items() if key != "folder"}
    temporary = folder / f"{SOURCE}.new"
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.rename(folder / SOURCE)
    return result
