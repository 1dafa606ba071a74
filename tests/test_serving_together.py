"""Searches of the same moment as one: everybody gets his own answer, and his own refusal."""

from __future__ import annotations

import asyncio
import base64
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from tests_serving import FakeLocator

from hedwig.serving import Limits, create_app
from hedwig.serving import together as module
from hedwig.serving.together import Together


class Doubling:
    """A search that doubles, and remembers what it was asked; it refuses a number of thirteen."""

    def __init__(self):
        self.asked = []

    def __call__(self, columns):
        numbers = columns["numbers"].tolist()
        self.asked.append(numbers)
        if 13 in numbers:
            raise ValueError("thirteen")
        return {"doubled": [2 * n for n in numbers]}


def columns(*numbers):
    return {"numbers": np.array(numbers)}


def run(calls):
    async def all_at_once():
        return await asyncio.gather(*calls, return_exceptions=True)

    return [one if isinstance(one, BaseException) else one[0]["doubled"] for one in asyncio.run(all_at_once())]


def test_calls_of_one_moment_are_one_search_and_each_has_its_own_rows():
    sizes = []
    search, together = Doubling(), Together(sizes.append)
    found = run([together.search("a", columns(1), search), together.search("a", columns(2, 3), search)])
    assert (found, search.asked) == ([[2], [4, 6]], [[1, 2, 3]])
    assert run([together.search("a", columns(4), search)]) == [[8]]
    assert (search.asked[1:], sizes) == ([[4]], [3, 1])


def test_what_differs_in_kind_is_searched_apart():
    one, other, together = Doubling(), Doubling(), Together()
    kinds = [("a", one), ("b", other), ("a", one), ("b", other)]
    found = run([together.search(kind, columns(n), search) for n, (kind, search) in enumerate(kinds)])
    assert found == [[0], [2], [4], [6]]
    assert (one.asked, other.asked) == ([[0, 2]], [[1, 3]])


def test_a_fault_is_told_to_whom_it_belongs():
    search, together = Doubling(), Together()
    good, bad, last = run([together.search("a", columns(n), search) for n in (1, 13, 2)])
    assert (good, last) == ([2], [4])
    assert isinstance(bad, ValueError)
    assert search.asked == [[1, 13, 2], [1], [13], [2]]


def test_a_caller_who_has_gone_is_not_searched_for():
    search, together = Doubling(), Together()

    async def leaves():
        gone = asyncio.ensure_future(together.search("a", columns(1), search))
        stays = asyncio.ensure_future(together.search("a", columns(2), search))
        asyncio.get_running_loop().call_soon(gone.cancel)
        await asyncio.sleep(0)  # both have asked, and are not yet searched for
        gone.cancel()
        return await stays

    assert asyncio.run(leaves())[0] == {"doubled": [4]}
    assert search.asked == [[2]]


def test_loops_of_several_threads_do_not_wait_for_each_other():
    search, together = Doubling(), Together()

    def ask(first):
        calls = (together.search("a", columns(number), search) for number in range(first, first + 50))
        return run(calls)

    with ThreadPoolExecutor(8) as pool:
        for first, found in enumerate(pool.map(ask, range(200), timeout=60)):
            assert found == [[2 * number] for number in range(first, first + 50)] or 13 in range(first, first + 50)
    assert together._waiting == {}


def test_one_search_has_so_many_rows_and_no_more(monkeypatch):
    monkeypatch.setattr(module, "_MOST_ROWS", 4)
    search, together = Doubling(), Together()
    sizes = (3, 2, 2, 7, 1)
    found = run([together.search("a", columns(*range(size)), search) for size in sizes])
    assert [len(one) for one in found] == list(sizes)
    assert [len(one) for one in search.asked] == [3, 4, 7, 1]


@pytest.mark.parametrize("cells", [None, [0, 2]])
def test_requests_of_one_moment_are_answered_as_they_are_alone(cells):
    locator = FakeLocator()
    app = create_app(locator, limits=Limits(max_ongoing_requests=16))
    vectors = np.random.default_rng(0).random((6, 4)).astype(np.float32)
    bodies = [{"embedding": row.tolist(), "cells": cells} for row in vectors[:4]]
    bodies += [{"embeddings": base64.b64encode(vectors[4:].tobytes()).decode(), "cells": cells and [cells] * 2}]
    bodies += [{"embedding": vectors[0].tolist(), "cells": [0, 3]}]  # there is no cell 3

    async def ask():
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            url = "http://127.0.0.1/v1/neighbours?top_k=2"
            together = await asyncio.gather(*(client.post(url, json=body) for body in bodies))
            first = len(locator.searched)
            return together, first, [await client.post(url, json=body) for body in bodies]

    together, num_searches, alone = asyncio.run(ask())
    assert [one.status_code for one in together] == [200] * 5 + [400]
    counted = re.search(
        r'hedwig_batch_size_sum\{[^}]*route="/v1/neighbours"\} (\S+)', app.state.service.metrics.text().decode()
    )
    assert float(counted[1]) == 2 * 6  # what was refused is not counted
    for one, other in zip(together, alone, strict=True):
        assert {**one.json(), "timings_ms": 0} == {**other.json(), "timings_ms": 0}
    if cells is None:
        assert num_searches == 1  # the one with cells is of another kind, and refused
        np.testing.assert_array_equal(locator.searched[0][0], vectors)
    else:  # all are of one kind, and one of them is wrong
        assert num_searches == 5
