"""The client that measures the service, against a server of a few lines; and the locator that is measured."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from hedwig.benchmark.contenders import synthetic
from hedwig.benchmark.serve import _build, _Connections, _request, load_index


def served(answers, ask):
    """Run `ask(url)` while a server gives `answers` in turn; None hangs up instead."""

    async def run():
        waiting = iter(answers)

        async def handle(reader, writer):
            while head := await reader.readline():
                while (line := await reader.readline()) != b"\r\n":
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                await reader.readexactly(length)
                assert head.startswith((b"GET /ping", b"POST /x"))
                answer = next(waiting)
                if answer is None:
                    break
                writer.write(answer)
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            return await ask(f"http://{host}:{port}")

    return asyncio.run(run())


GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n"


def test_every_answer_is_counted_and_a_lost_connection_is_a_failure():
    async def ask(url):
        async with _Connections(url, 1) as pool:
            _, bad = await pool.flood([_request(url, "GET", "/ping"), _request(url, "POST", "/x", b"abc")], 6)
            return bad

    assert served([GOOD, CHUNKED, BUSY, GOOD, None, GOOD], ask) == 2


def test_latency_counts_from_when_a_request_was_due():
    async def ask(url):
        async with _Connections(url, 1) as pool:
            latencies, bad = await pool.paced([_request(url, "GET", "/ping")], 1e6, 50)
            return latencies, bad

    latencies, bad = served([GOOD] * 50, ask)
    assert bad == 0
    assert len(latencies) == 50
    assert latencies[-1] > latencies[0]  # one connection, all due at once: the last waited for all the others


def test_the_measured_locator_searches_what_was_built(tmp_path: Path):
    world = synthetic(2000, 16, 10, 5, 32)
    _build(world, tmp_path, 10)
    hedwig = load_index(str(tmp_path))
    found = hedwig.neighbours({"image_embedding": world.vectors[:3]}, 1, cells=np.repeat(world.cells[:3, None], 1, 1))
    assert found["neighbour_ids"] == [["000000000"], ["000000001"], ["000000002"]]
    assert len(hedwig.neighbours({"image_embedding": world.queries}, 5)["cell_ids"][0]) == 5
