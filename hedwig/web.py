"""Polite HTTP to somebody else's service: never faster than allowed, patient with its faults, silent about keys.

One asynchronous client for the captioning APIs and the imagery sources. It spaces requests evenly (a rate is a promise,
so there are no bursts), bounds how many are under way, waits as long as ``Retry-After`` says, backs off with jitter
where it says nothing, counts bytes while reading and takes a body that ends early for a fault. Keys are handed in as
`secrets` and never leave in an error, a log or a repr; they go to no other host, and no redirect is followed. One
service that asks to be left alone is left alone by all requests, not only by the one that was told.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import json as jsonlib
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus

__all__ = ["Answer", "Politeness", "Refused", "WebClient"]

TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})
HIDDEN = "***"


class Refused(OSError):
    """The service did not give what was asked for.

    Attributes:
        status: HTTP status of the last answer, None if there was none.
        body: the beginning of the last answer's body, without secrets.
        num_attempts: how often it was asked.
    """

    # Defaults, because an error that crosses processes is rebuilt from its message alone.
    def __init__(self, message: str, *, status: int | None = None, body: str = "", num_attempts: int = 1) -> None:
        super().__init__(message)
        self.status, self.body, self.num_attempts = status, body, num_attempts


@dataclass(frozen=True)
class Answer:
    """A complete answer: status, headers with lower-case names, body, and how often it had to be asked for."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    num_attempts: int


