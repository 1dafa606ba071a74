"""Downloading released models: the only code of hedwig that brings weights onto a machine.

The hub's address, the form of its links and the token come from `huggingface_hub`, so ``HF_ENDPOINT`` and ``HF_TOKEN``
hold. The two requests are made here: the library (2.4) throws a partial file away when its process ends, and reports
its user's tools. A model becomes visible under its name only when every file is whole and checked; until then it lies
in a hidden folder beside it, from which the next attempt goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hedwig.models.catalogue import ReleasedModel, released
from hedwig.models.fetched import (
    Fetched,
    FetchedFile,
    adopt,
    file_sha256,
    file_size,
    find,
    model_folder,
    verify,
    write_source,
)

__all__ = [
    "Plan",
    "PlannedFile",
    "fetch",
    "plan",
]

Progress = Callable[[int, int], None]
TRANSIENT = (408, 429, 500, 502, 503, 504)
SPARE_BYTES = 100 * 2**20  # left free on the disk
TIMEOUT_S = 30.0
NUM_ATTEMPTS = 5  # in a row without a new byte
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class PlannedFile:
    """A file to be fetched: size in bytes, digests as far as they are stated, and who states the sha256."""

    path: str
    size: int
    sha256: str | None
    git_oid: str | None
    checked: str


@dataclass(frozen=True)
class Plan:
    """What a fetch would bring, before anything is downloaded; `licence_tag` is what the hub says today."""

    model: ReleasedModel
    revision: str
    files: tuple[PlannedFile, ...]
    licence_tag: str | None
    folder: Path

    @property
    def size_bytes(self) -> int:
        """The sum of the files."""
        return sum(file.size for file in self.files)


def plan(name: str, *, cache: str | Path | None = None) -> Plan:
    """Ask the hub what a fetch of `name` would bring; nothing is downloaded.

    Raises:
        ValueError: no such model in the catalogue, or the hub states another digest than the pinned one.
        ConnectionError: offline by setting, or the hub does not answer; the message says what to copy where.
        OSError: the hub does not have the repository, the revision or the files.
    """
    model = released(name)
    folder = model_folder(name, cache)
    _refuse_offline(model, folder)
    import httpx

    where = f"{model.repo} at {model.revision or 'its newest revision'}"
    at = f"/revision/{model.revision}" if model.revision else ""
    try:
        with _client() as client:
            answer = client.get(f"{_endpoint()}/api/models/{model.repo}{at}", params={"blobs": "true"})
    except httpx.TransportError as error:
        raise ConnectionError(
            f"The hub cannot be reached ({type(error).__name__}). {_by_hand(model, folder)}"
        ) from error
    if answer.status_code in (401, 403):
        raise OSError(
            f"The hub answered {answer.status_code} for {where}: it does not exist, or it is gated; then accept its "
            f"terms on the hub and set HF_TOKEN."
        )
    if answer.status_code != 200:
        raise OSError(f"The hub answered {answer.status_code} for {where}; is HF_ENDPOINT right?")
    info = answer.json()
    files = tuple(_planned(model, listed) for listed in info["siblings"] if model.wants(listed["rfilename"]))
    if not files:
        raise OSError(f"{where} holds none of {', '.join(model.files)}; the repository has changed.")
    tag = (info.get("cardData") or {}).get("license")
    return Plan(model, str(info["sha"]), files, None if tag is None else str(tag), folder)


def _endpoint() -> str:
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or str(constants.ENDPOINT)).rstrip("/")


def _client() -> Any:
    import httpx
    from huggingface_hub import get_token

    headers = {"User-Agent": "hedwig", "Accept-Encoding": "identity"}
    token = get_token()
    if token:  # httpx drops it when a redirect leaves the host it was meant for
        headers["Authorization"] = f"Bearer {token}"
    return httpx.Client(follow_redirects=True, timeout=TIMEOUT_S, headers=headers)


def _planned(model: ReleasedModel, listed: dict[str, Any]) -> PlannedFile:
    path, lfs, size = str(listed["rfilename"]), listed.get("lfs"), listed.get("size")
    if size is None or Path(path).is_absolute() or ".." in Path(path).parts:
        raise OSError(f"The hub lists {path!r} of {model.repo} without a size or with a path that leaves its folder.")
    stated = None if lfs is None else str(lfs["sha256"])
    if model.sha256 is not None and path == model.entry:
        if stated not in (None, model.sha256):
            raise ValueError(
                f"The hub has {path} of {model.repo} with sha256 {stated}, but {model.sha256} is pinned; nothing was "
                f"fetched. Is HF_ENDPOINT a mirror you trust?"
            )
        return PlannedFile(path, int(size), model.sha256, None, "pinned")
    return PlannedFile(path, int(size), stated, None if stated else listed.get("blobId"), "hub")


def _refuse_offline(model: ReleasedModel, folder: Path) -> None:
    for variable in ("HEDWIG_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise ConnectionError(f"{variable} is set, so nothing is downloaded. {_by_hand(model, folder)}")


def _by_hand(model: ReleasedModel, folder: Path) -> str:
    revision = f" (revision {model.revision})" if model.revision else ""
    return (
        f"Elsewhere, get {', '.join(model.files)} of {model.repo}{revision}, copy it into {str(folder)!r}, and run "
        f"hedwig fetch {model.name} again: it checks and records the copy without a network."
    )


def fetch(
    name: str,
    *,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    rehash: bool = False,
    planned: Plan | None = None,
) -> Fetched:
    """Bring a model here, or find it here.

    Args:
        name: of the catalogue.
        cache: as in `cache_folder`.
        progress: told the bytes that are here and the bytes wanted.
        rehash: hash the files of a model that is here already, too.
        planned: what `plan` said, if it was asked.

    Raises:
        ValueError: unknown name, or a file is not the one it should be; it was deleted.
        ConnectionError: offline, or the connection broke too often; what came is kept for the next attempt.
        OSError: not enough disk space, another fetch of the same model is under way, or the hub refuses.
    """
    model, folder = released(name), model_folder(name, cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        found = find(name, cache=cache) or adopt(name, cache=cache)
        if found is not None and not found.problems():
            if rehash:
                verify(found)
            return found
        planned = planned or plan(name, cache=cache)
        unfinished = folder.with_name(f".{name}.{planned.revision[:12]}.partial")
        unfinished.mkdir(exist_ok=True)
        _check_space(planned, unfinished)
        files = _download(planned, unfinished, progress or (lambda done, total: None))
        write_source(model, unfinished, files, planned.revision, planned.licence_tag)
        _publish(unfinished, folder)
        for old in folder.parent.glob(f".{name}.*.partial"):
            shutil.rmtree(old)
        result = find(name, cache=cache)
    if result is None:
        raise OSError(f"{str(folder)!r} vanished while it was fetched; something else cleans the cache.")
    return result


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(f"Another fetch into {str(folder)!r} is under way; wait for it.") from error
        yield


def _check_space(planned: Plan, unfinished: Path) -> None:
    here = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
    needed, free = planned.size_bytes - here + SPARE_BYTES, shutil.disk_usage(unfinished).free
    if needed > free:
        raise OSError(
            f"{planned.model.name} needs {needed / 1e9:.2f} GB in {str(unfinished.parent)!r} and {free / 1e9:.2f} GB "
            f"are free; free some, or set HEDWIG_CACHE to another disk."
        )


def _download(planned: Plan, unfinished: Path, progress: Progress) -> list[FetchedFile]:
    from huggingface_hub import hf_hub_url

    total, before, files = planned.size_bytes, 0, []
    with _client() as client:
        for file in planned.files:
            target = unfinished / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if file_size(target) != file.size:
                repo, revision = planned.model.repo, planned.revision
                url = hf_hub_url(repo, file.path, revision=revision, endpoint=_endpoint())
                part = target.with_name(target.name + ".part")
                _transfer(client, url, part, file, partial(_shifted, progress, before, total))
                part.rename(target)
            files.append(_checked(planned, file, target))
            before += file.size
            progress(before, total)
    return files


def _shifted(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _transfer(client: Any, url: str, part: Path, file: PlannedFile, progress: Callable[[int], None]) -> None:
    """Append to `part` until it has the file's size."""
    import httpx

    failures, reason = 0, ""
    part.touch()
    while (here := part.stat().st_size) != file.size:
        if failures >= NUM_ATTEMPTS:
            raise ConnectionError(
                f"{file.path} broke off at {here} of {file.size} bytes {failures} times in a row ({reason}); what came "
                f"is kept, and the same command goes on from there."
            )
        if here > file.size:
            part.unlink()
            raise ValueError(f"{file.path} came with more than its {file.size} bytes; it was deleted.")
        wait_s = min(2.0**failures, LONGEST_WAIT_S)
        try:
            with client.stream("GET", url, headers={"Range": f"bytes={here}-"} if here else {}) as response:
                status = response.status_code
                if status in TRANSIENT:
                    reason, wait_s = f"the hub answered {status}", _wait_s(response.headers.get("Retry-After"), wait_s)
                elif status not in (200, 206):
                    raise OSError(f"The hub answered {status} for {file.path}; nothing of it was kept.")
                else:
                    reason = "the answer was too short"
                    continues = status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {here}-")
                    with part.open("ab" if continues else "wb") as out:
                        for chunk in response.iter_bytes():
                            out.write(chunk)
                            progress(out.tell())
                            if out.tell() > file.size:
                                break
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
        size = part.stat().st_size
        failures = 0 if size > here else failures + 1
        if size < file.size:
            time.sleep(wait_s)


def _wait_s(retry_after: str | None, default: float) -> float:
    return min(float(retry_after), LONGEST_WAIT_S) if retry_after and retry_after.isdigit() else default


def _checked(planned: Plan, file: PlannedFile, path: Path) -> FetchedFile:
    digest = file_sha256(path)
    wrong = f"sha256 {digest} instead of {file.sha256}" if file.sha256 not in (None, digest) else None
    if wrong is None and file.git_oid is not None and _git_oid(path) != file.git_oid:
        wrong = f"git object {_git_oid(path)} instead of {file.git_oid}"
    if wrong:
        path.unlink()
        stated = "is pinned" if file.checked == "pinned" else "is what the hub states"
        raise ValueError(
            f"{file.path} of {planned.model.repo} came with {wrong}, which {stated}; it was deleted. Fetch it again; "
            f"if that repeats, the source or something on the way is not to be trusted."
        )
    return FetchedFile(file.path, file.size, digest, file.checked if file.sha256 or file.git_oid else "")


def _git_oid(path: Path) -> str:
    """Git's name of a small file, which is all that the hub states of one."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _publish(unfinished: Path, folder: Path) -> None:
    """Give a complete folder its final name; a damaged predecessor goes away."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old.partial")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    unfinished.rename(folder)
