"""What a request may cost: bytes, pixels, seconds and places, and the text of every refusal.

Everything here is decided before the image is decoded. Refusals are HTTPExceptions whose detail already is the JSON
body, so that one handler suffices. Codes: 413 is used for too many pixels as well as for too many bytes (a request
larger than the server is willing to process; the remedy is the same), 415 for bytes that are not an image, 422 for
an image that cannot be decoded, 503 for overload, 429 for one caller's rate. Who the caller is and how often he may
ask is decided in `hedwig.serving.access`, where an image is decoded in `hedwig.serving.decoding`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from hedwig.panorama import image_size

__all__ = [
    "IMAGE_TYPES",
    "INLINE_ROWS",
    "LOOPBACK_NAMES",
    "REFUSALS",
    "Gate",
    "Limits",
    "check_image",
    "check_type",
    "read_body",
    "refusal",
]

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
INLINE_ROWS = 8  # a search of so few embeddings takes less than the way to a thread and back

IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
_CLOSE = {"Connection": "close"}
_DRAINED = 4
_SEND = "Send the file itself: curl --data-binary @panorama.jpg -H 'Content-Type: image/jpeg'."
_SHRINK = "Shrink the image, or save it as JPEG, and send it again; /v1/info lists the limits."
_LATER = "Wait for the seconds that Retry-After says, then send the same request again."

REFUSALS: dict[str, tuple[int, str]] = {
    "bad_host": (400, "Use the address that the service printed when it started, or start it with this name allowed."),
    "bad_parameter": (400, "Correct the query parameter; /openapi.json describes them."),
    "bad_body": (400, "Correct the JSON of the body; /openapi.json describes and shows it."),
    "body_incomplete": (400, "Send the whole file; Content-Length must be its size."),
    "empty_body": (400, _SEND),
    "no_key": (
        401,
        "Send the header Authorization: Bearer KEY with a key of this service; its operator hands them out.",
    ),
    "bad_key": (401, "Check the key for missing characters; ask the operator for another one."),
    "expired_key": (401, "Ask the operator for a new key."),
    "missing_scope": (403, "Ask the operator for a key that has this scope."),
    "withheld": (403, "This service gives places only to its precision floor, and this would tell more; /v1/info."),
    "not_found": (404, "POST an image to /v1/locate; /openapi.json lists every route."),
    "no_cells": (404, "Ask a service that was started from a run folder; the answers name their cells all the same."),
    "wrong_method": (405, "Use the method that the Allow header names."),
    "body_timeout": (408, "Send it over a faster connection, or shrink the image."),
    "body_too_large": (413, _SHRINK),
    "too_many_pixels": (413, _SHRINK),
    "unsupported_type": (415, _SEND),
    "not_an_image": (415, "Send a JPEG, PNG or WebP file."),
    "bad_image": (422, "Open the file in a viewer: it is probably cut short or damaged; download or export it again."),
    "rate_limited": (429, _LATER),
    "internal": (500, "Send it once more; if it fails again, report the time of the request to the operator."),
    "overloaded": (503, _LATER),
    "too_slow": (503, _LATER),
    "not_ready": (503, _LATER),
}

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one replica grants.

    Attributes:
        max_body_bytes: Largest body.
        body_timeout_s: A body that has not arrived whole after this is refused.
        request_timeout_s: For waiting plus locating, without the body.
        max_pixels: For PNG and WebP, which expand a thousandfold.
        max_jpeg_pixels: For JPEG, which does not.
        max_ongoing_requests: Bodies held in memory at once; times `max_body_bytes` this bounds the memory.
        max_queued_requests: Requests that wait, unread, for one of these places; one more is answered 503.
        num_threads: Images located at the same time.
        max_batch: Items of one batch, and photographs of one place.
        max_vectors: Embeddings of one search.
        retry_after_s: What a refused caller is told to wait.
    """

    max_body_bytes: int = 25 * 1024**2
    body_timeout_s: float = 10.0
    request_timeout_s: float = 30.0
    max_pixels: int = 40_000_000
    max_jpeg_pixels: int = 140_000_000
    max_ongoing_requests: int = 8
    max_queued_requests: int = 64
    num_threads: int = 1
    max_batch: int = 32
    max_vectors: int = 4096
    retry_after_s: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0 and not (name == "max_queued_requests" and value == 0):
                raise ValueError(f"{name} is {value}; it must be above 0.")


def refusal(code: str, message: str, *, headers: dict[str, str] | None = None) -> HTTPException:
    """The exception that answers with `REFUSALS[code]` and `message`."""
    status, advice = REFUSALS[code]
    detail = {"code": code, "message": message, "next": advice}
    # Starlette types the detail as text and passes on whatever it is given.
    return HTTPException(status, detail=detail, headers=headers)  # type: ignore[arg-type]