@dataclass
class Politeness:
    """How a service may be used; keep one per service and process, for it remembers when the next request is due.

    Attributes:
        per_second: most requests a second, retries included; None for no limit.
        concurrency: most requests under way.
        timeout_s: longest silence of the service while connecting, sending or reading.
        total_s: longest time of one attempt as a whole, against a service that drips; None for no limit.
        max_bytes: longest body.
        max_attempts: how often one request is made at most.
        first_wait_s: the wait before the second attempt, doubled before each further one, with jitter.
        max_wait_s: the longest wait, also for ``Retry-After``: a service that says more is given up on.
    """

    per_second: float | None = None
    concurrency: int = 16
    timeout_s: float = 60.0
    max_bytes: int = 50_000_000
    max_attempts: int = 6
    first_wait_s: float = 1.0
    max_wait_s: float = 120.0
    total_s: float | None = 1800.0
    _due: float = field(default=0.0, repr=False)
    _last: float = field(default=-1e9, repr=False)
    _quiet_until: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        if self.per_second is not None and self.per_second <= 0:
            raise ValueError(f"per_second must be positive or None, got {self.per_second}.")
        for name in ("concurrency", "max_attempts", "max_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def reserve(self) -> float:
        """Seconds to wait until the next request may be made; the slot is taken."""
        if self.per_second is None:
            return 0.0
        now = time.monotonic()
        self._due = max(self._due, now)
        wait = self._due - now
        self._due += 1 / self.per_second
        return wait

    def pause(self, seconds: float) -> None:
        """Let nobody ask for so long: the service said so."""
        self._quiet_until = max(self._quiet_until, time.monotonic() + seconds)

    async def turn(self) -> None:
        """Wait for the moment at which one request may start."""
        gap = 0.0 if self.per_second is None else 1 / self.per_second
        await asyncio.sleep(self.reserve())
        # A sleep that ended late would bring this request nearer to the next: look at when the last one really began.
        while (wait := max(self._quiet_until, self._last + gap) - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self._last = time.monotonic()


class WebClient:
    """One service, inside ``async with``.

    Args:
        base_url: what paths are appended to.
        politeness: see there.
        headers: sent with every request.
        secrets: texts that no error may show, such as the key inside `headers` or `params`.
        params: query parameters of every request.
    """

    def __init__(
        self,
        base_url: str,
        *,
        politeness: Politeness,
        headers: Mapping[str, str] | None = None,
        secrets: tuple[str, ...] = (),
        params: Mapping[str, str] | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must start with http:// or https://, got {base_url!r}.")
        if "@" in base_url.split("/")[2]:
            raise ValueError("base_url holds a user or a password; hand them in as headers from the environment.")
        self.base_url = base_url.rstrip("/")
        self.politeness = politeness
        self.num_requests = 0
        self._headers, self._params = dict(headers or {}), dict(params or {})
        self._secrets = _spellings(secrets)
        self._quiet_logs = _Redaction(self.hide)
        self._client: Any = None
        self._slots: asyncio.Semaphore | None = None

    async def __aenter__(self) -> WebClient:
        """Open the connections of this event loop."""
        import httpx  # a third of a second to import, and most commands speak to nobody

        logging.getLogger("httpx").addFilter(self._quiet_logs)  # it writes whole URLs at INFO
        limits = httpx.Limits(max_connections=self.politeness.concurrency)
        self._client = httpx.AsyncClient(timeout=self.politeness.timeout_s, limits=limits, follow_redirects=False)
        self._slots = asyncio.Semaphore(self.politeness.concurrency)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close them."""
        client, self._client, self._slots = self._client, None, None
        try:
            await client.aclose()
        finally:
            logging.getLogger("httpx").removeFilter(self._quiet_logs)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("A WebClient holds keys and connections and is not pickled; make one where it is used.")

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        json: Any = None,
        content: bytes | None = None,
        files: Any = None,
        headers: Mapping[str, str] | None = None,
        data: Mapping[str, str] | None = None,
        accept: tuple[int, ...] = (),
        final: tuple[str, ...] = (),
        check: Callable[[bytes], object] | None = None,
        max_attempts: int | None = None,
    ) -> Answer:
        """Ask until there is an answer.

        Args:
            method: GET, POST, ...
            path: appended to the base, or a full URL.
            params: query parameters beside the client's.
            json: body as JSON.
            content: body as bytes.
            files: multipart body, as httpx takes it.
            headers: beside the client's.
            data: form fields beside `files`.
            accept: statuses besides 2xx that are answers and not failures, such as 404.
            final: words in the body that make a temporary status final, such as ``insufficient_quota``.
            check: raises ValueError for a 2xx body that is no answer, such as half a JSON; then it is asked again.
            max_attempts: instead of the politeness's, for what must not be done twice.

        Raises:
            Refused: a status that no repetition will change, or too many attempts; nothing secret in it.
            RuntimeError: not inside ``async with``.
        """
        if self._client is None or self._slots is None:
            raise RuntimeError("WebClient.request needs `async with client:` around it.")
        url = path if path.startswith(("http://", "https://")) else f"{self.base_url}/{path.lstrip('/')}"
        options = {"json": json, "content": content, "files": files, "headers": headers, "data": data}
        given = {name: value for name, value in options.items() if value is not None}
        if query := {**(self._params if self._mine(url) else {}), **(params or {})}:
            # Merged here, because httpx would replace the query that a paging link brings along.
            url, _, brought = url.partition("?")
            pairs = [(name, value) for name, value in parse_qsl(brought, True) if name not in query]
            given["params"] = [*pairs, *query.items()]
        async with self._slots:
            return await self._until_answered(
                method, url, given, accept, final, check, max_attempts or self.politeness.max_attempts
            )

    def _mine(self, url: str) -> bool:
        return url.startswith((self.base_url + "/", self.base_url + "?")) or url == self.base_url

    async def _until_answered(
        self,
        method: str,
        url: str,
        options: Any,
        accept: tuple[int, ...],
        final: tuple[str, ...],
        check: Callable[[bytes], object] | None,
        max_attempts: int,
    ) -> Answer:
        p = self.politeness
        trouble, status, body = "", None, ""
        for attempt in range(1, max_attempts + 1):
            await p.turn()
            self.num_requests += 1
            asked_to_wait: float | None = None
            try:
                status, headers, raw = await self._once(method, url, options)
                if check is not None and 200 <= status < 300:
                    self._checked(check, raw)
            except _Fault as fault:
                trouble, status, body = str(fault), None, ""
            else:
                if 200 <= status < 300 or status in accept:
                    return Answer(status, headers, raw, attempt)
                text = self.hide(raw.decode("utf-8", "replace"))  # before it is cut: a cut could halve a secret
                body = text[:500]
                trouble = f"HTTP {status}: {body[:200]}"
                if 300 <= status < 400:
                    trouble += f" (it points to {self._shown(headers.get('location', 'nowhere'))}; ask there instead)"
                if status not in TEMPORARY or any(word in text for word in final):
                    raise Refused(
                        f"{method} {self._shown(url)}: {trouble}", status=status, body=body, num_attempts=attempt
                    )
                asked_to_wait = _retry_after(headers)
            if asked_to_wait is not None and asked_to_wait > p.max_wait_s:
                raise Refused(
                    f"{method} {self._shown(url)}: asked to wait {asked_to_wait:.0f} s, more than the "
                    f"{p.max_wait_s:.0f} s allowed; run the same command again later. ({trouble})",
                    status=status, body=body, num_attempts=attempt,
                )  # fmt: skip
            if asked_to_wait:
                p.pause(asked_to_wait)
            elif attempt < max_attempts:
                backoff = min(p.max_wait_s, p.first_wait_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1)  # noqa: S311
                await asyncio.sleep(backoff)
        raise Refused(
            f"{method} {self._shown(url)}: given up after {max_attempts} attempts; the last: {trouble}",
            status=status, body=body, num_attempts=max_attempts,
        )  # fmt: skip

    async def _once(self, method: str, url: str, options: Any) -> tuple[int, dict[str, str], bytes]:
        import httpx

        parts: list[bytes] = []
        size = 0
        # The client's own headers may hold the key: they go nowhere but to its own service.
        options = {**options, "headers": {**(self._headers if self._mine(url) else {}), **options.get("headers", {})}}
        try:
            async with (
                asyncio.timeout(self.politeness.total_s),
                self._client.stream(method, url, **options) as answer,
            ):
                async for part in answer.aiter_bytes():
                    size += len(part)
                    if size > self.politeness.max_bytes:
                        raise Refused(
                            f"{method} {self._shown(url)}: the answer is over {self.politeness.max_bytes} bytes long.",
                            status=answer.status_code,
                        )
                    parts.append(part)
                return answer.status_code, dict(answer.headers), b"".join(parts)
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            # Ours and not the service's, such as a key with a line break in it: no repetition helps.
            trouble = self.hide(f"{type(error).__name__}: {error}")
            raise Refused(f"{method} {self._shown(url)}: cannot be asked: {trouble}") from None
        except httpx.RequestError as error:  # timeouts, dropped connections, bodies that end early or do not unpack
            raise _Fault(self.hide(f"{type(error).__name__}: {error}")) from None
        except TimeoutError:
            raise _Fault(f"no complete answer within {self.politeness.total_s} s") from None

    def _checked(self, check: Callable[[bytes], object], raw: bytes) -> None:
        try:
            check(raw)
        except ValueError as error:
            raise _Fault(self.hide(f"unreadable answer: {error}")[:200]) from None

    def hide(self, text: str) -> str:
        """`text` without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return text

    def _shown(self, url: str) -> str:
        scheme, _, rest = url.split("?", 1)[0].partition("://")
        host, slash, path = rest.partition("/")
        return self.hide(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}" if rest else scheme)


class _Fault(Exception):
    """The transport failed; asking again may help."""


class _Redaction(logging.Filter):
    """Takes the secrets of one client out of a library's log."""

    def __init__(self, hide: Callable[[str], str]) -> None:
        super().__init__()
        self._hide = hide

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._hide(record.getMessage()), ()
        return True


def _spellings(secrets: tuple[str, ...]) -> tuple[str, ...]:
    """Each secret as it is, trimmed, in a URL, in JSON, in a repr; the longest first, so that none is half hidden."""
    forms: set[str] = set()
    for secret in secrets:
        for text in (secret, secret.strip()):
            forms |= {text, quote(text, safe=""), quote(text), quote_plus(text)}
            forms |= {jsonlib.dumps(text)[1:-1], repr(text)[1:-1], repr(text.encode())[2:-1]}
    return tuple(sorted((form for form in forms if form), key=len, reverse=True))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the answer asks to wait, None where it says nothing.

    ``Retry-After`` is a number or a date (RFC 9110 §10.2.3); ``retry-after-ms`` is how OpenAI says it more finely.
    """
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit_s)
        except (KeyError, ValueError):
            continue
    try:
        moment = email.utils.parsedate_to_datetime(headers["retry-after"])
        if moment.tzinfo is None:  # the zone "-0000"; HTTP dates are UTC
            moment = moment.replace(tzinfo=datetime.UTC)
        return max(0.0, moment.timestamp() - time.time())
    except (KeyError, ValueError, OverflowError):
        return None
