"""What a replica counts, as Prometheus text: requests, seconds by stage, batch sizes, queues, entropy of the answers.

The registry is its own, so that nothing of another library or of another application in the process is published.
Every series carries the replica's name: behind a proxy each scrape reaches one replica, and counters of several
replicas under one name would look like counters that jump back. Routes are labelled by their pattern, never by what
was sent, so that the number of series is bounded.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["METRICS_TYPE", "CountRequests", "Metrics"]

METRICS_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
_BITS = (0.1, 0.5, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """The counters of one replica.

    Args:
        replica: Its name; None makes one of host and process.
    """

    def __init__(self, replica: str | None = None) -> None:
        self.registry = CollectorRegistry()
        self._replica = replica or f"{socket.gethostname()}-{os.getpid()}"
        self._series: dict[tuple[Any, ...], Any] = {}
        self._requests = Counter(
            "hedwig_requests", "Requests answered.", ["replica", "method", "route", "status"], registry=self.registry
        )
        self._request_s = self._histogram("request_seconds", "From the first byte to the answer.", _SECONDS, "route")
        self._stage_s = self._histogram("stage_seconds", "Time a request spent in each stage.", _SECONDS, "stage")
        self._batch = self._histogram("batch_size", "Images or embeddings worked on at once.", _SIZES, "route")
        self._entropy = self._histogram("cell_entropy_bits", "Entropy of the posterior over the geocells.", _BITS)
        self._depth = Gauge("hedwig_queue_depth", "Requests now.", ["replica", "state"], registry=self.registry)
        self._release = Gauge(
            "hedwig_release", "1 for what is being served.", ["replica", "version", "model", "run_digest"],
            registry=self.registry,
        )  # fmt: skip

    def _of(self, family: Any, *labels: str) -> Any:
        """The series of these labels; finding one anew takes longer than counting."""
        key = (family, *labels)
        if (series := self._series.get(key)) is None:
            series = self._series[key] = family.labels(self._replica, *labels)
        return series

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        names = ["replica", *labels]
        return Histogram(f"hedwig_{name}", text, names, buckets=buckets, registry=self.registry)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request was answered."""
        method = method if method in _METHODS else "other"
        self._of(self._requests, method, route, str(status)).inc()
        self._of(self._request_s, route).observe(seconds)

    def stages(self, timings_ms: Mapping[str, float]) -> None:
        """Where the time of one request went; the total is `count`'s."""
        for name, value in timings_ms.items():
            if name != "total":
                self._of(self._stage_s, name).observe(value / 1000)

    def batch(self, route: str, size: int) -> None:
        """So many were worked on at once."""
        self._of(self._batch, route).observe(size)

    def entropy(self, bits: float) -> None:
        """One answer's entropy."""
        self._entropy.labels(self._replica).observe(bits)

    def watch(self, state: str, number: Callable[[], float]) -> None:
        """Read a number of requests whenever somebody asks."""
        self._depth.labels(self._replica, state).set_function(number)

    def released(self, version: str, model: str, run_digest: str) -> None:
        """Another release is served from now on."""
        self._release.clear()
        self._release.labels(self._replica, version, model, run_digest).set(1)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class CountRequests:
    """ASGI middleware: count every answer by the pattern of its route.

    Args:
        app: The application inside.
        metrics: Where to.
        clock: Seconds, monotonic.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._app, self._metrics, self._clock = app, metrics, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = self._clock(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            # The router leaves its match in the scope; what it did not know has none.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.count(scope["method"], route, status, self._clock() - began)
