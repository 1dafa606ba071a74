"""The service beside its own ceiling: stored embeddings searched over HTTP, and an empty answer of the same Serve.

Two more applications answer behind the same proxy: ``/ping`` as Serve's guide has it, an empty FastAPI route, and
``/bare``, an ASGI function that reads what it is sent and answers two bytes. What they reach is what proxy, Ray and
this client leave to anybody; ``/bare`` is asked with nothing, and with the bodies of the searches. All are asked in
turn, round by round, over connections that stay open, so a ratio compares what ran in the same seconds. The batch
endpoint is compared with the same retriever in this process. Latency is measured at a share of the rate that was
reached, from the moment a request was due, not from when it could be sent: a service that stalls does not hide its
queue. The client is asyncio and shares the machine's cores with what it measures.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from hedwig.benchmark.contenders import World, synthetic
from hedwig.index import GeocellIndex
from hedwig.models.geolocator import Geolocator, GeolocatorConfig
from hedwig.panorama import Slicing
from hedwig.retrieve import Hedwig
from hedwig.retrieve.halves import in_halves
from hedwig.retrieve.retriever import Retriever

__all__ = ["ServeFigures", "load_index", "measure_serving"]

_PING, _BARE = "/ping", "/bare"
_TOP_K = 5
_WARM_UP = 64
_PACED_S = 10.0  # at least: in three seconds one hiccup of the machine is the hundredth that p99 looks for
_LOAD_CONNECTIONS = 4  # times the others: at a given rate requests wait for the service, not for a connection


@dataclass(frozen=True)
class ServeFigures:
    """One measurement; ratios are medians over rounds.

    Attributes:
        ping_qps: Empty answers of a FastAPI route a second.
        neighbours_qps: Searches for one embedding a second, as many connections.
        ratio_to_ping: Of the two.
        ratio_to_bare: To empty answers of an ASGI function.
        ratio_to_carried: To the same, asked with the embedding, which it reads and throws away.
        batch_rows_per_s: Embeddings a second through the batch endpoint.
        in_process_rows_per_s: The same retriever, same batches, in this process.
        ratio_to_in_process: Of the two.
        batch_ratio_to_carried: Of the batch endpoint to an ASGI function that only reads the same bodies.
        p50_ms: Of single searches at `load` of their rate.
        p99_ms: Likewise.
        p99_to_p50: Of the two.
        load: Share of `neighbours_qps`.
        num_failed: Answers other than 200, in everything.
    """

    ping_qps: float
    neighbours_qps: float
    ratio_to_ping: float
    ratio_to_bare: float
    ratio_to_carried: float
    batch_rows_per_s: float
    in_process_rows_per_s: float
    ratio_to_in_process: float
    batch_ratio_to_carried: float
    p50_ms: float
    p99_ms: float
    p99_to_p50: float
    load: float
    num_failed: int
    num_requests: int
    proxy: str
    batch: int
    batch_connections: int
    connections: int
    num_vectors: int
    num_cells: int
    dim: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For readers."""
        return "\n".join(
            [
                f"{self.num_vectors:,} x {self.dim} in {self.num_cells:,} cells behind the {self.proxy} proxy, "
                f"{self.connections} connections; {self.num_failed} of {self.num_requests:,} requests failed",
                f"  single searches    {self.neighbours_qps:,.0f} a second, {self.ratio_to_ping:.2f} of the empty ping "
                f"({self.ping_qps:,.0f}), {self.ratio_to_bare:.2f} without FastAPI, {self.ratio_to_carried:.2f} with "
                "the body",
                f"  batches of {self.batch:<7} {self.batch_rows_per_s:,.0f} rows a second over "
                f"{self.batch_connections} connections, {self.ratio_to_in_process:.2f} of the same in process "
                f"({self.in_process_rows_per_s:,.0f}), {self.batch_ratio_to_carried:.2f} of reading the same bodies",
                f"  at {self.load:.0%} load        p50 {self.p50_ms:.2f} ms, p99 {self.p99_ms:.2f} ms, "
                f"{self.p99_to_p50:.1f} times as much",
            ]
        )


