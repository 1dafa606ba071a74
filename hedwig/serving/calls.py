"""Calls from a replica to other deployments: from any thread, several at once, repeated while there is time.

A handle of Serve is asked on an event loop of its own here. A replica's loop cannot wait for it, because the search and
the encoding run in threads or in a constructor, and waiting there for that very loop would be for ever; Serve also has
a mode in which a handle only works on the loop it was first used on. All that is called is idempotent. What died with
its replica is asked again, of whoever Serve has by then, until the deadline.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from hedwig.serving.versions import NotHere

__all__ = ["Away", "Calls"]

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0

T = TypeVar("T")


class Away(RuntimeError):
    """Nobody answered in time; it may be different in a moment."""


class Calls:
    """An event loop in a thread, and the patience with which it asks.

    Args:
        timeout_s: For calls that are made together, their repetitions included.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="hedwig-calls", daemon=True).start()

    def __call__(self, asks: Sequence[Callable[[], Awaitable[T]]], *, timeout_s: float | None = None) -> list[T]:
        """What each of `asks` returns, called on the loop, all at the same time. Blocks: call it in a thread.

        Raises:
            Away: one of them has not been answered in time.
            RuntimeError: one of them was answered with an error that repeating does not cure.
        """
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        return asyncio.run_coroutine_threadsafe(self._all(asks, deadline), self._loop).result()

    async def _all(self, asks: Sequence[Callable[[], Awaitable[T]]], deadline: float) -> list[T]:
        # Without the context of the request: Serve takes the answers to a handle that is used in it for the proxy's.
        loop, nothing = asyncio.get_running_loop(), contextvars.Context
        tasks = [loop.create_task(_patiently(ask, deadline), context=nothing()) for ask in asks]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _patiently(ask: Callable[[], Awaitable[T]], deadline: float) -> T:
    pause_s, seen = _FIRST_PAUSE_S, "no answer"
    while True:
        left_s = deadline - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                return await ask()
        except TimeoutError:
            raise Away(f"A part of the service has not answered in time ({seen}).") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            seen = "cancelled"  # not us: the replica was stopped with the call in hand
        except Exception as error:  # whatever Ray raises: `_is_passing` knows what to do
            if not _is_passing(error):
                raise RuntimeError(f"A part of the service failed: {type(error).__name__}: {error}"[:2000]) from error
            seen = type(error).__name__
            _log.info("asking again after %s", seen)
        if time.monotonic() + pause_s >= deadline:
            raise Away(f"A part of the service has not answered in time ({seen}).")
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _is_passing(error: Exception) -> bool:
    """Whether it is the way or the replica that failed, and not the work."""
    import grpc  # type: ignore[import-untyped]
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    if isinstance(error, NotHere):
        return True
    if isinstance(error, RuntimeError) and str(error).startswith("Unexpected error (StatusCode"):
        return True  # Serve's own words for a connection that broke; with HAProxy replicas talk gRPC
    passing = (RayError, RayServeException, OSError, grpc.RpcError)
    return isinstance(error, passing) and not isinstance(error, RayTaskError)
