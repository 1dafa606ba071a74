"""Answers of services that cost money, quota or patience, kept so that nothing is ever asked twice.

One object per question, written atomically the moment the answer is there, on local disk or object storage: a killed
job loses at most the answers under way. The key is a digest of everything that determines the answer, so another
prompt, model or revision never meets an old answer. What an answer cost is kept beside it, also for answers that were
of no use: the sum over a folder is what was really spent. It is a memory, not a cache: nothing expires, and a usable
answer is never lost to a later failure. It is no queue either: two processes that ask the same question at the same
moment both pay, and on a local disk both costs are kept (object storage has no lock: there the later one wins).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hedwig import storage

__all__ = ["AnswerStore", "AnswersRefused", "Kept", "answer_key"]

_UTF8 = "surrogatepass"  # a model may answer half a character; that must not lose what was paid for


def answer_key(*parts: object) -> str:
    """SHA-256 (hex) of the parts in order; parts are plain JSON values."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors=_UTF8)).hexdigest()


class AnswersRefused(PermissionError):
    """Answers cannot be kept: a job that went on asking would pay for what it loses, so it has to stop."""


@dataclass(frozen=True)
class Kept:
    """What is kept under a key.

    Attributes:
        answer: the usable answer as plain JSON, None while there is none.
        spent: one entry per paid attempt, in order: tokens, requests, money, whatever the service counts. An ``id`` in
            it is a text and not summed: an attempt with an id that is there already is not added again.
        trouble: why the last attempt was of no use, None after a usable one.
    """

    answer: Any = None
    spent: list[dict[str, Any]] = field(default_factory=list)
    trouble: str | None = None


class AnswerStore:
    """A folder of answers, ``ab/abcdef….json``.

    Args:
        folder: local path, s3:// or gs://; made when the first answer is written.
    """

    def __init__(self, folder: str) -> None:
        self.folder = storage.resolve(folder)

    def path(self, key: str) -> str:
        """Where the answer of `key` is or will be; deleting it there makes the question new."""
        return storage.join(self.folder, key[:2], f"{key}.json")

    def check(self) -> None:
        """Write and remove a file in the folder, before anything is paid for.

        Raises:
            AnswersRefused: it cannot be written to.
        """
        probe = storage.join(self.folder, f".probe-{uuid.uuid4().hex[:8]}")
        try:
            storage.write_bytes(probe, b"hedwig")
            storage.delete(probe)
        except OSError as error:
            raise AnswersRefused(
                f"Answers cannot be kept in {self.folder}: {error}. Choose a folder to write to."
            ) from error

    def get(self, key: str) -> Kept:
        """What is kept under `key`; an empty `Kept` if nothing is.

        Raises:
            ValueError: the object is damaged; the message names it.
        """
        path = self.path(key)
        try:
            data = storage.read_bytes(path)
        except FileNotFoundError:
            return Kept()
        except OSError:
            if storage.exists(path):
                raise
            return Kept()
        try:
            return Kept(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise ValueError(f"The kept answer {path} is damaged ({error}); delete it to ask again.") from error

    def put(self, key: str, answer: Any, spent: Mapping[str, Any]) -> None:
        """Keep a usable answer and what it cost.

        Raises:
            AnswersRefused: it could not be written.
        """
        if answer is None:
            raise ValueError("An answer of None is no answer; use put_trouble for attempts of no use.")
        self._add(key, answer, spent, None)

    def put_trouble(self, key: str, trouble: str, spent: Mapping[str, Any]) -> None:
        """Keep what an attempt cost that gave nothing usable; a usable answer that is already there stays.

        Raises:
            AnswersRefused: it could not be written.
        """
        self._add(key, None, spent, trouble)

    def _add(self, key: str, answer: Any, spent: Mapping[str, Any], trouble: str | None) -> None:
        try:
            self._write(key, answer, spent, trouble)
        except OSError as error:
            raise AnswersRefused(
                f"A paid answer could not be kept in {self.folder}: {error}. Make room or give leave to write there, "
                "and run the same command again; what was kept before is not paid again."
            ) from error

    def _write(self, key: str, answer: Any, spent: Mapping[str, Any], trouble: str | None) -> None:
        with self._alone(key):
            before = self.get(key)
            if "id" in spent and any(entry.get("id") == spent["id"] for entry in before.spent):
                return
            if answer is None and before.answer is not None:
                answer, trouble = before.answer, None
            kept = {"answer": answer, "spent": [*before.spent, dict(spent)], "trouble": trouble}
            storage.write_bytes(self.path(key), json.dumps(kept, ensure_ascii=False).encode(errors=_UTF8))

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """No other process on this disk adds to these answers meanwhile; the lock dies with its process."""
        if storage.is_remote(self.folder):
            yield
            return
        folder = os.path.dirname(self.path(key))
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def total(self, keys: Iterable[str] | None = None) -> dict[str, float]:
        """Sums of everything spent, of `keys` or of the whole folder, with ``num_attempts`` and ``num_answers``."""
        if keys is None:
            paths = storage.list_files(self.folder, suffix=".json", recursive=True)
            keys = [path.rsplit("/", 1)[-1].removesuffix(".json") for path in paths]
        sums: dict[str, float] = {"num_attempts": 0, "num_answers": 0}
        with ThreadPoolExecutor(16) as pool:  # object storage takes its time for each
            for kept in pool.map(self.get, sorted(set(keys))):
                sums["num_attempts"] += len(kept.spent)
                sums["num_answers"] += kept.answer is not None
                for attempt in kept.spent:
                    for name, value in attempt.items():
                        if name != "id":
                            sums[name] = sums.get(name, 0) + value
        return sums