def measure_serving(
    start: Callable[..., str],
    stop: Callable[[], object],
    *,
    proxy: str,
    port: int,
    num_vectors: int = 100_000,
    num_cells: int = 2000,
    dim: int = 768,
    batch: int = 256,
    connections: int = 8,
    batch_connections: int = 3,
    num_rounds: int = 5,
    num_requests: int = 400,
    load: float = 0.7,
    report: Callable[[str], object] = lambda _: None,
) -> ServeFigures:
    """Start a service of one replica on a running Ray, measure it and stop it.

    Args:
        start: `hedwig.serving.start`.
        stop: Ends what it started.
        proxy: What Ray has in front, for the record.
        port: Of loopback.
        num_vectors: N, references.
        num_cells: C.
        dim: D.
        batch: Rows of one request to the batch endpoint.
        connections: At once.
        batch_connections: Likewise, of the batch endpoint.
        num_rounds: In each of them everybody has a turn.
        num_requests: Of every turn with single searches and pings.
        load: Share of the reached rate at which latency is measured.
        report: Told what is going on.
    """
    with tempfile.TemporaryDirectory(prefix="hedwig-bench-") as scratch:
        report("making vectors")
        world = synthetic(num_vectors, dim, num_cells, 5, 1024)
        _build(world, Path(scratch), num_cells)
        report("starting the service")
        url = start(scratch, port=port, load=load_index, max_queued_requests=4 * connections, max_ongoing_requests=64)
        try:
            _ping_too()
            report("measuring")
            here = load_index(scratch)
            return asyncio.run(
                _measured(
                    url, world, here, proxy=proxy, batch=batch, connections=connections,
                    batch_connections=batch_connections, num_rounds=num_rounds, num_requests=num_requests, load=load,
                )
            )  # fmt: skip
        finally:
            stop()


def load_index(folder: str) -> Hedwig:
    """The locator of a replica: the search as a run has it, on one thread, with a head that was never trained."""
    import faiss
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    index = GeocellIndex.open(folder)
    torch.manual_seed(0)
    config = GeolocatorConfig(
        image_dim=index.dim, text_dim=1, use_text=False, projection_dim=index.dim, num_cells=index.num_cells
    )
    places = np.zeros(index.num_cells)
    retriever = Retriever(in_halves(Geolocator(config)), index, places, places, embedding="image")
    return Hedwig(retriever, slicing=Slicing(), embedder=_no_images)


def _no_images(batch: dict[str, Any]) -> dict[str, Any]:
    raise ValueError("this service searches stored embeddings only.")


def _build(world: World, folder: Path, num_cells: int) -> None:
    def blocks() -> Iterator[tuple[Any, ...]]:
        for first in range(0, len(world.vectors), 65_536):
            some = slice(first, first + 65_536)
            names = [f"{n:09d}" for n in range(first, first + len(world.vectors[some]))]
            places = np.zeros(len(names))
            yield world.vectors[some], world.cells[some], names, places, places

    GeocellIndex.build_streamed(blocks(), folder, num_cells=num_cells, codec="fp16")


def _ping_too() -> None:
    """The applications beside it."""
    from fastapi import FastAPI
    from ray import serve

    empty = FastAPI()

    @empty.get("/")
    async def ping() -> dict[str, str]:
        return {}

    for prefix, app in ((_PING, serve.ingress(empty)(_Ping)), (_BARE, serve.ingress()(_Bare))):
        deployment = serve.deployment(
            name=prefix[1:], num_replicas=1, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.0}
        )(app)
        serve.run(deployment.bind(), name=f"hedwig{prefix.replace('/', '-')}", route_prefix=prefix)


class _Ping:
    """What Serve hangs a FastAPI application on."""


class _Bare:
    """A replica that reads what it is sent and answers two bytes, in the form that the real one has."""

    def __serve_build_asgi_app__(self) -> Any:
        return _two_bytes


async def _two_bytes(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":  # nothing to begin, nothing to end; but Serve wants to be told so
        while True:
            event = (await receive())["type"]
            await send({"type": f"{event}.complete"})
            if event == "lifespan.shutdown":
                return
    if scope["method"] == "POST":
        while (await receive()).get("more_body", False):
            pass
    headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})