def check_type(content_type: str | None, accepted: Sequence[str] = IMAGE_TYPES) -> str:
    """The media type; refuse others than the accepted: also what a form can send without a preflight."""
    media_type = (content_type or "").split(";")[0].strip().lower()
    if media_type not in accepted:
        seen = f"Content-Type is {media_type[:80]!r}" if media_type else "There is no Content-Type"
        raise refusal("unsupported_type", f"{seen}; accepted are {', '.join(accepted)}.")
    return media_type


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body: its declared length is checked first, then what really arrives is counted.

    What is too large is read on and thrown away, up to `_DRAINED` times the limit: closing the connection on a client
    that still sends resets it, and the client then reports that instead of our answer.

    Raises:
        HTTPException: 400 empty or incomplete, 408 slow, 413 too large.
    """
    header = request.headers.get("content-length", "").strip()
    if header and not (header.isascii() and header.isdecimal() and len(header) < 20):
        raise refusal("body_incomplete", f"Content-Length is {header[:40]!r}, not a number.")
    declared = int(header or 0)
    text = f"Content-Length is {declared:,} bytes" if declared > max_bytes else "The body is larger"
    too_large = refusal("body_too_large", f"{text}; at most {max_bytes:,} are accepted.", headers=_CLOSE)
    if declared > _DRAINED * max_bytes:
        raise too_large
    chunks: list[bytes] = []
    arrived = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                arrived += len(chunk)
                if arrived > _DRAINED * max_bytes:
                    break
                if max(arrived, declared) <= max_bytes:
                    chunks.append(chunk)
                else:
                    chunks.clear()
    except TimeoutError:
        if max(arrived, declared) <= max_bytes:
            text = f"Only {arrived:,} bytes of the body arrived within {timeout_s:g} s."
            raise refusal("body_timeout", text, headers=_CLOSE) from None
    except ClientDisconnect:
        raise refusal("body_incomplete", f"The connection ended after {arrived:,} bytes of the body.") from None
    if max(arrived, declared) > max_bytes:
        raise too_large
    if not arrived:
        raise refusal("empty_body", "The request body is empty (0 bytes).")
    return b"".join(chunks)  # of one chunk, itself


def check_image(data: bytes, limits: Limits) -> tuple[int, int]:
    """(width, height) in px from the header, before anything is decoded.

    Raises:
        HTTPException: 413 too many pixels, 415 not a JPEG, PNG or WebP, 422 damaged header.
    """
    is_jpeg = data[:3] == b"\xff\xd8\xff"
    if not (is_jpeg or data[:8] == b"\x89PNG\r\n\x1a\n" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")):
        raise refusal("not_an_image", f"The {len(data):,} bytes are not a JPEG, PNG or WebP image.")
    try:
        width, height = image_size(data)
    except ValueError as error:
        raise refusal("bad_image", str(error)) from None
    most = limits.max_jpeg_pixels if is_jpeg else limits.max_pixels
    if width * height > most:
        text = f"The image has {width}x{height} = {width * height:,} pixels; at most {most:,} are accepted."
        raise refusal("too_many_pixels", text)
    return width, height


class Gate:
    """Places for requests and threads for their work; whoever finds none free is refused at once.

    A request waits for a place before its body is read, so the waiting cost no memory here. Work that outlives its
    timeout cannot be stopped: it keeps its thread until it ends, and `oldest_s` tells the health check about it.

    Args:
        limits: How many places and threads there are.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._admitted = 0
        self._places = asyncio.Semaphore(limits.max_ongoing_requests)
        # One lies ready for the thread that ends next, which would otherwise wait for the loop. No more: a queued item
        # would hold its body after its caller has been refused.
        self._free = asyncio.Semaphore(limits.num_threads + 1)
        self._executor = ThreadPoolExecutor(limits.num_threads, thread_name_prefix="hedwig-locate")
        self._started: dict[int, float] = {}
        self._lock = threading.Lock()

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold one of the places; refuse with 503 when too many wait already or the wait is too long."""
        limits = self._limits
        if self._admitted >= limits.max_ongoing_requests + limits.max_queued_requests:
            text = f"{self._admitted} requests are being answered or waiting; this service takes no more for now."
            raise self._later("overloaded", text)
        self._admitted += 1
        try:
            if not self._places.locked():
                await self._places.acquire()  # at once
            else:
                try:
                    async with asyncio.timeout(limits.request_timeout_s):
                        await self._places.acquire()
                except TimeoutError:
                    raise self._later("overloaded", f"No place was free for {limits.request_timeout_s:g} s.") from None
            try:
                yield
            finally:
                self._places.release()
        finally:
            self._admitted -= 1

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work()`, called in a thread; 503 when that takes longer than `request_timeout_s`."""
        loop = asyncio.get_running_loop()
        timeout_s = self._limits.request_timeout_s

        def started() -> T:
            with self._lock:
                self._started[id(started)] = time.monotonic()
            return work()

        def finished(_: Future[T]) -> None:
            with self._lock:
                self._started.pop(id(started), None)
            with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits for a thread any more
                loop.call_soon_threadsafe(self._free.release)

        try:
            async with asyncio.timeout(timeout_s):
                await self._free.acquire()
                future = self._executor.submit(started)
                future.add_done_callback(finished)
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise self._later("too_slow", f"The image was not located within {timeout_s:g} s.") from None

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return max(0, self._admitted - self._limits.max_ongoing_requests)

    @property
    def num_ongoing(self) -> int:
        """Requests that hold a place."""
        return min(self._admitted, self._limits.max_ongoing_requests)

    def oldest_s(self) -> float:
        """Age of the work that has been running longest, in seconds; 0 when idle."""
        with self._lock:
            return time.monotonic() - min(self._started.values()) if self._started else 0.0

    def close(self) -> None:
        """Let the threads end once their present work is done."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _later(self, code: str, message: str) -> HTTPException:
        return refusal(code, message, headers={"Retry-After": str(self._limits.retry_after_s)})
