"""Searches that are there at the same moment, done as one.

The geolocator reads its weights once for a batch and once for a single embedding, and the index reads a cell once for
all that ask for it, so five requests that arrived together cost little more than one. Nobody waits for somebody who has
not come: a search runs some turns of the event loop later, microseconds where there is nothing else to do, with
whatever else has arrived meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Together"]

Columns = Mapping[str, NDArray[Any]]
Answer = Mapping[str, Sequence[Any]]

_MOST_ROWS = 64  # at once: the loop does nothing else meanwhile
_TURNS = 3  # of the loop: what has reached a socket by now is read in the next, begun in the second, here by the third


@dataclass(frozen=True, eq=False)
class _Call:
    kind: Hashable
    columns: Columns
    search: Callable[[Columns], Answer]
    answer: asyncio.Future[tuple[Answer, float]]

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.columns.values())))


class Together:
    """Calls to searches, of each event loop by itself.

    Args:
        count: Told the rows of every search that succeeded.
    """

    def __init__(self, count: Callable[[int], object] = lambda _: None) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, list[_Call]] = {}
        self._count = count

    async def search(
        self, kind: Hashable, columns: Columns, search: Callable[[Columns], Answer]
    ) -> tuple[Answer, float]:
        """What `search` answers for these columns, and the seconds that it took, with others of its kind.

        Args:
            kind: searches of one kind are the same function, and their columns can be put one after the other.
            columns: each with B rows; B is at least 1.
            search: called on this loop; of its answer every value has an entry for each row.

        Raises:
            Whatever `search` raises for these columns alone.
        """
        loop = asyncio.get_running_loop()
        call = _Call(kind, columns, search, loop.create_future())
        waiting = self._waiting.setdefault(loop, [])
        waiting.append(call)
        if len(waiting) == 1:
            loop.call_soon(self._run, loop, _TURNS)
        return await call.answer

    def _run(self, loop: asyncio.AbstractEventLoop, turns: int) -> None:
        if turns:
            loop.call_soon(self._run, loop, turns - 1)
            return
        calls = [call for call in self._waiting.pop(loop) if not call.answer.done()]  # else its caller has gone
        calls.sort(key=lambda call: hash(call.kind))
        for _, some in groupby(calls, key=lambda call: call.kind):
            group: list[_Call] = []
            num_rows = 0
            for call in some:
                if group and num_rows + call.num_rows > _MOST_ROWS:
                    self._search(group)
                    group, num_rows = [], 0
                group.append(call)
                num_rows += call.num_rows
            self._search(group)

    def _search(self, calls: list[_Call]) -> None:
        """One search for all calls; where that fails, each alone, so that the fault finds whose it is."""
        first, began = calls[0], time.perf_counter()
        try:
            if len(calls) == 1:
                found = first.search(first.columns)
            else:
                names = first.columns
                found = first.search({name: np.concatenate([call.columns[name] for call in calls]) for name in names})
        except Exception as error:
            if len(calls) == 1:
                first.answer.set_exception(error)
                return
            for call in calls:
                self._search([call])
            return
        seconds, start = time.perf_counter() - began, 0
        for call in calls:
            stop = start + call.num_rows
            call.answer.set_result(({name: column[start:stop] for name, column in found.items()}, seconds))
            start = stop
        self._count(start)
