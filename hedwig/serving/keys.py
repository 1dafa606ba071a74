"""API keys: who may ask what, kept as digests, compared in constant time.

A key is 256 random bits and is shown once, by `hedwig keys new`; what is kept is its SHA-256 (no salt and no slow hash:
there is nothing to guess in 256 random bits), an id that logs may name, scopes and an expiry. The records come from
the environment variable HEDWIG_API_KEYS, as JSON, or from the file that HEDWIG_API_KEYS_FILE names; never from a
setting or an argument, which end up in run folders and process lists. The file is read again when it changes, so that
a revoked key stops working without a restart; one that cannot be read lets nobody in. This is not encryption: keys
travel in clear unless a proxy in front speaks TLS.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["KEYS_FILE_VARIABLE", "KEYS_VARIABLE", "SCOPES", "ApiKey", "KeyRing", "new_key", "read_keys", "write_keys"]

_log = logging.getLogger(__name__)

KEYS_VARIABLE = "HEDWIG_API_KEYS"
KEYS_FILE_VARIABLE = "HEDWIG_API_KEYS_FILE"
SCOPES = ("read", "locate", "neighbours", "metrics")
_PREFIX = "hw_"  # so that scanners for leaked secrets know one when they see it
_SECRET_BYTES = 32
_MOST_BYTES = 1_000_000
_RELOAD_EVERY_S = 1.0
_FIELDS = {"id", "name", "sha256", "scopes", "expires"}


@dataclass(frozen=True)
class ApiKey:
    """What is kept of a key: enough to recognise it, not enough to use it.

    Attributes:
        id: What logs and the audit say; not secret.
        name: For people.
        sha256: Hexadecimal digest of the key's text.
        scopes: Some of `SCOPES`: read is info and cells, locate is locating and embedding, neighbours is the ids and
            coordinates of training panoramas, metrics is /metrics.
        expires: Unix time in seconds after which it is refused; None for never.
    """

    id: str
    name: str
    sha256: str
    scopes: tuple[str, ...]
    expires: float | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-zA-Z_-]{1,64}", self.id):
            raise ValueError(f"key id {self.id[:80]!r} must be 1 to 64 letters, digits, - and _.")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(
                f"key {self.id}: sha256 must be 64 lower-case hexadecimal digits; was the key itself put in?"
            )
        if not self.scopes or set(self.scopes) - set(SCOPES):
            raise ValueError(f"key {self.id}: scopes are {list(self.scopes)}; give some of {', '.join(SCOPES)}.")

    def expired(self, now: float) -> bool:
        """Whether it is over at Unix time `now`."""
        return self.expires is not None and now >= self.expires


def new_key(
    name: str, scopes: Collection[str] = ("read", "locate"), *, days: float | None = None
) -> tuple[str, ApiKey]:
    """A fresh key: its text, which exists nowhere else, and the record of it.

    Args:
        name: For people.
        scopes: Some of `SCOPES`.
        days: How long it is good for; None for ever.

    Raises:
        ValueError: an unknown scope, or days that are not positive.
    """
    if days is not None and not days > 0:
        raise ValueError(f"days is {days:g}; it must be above 0, or left out for a key without an end.")
    text = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    expires = None if days is None else time.time() + 86_400.0 * days
    ordered = tuple(sorted(set(scopes), key=lambda s: SCOPES.index(s) if s in SCOPES else len(SCOPES)))
    return text, ApiKey(secrets.token_hex(4), name, _digest(text), ordered, expires)


def parse_keys(text: str, where: str) -> tuple[ApiKey, ...]:
    """The records in a JSON document ``{"keys": [{"id", "name", "sha256", "scopes", "expires"}]}``.

    Args:
        text: The document.
        where: Named in errors, which never quote the document: somebody may have put a key into it.

    Raises:
        ValueError: it is not such a document; says where and which record.
    """
    if len(text) > _MOST_BYTES:
        raise ValueError(f"{where} holds {len(text):,} characters, more than {_MOST_BYTES:,}; is it the right file?")
    try:
        records = json.loads(text)["keys"]
        found = []
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict) or set(record) - _FIELDS or _FIELDS - {"expires"} - set(record):
                raise ValueError(f"record {number} must have {', '.join(sorted(_FIELDS))} and nothing else.")
            if not all(isinstance(record[f], str) for f in ("id", "name", "sha256")):
                raise ValueError(f"record {number}: id, name and sha256 must be text.")
            found.append(ApiKey(**{**record, "scopes": tuple(record["scopes"]), "expires": _time(record)}))
    except (KeyError, TypeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{where} is not a list of API keys ({type(error).__name__}); use `hedwig keys new`."
        ) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if len({key.id for key in found}) < len(found):
        raise ValueError(f"{where}: two keys have the same id; revoke one of them.")
    return tuple(found)


def read_keys(path: str | os.PathLike[str]) -> tuple[ApiKey, ...]:
    """The records in a file; FileNotFoundError and ValueError say what is wrong with it."""
    with open(path, encoding="utf-8") as file:
        return parse_keys(file.read(_MOST_BYTES + 1), str(path))


def write_keys(path: str | os.PathLike[str], keys: Iterable[ApiKey]) -> None:
    """Replace the file in one step, readable by its owner alone: a service may be reading it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{**asdict(key), "scopes": list(key.scopes), "expires": _date(key.expires)} for key in keys]
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps({"keys": records}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class KeyRing:
    """The keys that are let in. Holds digests only, so it may travel to replicas.

    Args:
        keys: The records.
        path: File to read again when it has changed; None where there is none.
    """

    def __init__(self, keys: Iterable[ApiKey], *, path: str | None = None) -> None:
        self._keys = tuple(keys)
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._looked = -_RELOAD_EVERY_S

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> KeyRing | None:
        """The ring that the environment describes; None where it describes none.

        Raises:
            FileNotFoundError: the file that is named is not there.
            ValueError: both variables are set, or what they hold are no keys, or it is none at all.
        """
        text, path = environment.get(KEYS_VARIABLE), environment.get(KEYS_FILE_VARIABLE)
        if text is None and path is None:
            return None
        if text is not None and path is not None:
            raise ValueError(f"{KEYS_VARIABLE} and {KEYS_FILE_VARIABLE} are both set; unset one of them.")
        if path is not None:
            path = os.path.abspath(path)
            ring = cls(read_keys(path), path=path)
        else:
            ring = cls(parse_keys(str(text), KEYS_VARIABLE))
        if not ring._keys:
            raise ValueError(
                f"{path or KEYS_VARIABLE} holds no keys, so nobody could ask; make one: hedwig keys new NAME"
            )
        return ring

    def __len__(self) -> int:
        return len(self._keys)

    def settled(self) -> KeyRing:
        """The ring for this machine: where it has no such file the keys that came along stay as they are."""
        if self._path is None or os.path.exists(self._path):
            return self
        _log.warning("%s is not on this machine: keys that are revoked there work here until a restart", self._path)
        return KeyRing(self._keys)

    def recognise(self, text: str, now: float | None = None) -> tuple[ApiKey | None, bool]:
        """(the key, whether it has expired) for what a caller sent; (None, False) when nobody knows it.

        It is compared with every record, wherever it was found, so that the time taken tells nothing.
        """
        self._reload()
        seen = _digest(text)
        found: ApiKey | None = None
        for key in self._keys:
            if hmac.compare_digest(seen, key.sha256):
                found = key
        return found, found is not None and found.expired(time.time() if now is None else now)

    def _reload(self) -> None:
        """Read the file again when it is another one than last time; at most once a second."""
        now = time.monotonic()
        if self._path is None or now - self._looked < _RELOAD_EVERY_S:
            return
        self._looked = now
        try:
            status = os.stat(self._path)
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if stamp != self._stamp:
                self._keys = read_keys(self._path)
                self._stamp = stamp
        except (OSError, ValueError) as error:
            if self._keys:
                _log.error("the API keys cannot be read, so nobody is let in: %s", error)
            self._keys, self._stamp = (), None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _time(record: Mapping[str, Any]) -> float | None:
    value = record.get("expires")
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"key {record['id'][:80]}: expires must be a date such as 2027-01-31T00:00:00+00:00, or null.")
    moment = datetime.fromisoformat(value)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _date(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
