"""What a deployment has loaded, by version: the one that is served, and while a newer one takes over both.

A request names the version that it began with, by the digest of its content, and is answered from that or not at all.
What is not there is loaded when it is asked for, so nobody has to be told beforehand; whoever is about to serve a
version still lets it be loaded first, so that no request waits. A version that nobody has asked for in a while goes,
unless it is the last one that came or was made ready again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["NotHere", "Version", "Versions", "content_digest"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Version(NamedTuple):
    """Attributes: the folder of a run's version, and the digest of the content that is meant."""

    folder: str
    digest: str


class NotHere(RuntimeError):
    """A version cannot be loaded now: storage is away, or its folder holds something else by now."""


class Versions(Generic[T]):
    """The loaded versions of one process. Any thread may call.

    Args:
        load: Makes one; `NotHere` where it is not what its digest says.
        keep_s: How long one stays that nobody asks for.
        clock: Seconds that never go back.
    """

    def __init__(
        self, load: Callable[[Version], T], *, keep_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._load, self._keep_s, self._clock = load, keep_s, clock
        self._there: dict[str, T] = {}
        self._asked: dict[str, float] = {}
        self._newest: str | None = None
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def ready(self, version: Version) -> T | None:
        """What is loaded, at once; None where it must be loaded first."""
        with self._lock:
            found = self._there.get(version.digest)
            if found is not None:
                self._asked[version.digest] = self._clock()
        return found

    def get(self, version: Version) -> T:
        """What is loaded, or is then. Blocks: call it in a thread.

        Raises:
            NotHere: see `load`, and errors of the system.
        """
        found = self.ready(version)
        if found is not None:
            with self._lock:
                self._newest = version.digest  # a rollback
            return found
        with self._loading:  # one after another: two at once need memory for both, and two callers want the same
            found = self.ready(version)
            if found is None:
                try:
                    found = self._load(version)
                except OSError as error:
                    raise NotHere(f"{version.folder} cannot be read: {error}") from error
                _log.info("loaded %s, digest %s", version.folder, version.digest[:12])
                with self._lock:
                    self._there[version.digest], self._newest = found, version.digest
                    self._asked[version.digest] = self._clock()
                    self._let_go()
        return found

    @property
    def digests(self) -> list[str]:
        """Of what is loaded, oldest first."""
        with self._lock:
            self._let_go()
            return list(self._there)

    def _let_go(self) -> None:
        now = self._clock()
        for digest in [d for d, asked in self._asked.items() if now - asked > self._keep_s and d != self._newest]:
            del self._there[digest], self._asked[digest]
            _log.info("let go of digest %s", digest[:12])


def content_digest(content: Mapping[str, Any]) -> str:
    """sha256 of plain content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
