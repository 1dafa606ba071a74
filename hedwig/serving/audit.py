"""Who asked what, kept so that it can be shown later that nothing was taken out: JSON lines in a chain of hashes.

A line holds the time, the key's id, the request's id, the sha256 of the image, the top cell, the precision and the
status: never an image, never a key, never a place finer than the answer's. Each line's ``hash`` is the SHA-256 of the
line before and of its own text, so that a line that was changed, put in, moved or cut out breaks the chain there. The
end of a file can be cut off unseen by itself: a log that was closed in order says so in its last line, and whoever
wants to be sure writes down the last hash now and then and gives it to `verify`. A file that is moved away (logrotate)
is followed by a new one whose first line names the last hash of the old. One writer a file: every replica has its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hedwig import __version__

__all__ = ["AuditLog", "Verified", "verify"]

_FIRST = "0" * 64
_MOST_LINE = 65_536


class AuditLog:
    """One process's log, open for appending; safe to call from several threads.

    Args:
        folder: Where it goes; made if it is not there, readable by its owner alone.
        replica: Part of the file's name, and of every line.
    """

    def __init__(self, folder: str | os.PathLike[str], replica: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in replica)[-80:]
        self.path = Path(folder) / f"audit-{safe}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}.jsonl"
        self._replica, self._lock = safe, threading.Lock()
        self._file, self._inode = -1, -1
        self._number, self._last = 0, _FIRST
        with self._lock:
            self._follow()

    def write(
        self,
        *,
        status: int,
        route: str,
        request_id: str,
        key_id: str | None = None,
        image_sha256: str | None = None,
        cell_id: int | None = None,
        precision_km: float | None = None,
    ) -> None:
        """Add one answer.

        Args:
            status: Of HTTP.
            route: As it is in the route table, not as it was asked for.
            request_id: Also in the answer's headers.
            key_id: None where nobody needs a key, or none was recognised.
            image_sha256: Hexadecimal digest of the body.
            cell_id: The likeliest geocell, where one was told.
            precision_km: The floor that the answer was made with.
        """
        record = {
            "event": "answer", "key_id": key_id, "request_id": request_id, "route": route, "status": status,
            "image_sha256": image_sha256, "cell_id": cell_id, "precision_km": precision_km,
        }  # fmt: skip
        with self._lock:
            if self._file < 0:
                return
            self._follow()
            self._append(record)

    def close(self) -> None:
        """Say that this is the end, and close the file."""
        with self._lock:
            if self._file >= 0:
                self._append({"event": "closed"})
                os.close(self._file)
                self._file = -1

    def _follow(self) -> None:
        """Open the file at `path`, again if it was moved away or removed."""
        try:
            there = os.stat(self.path).st_ino
        except FileNotFoundError:
            there = -1
        if self._file >= 0 and there == self._inode:
            return
        if self._file >= 0:
            os.close(self._file)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        self._inode = os.fstat(self._file).st_ino
        self._append({"event": "opened", "previous": self._last})

    def _append(self, record: dict[str, Any]) -> None:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now := time.time())) + f".{int(now % 1 * 1000):03d}Z"
        whole = {"n": self._number, "time": moment, "replica": self._replica, "version": __version__, **record}
        body = json.dumps(whole, separators=(",", ":"), ensure_ascii=True)
        last = _chained(self._last, body)
        # One write of one line: a crash leaves a line that is cut short, never two that are mixed.
        os.write(self._file, f'{body[:-1]},"hash":"{last}"}}\n'.encode())
        self._number, self._last = self._number + 1, last


@dataclass(frozen=True)
class Verified:
    """What `verify` found in a chain that holds.

    Attributes:
        num_lines: In all files.
        last_hash: To write down, and to ask for the next time.
        closed: Whether the log was ended in order; if not, it is still being written, its writer was killed, or its
            end was cut off.
    """

    num_lines: int
    last_hash: str
    closed: bool


def verify(files: Sequence[str | os.PathLike[str]], *, last_hash: str | None = None) -> Verified:
    """Check the chain through the files of one replica, the oldest first.

    Args:
        files: One file, or one that was rotated away and those that followed it.
        last_hash: One that was seen before; it must be in the chain.

    Raises:
        ValueError: names the file and the line at which the chain breaks.
    """
    previous, number, closed, seen = _FIRST, 0, False, last_hash is None
    for file in files:
        for line, body, record, told in _lines(file):
            where = f"{file}, line {line}"
            if record.get("n") != number:
                raise ValueError(f"{where}: number {record.get('n')} where {number} should be; lines are missing.")
            if told != _chained(previous, body):
                raise ValueError(f"{where}: the hash does not fit; this line was changed, or lines before it were.")
            if line == 1 and (record.get("event") != "opened" or record.get("previous") != previous):
                raise ValueError(f"{where}: this file does not follow the one before; give its files, oldest first.")
            previous, number, closed = told, number + 1, record.get("event") == "closed"
            seen = seen or told == last_hash
    if number == 0:
        raise ValueError(
            f"{', '.join(map(str, files)) or 'nothing'}: no lines; an audit log has at least its first one."
        )
    if not seen:
        raise ValueError(f"the hash {last_hash} is not in the chain, which ends at {previous}: its end was cut off.")
    return Verified(number, previous, closed)


def _lines(file: str | os.PathLike[str]) -> Iterator[tuple[int, str, dict[str, Any], str]]:
    """(number, text that was hashed, record, hash) of each line."""
    with open(file, "rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_MOST_LINE), b""), start=1):
            where = f"{file}, line {number}"
            head, mark, tail = line.decode("utf-8", "replace").rpartition(',"hash":"')
            if not mark or not line.endswith(b'"}\n') or len(tail) != 64 + 3:
                raise ValueError(f"{where}: cut short or not a line of an audit log.")
            try:
                record = json.loads(head + "}")
            except (ValueError, RecursionError):
                raise ValueError(f"{where}: not a line of an audit log.") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: not a line of an audit log.")
            yield number, head + "}", record, tail[:64]


def _chained(previous: str, body: str) -> str:
    return hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()
