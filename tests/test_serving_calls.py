"""Calls to others: all at once, repeated where that helps, given up in time, and safe to wait for on any loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import RayServeException

from hedwig.serving.calls import Away, Calls
from hedwig.serving.versions import NotHere


@pytest.fixture
def calls() -> Iterator[Calls]:
    made = Calls(20.0)
    yield made
    made.close()


def failing(*errors: Exception, answer: object = "done") -> tuple[Callable[[], Awaitable[Any]], list[float]]:
    """What raises these one after another and then answers, and when it was called."""
    times: list[float] = []

    async def ask() -> Any:
        times.append(time.monotonic())
        if len(times) <= len(errors):
            raise errors[len(times) - 1]
        return answer

    return ask, times


def test_all_are_asked_at_once_and_answered_in_their_order(calls: Calls) -> None:
    together = asyncio.Barrier(3)

    def asks(name: str) -> Callable[[], Awaitable[str]]:
        async def ask() -> str:
            await together.wait()  # nobody passes before all are there
            return name

        return ask

    assert calls([asks("a"), asks("b"), asks("c")]) == ["a", "b", "c"]
    assert calls([]) == []


BROKEN = RuntimeError("Unexpected error (StatusCode.INTERNAL): Received RST_STREAM")  # Serve's words


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        RayServeException("gone"),
        NotHere("later"),
        asyncio.CancelledError(),
        OSError(),
        grpc.RpcError(),
        BROKEN,
    ],
)
def test_what_died_with_its_replica_is_asked_again(calls: Calls, error: Exception) -> None:
    ask, times = failing(error, error)
    assert calls([ask]) == ["done"]
    assert len(times) == 3
    assert times[2] - times[1] > times[1] - times[0] > 0.015


def test_an_error_of_the_work_is_not_repeated_and_is_nobodys_bad_image(calls: Calls) -> None:
    for error in (ValueError("two cells"), RayTaskError("search", "traceback", ValueError("two cells"))):
        ask, times = failing(error)
        with pytest.raises(RuntimeError, match="failed: ") as caught:
            calls([ask])
        assert not isinstance(caught.value, ValueError)
        assert len(times) == 1
    remote = RayTaskError("search", "traceback", NotHere("soon")).as_instanceof_cause()
    ask, times = failing(remote)
    assert calls([ask]) == ["done"]


def test_what_is_asked_knows_nothing_of_the_request_that_asks(calls: Calls) -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")

    async def seen() -> str:
        return request.get()

    request.set("mine")
    assert calls([seen]) == ["none"]


def test_patience_ends_with_the_deadline(calls: Calls) -> None:
    ask, times = failing(*[ActorDiedError()] * 1000)
    began = time.monotonic()
    with pytest.raises(Away, match="ActorDiedError"):
        calls([ask], timeout_s=0.3)
    assert len(times) > 2
    cancelled = threading.Event()

    async def never() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            cancelled.set()

    with pytest.raises(Away, match="no answer"):
        calls([never], timeout_s=0.1)
    assert cancelled.wait(10)
    assert time.monotonic() - began < 10


def test_a_loop_that_waits_for_its_own_replica_does_not_wait_for_ever(calls: Calls) -> None:
    ask, _ = failing(ActorDiedError())

    async def constructor() -> list[Any]:
        return calls([ask])  # blocking, on a running loop

    assert asyncio.run(constructor()) == ["done"]