async def _measured(
    url: str,
    world: World,
    here: Hedwig,
    *,
    proxy: str,
    batch: int,
    connections: int,
    batch_connections: int,
    num_rounds: int,
    num_requests: int,
    load: float,
) -> ServeFigures:
    ping, bare = [_request(url, "GET", f"{_PING}/")], [_request(url, "GET", _BARE)]
    path = f"/v1/neighbours?top_k={_TOP_K}"
    rows = np.ascontiguousarray(world.queries, dtype="<f4")
    single = [_request(url, "POST", path, row.tobytes()) for row in rows[:256]]
    batches = [np.take(rows, np.arange(n, n + batch), axis=0, mode="wrap") for n in range(0, 4 * batch, batch)]
    carried = [_request(url, "POST", _BARE, row.tobytes()) for row in rows[:256]]
    many = [_request(url, "POST", path, some.tobytes()) for some in batches]
    carried_many = [_request(url, "POST", _BARE, some.tobytes()) for some in batches]
    failed = total = 0
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    num_batches = max(4, num_requests // 10)  # long enough that the first and the last do not count
    async with _Connections(url, connections) as pool, _Connections(url, batch_connections) as batch_pool:
        for _ in range(2):
            await pool.flood(ping + bare + carried + single, _WARM_UP)
            await batch_pool.flood(many + carried_many, 4)
        for number in range(num_rounds):
            turns = [
                ("ping", ping, num_requests), ("single", single, num_requests), ("bare", bare, num_requests),
                ("carried", carried, num_requests), ("batch", many, num_batches),
                ("carried batch", carried_many, num_batches),
            ]  # fmt: skip
            for name, requests, count in turns[:: 1 if number % 2 else -1]:
                taken, bad = await (batch_pool if name.endswith("batch") else pool).flood(requests, count)
                seconds[name].append(taken / count)
                failed, total = failed + bad, total + count
            began = time.perf_counter()
            for n in range(num_batches):
                here.neighbours({"image_embedding": batches[n % len(batches)]}, _TOP_K)
            seconds["here"].append((time.perf_counter() - began) / num_batches)
    rate = 1.0 / statistics.median(seconds["single"])
    async with _Connections(url, _LOAD_CONNECTIONS * connections) as load_pool:
        await load_pool.flood(single, _WARM_UP)
        num = max(num_requests * num_rounds, round(_PACED_S * load * rate))
        latencies, bad = await load_pool.paced(single, load * rate, num)
    p50, p99 = (1000 * float(np.percentile(latencies, q)) for q in (50, 99))
    return ServeFigures(
        ping_qps=1.0 / statistics.median(seconds["ping"]),
        neighbours_qps=rate,
        ratio_to_ping=_ratio(seconds["ping"], seconds["single"]),
        ratio_to_bare=_ratio(seconds["bare"], seconds["single"]),
        ratio_to_carried=_ratio(seconds["carried"], seconds["single"]),
        batch_rows_per_s=batch / statistics.median(seconds["batch"]),
        in_process_rows_per_s=batch / statistics.median(seconds["here"]),
        ratio_to_in_process=_ratio(seconds["here"], seconds["batch"]),
        batch_ratio_to_carried=_ratio(seconds["carried batch"], seconds["batch"]),
        p50_ms=p50,
        p99_ms=p99,
        p99_to_p50=p99 / p50,
        load=load,
        num_failed=failed + bad,
        num_requests=total + len(latencies),
        proxy=proxy,
        batch=batch,
        batch_connections=batch_connections,
        connections=connections,
        num_vectors=len(world.vectors),
        num_cells=len(world.starts) - 1,
        dim=rows.shape[1],
    )


def _ratio(reference: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(reference, ours, strict=True))


def _request(url: str, method: str, path: str, body: bytes = b"") -> bytes:
    kind = "Content-Type: application/octet-stream\r\n" if body else ""
    head = f"{method} {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n{kind}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class _Connections:
    """Open connections to one address, each with one request under way at most."""

    def __init__(self, url: str, num: int) -> None:
        parts = urlsplit(url)
        self._host, self._port, self._num = parts.hostname or "127.0.0.1", parts.port or 80, num
        self._open: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> _Connections:
        self._open = [await asyncio.open_connection(self._host, self._port) for _ in range(self._num)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for _reader, writer in self._open:
            writer.close()

    async def flood(self, requests: Sequence[bytes], num: int) -> tuple[float, int]:
        """Send `num` requests as fast as they are answered; the seconds, and how many failed."""
        numbers = iter(range(num))

        async def one(which: int) -> int:
            bad = 0
            for n in numbers:
                bad += await self._ask(which, requests[n % len(requests)]) != 200
            return bad

        began = time.perf_counter()
        bad = sum(await asyncio.gather(*(one(which) for which in range(self._num))))
        return time.perf_counter() - began, bad

    async def paced(self, requests: Sequence[bytes], rate: float, num: int) -> tuple[list[float], int]:
        """Send `num` requests at `rate` a second; seconds from when each was due, and how many failed."""
        numbers = iter(range(num))
        latencies: list[float] = []
        began = time.perf_counter()

        async def one(which: int) -> int:
            bad = 0
            for n in numbers:
                due = began + n / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                bad += await self._ask(which, requests[n % len(requests)]) != 200
                latencies.append(time.perf_counter() - due)
            return bad

        return latencies, sum(await asyncio.gather(*(one(which) for which in range(self._num))))

    async def _ask(self, which: int, request: bytes) -> int:
        """The status of the answer; 0 when the connection was lost, which is opened again."""
        stream, writer = self._open[which]
        try:
            writer.write(request)
            await writer.drain()
            head = (await stream.readuntil(b"\r\n\r\n")).lower()
            fields = dict(line.split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
            if b"content-length" in fields:
                await stream.readexactly(int(fields[b"content-length"]))
            else:  # chunked
                while size := int(await stream.readline(), 16):
                    await stream.readexactly(size + 2)
                await stream.readline()
            return int(head.split(b" ", 2)[1])
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
            self._open[which] = await asyncio.open_connection(self._host, self._port)
            return 0
