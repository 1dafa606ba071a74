"""Rows that kill the process that works on them: found, tried alone, and rejected, while their neighbours go on.

A segmentation fault, ``os._exit`` or a lack of memory cannot be caught, and Ray Data starts the worker again with the
same batch for ever. So each worker says in a small Ray actor which ids it is about to work on, and says so again when
it is done. Where ids are begun again without having been done, their worker died over them. That may have been chance,
so the batch is tried once more as it is; after the second death it is worked on row by row, and a row that was alone in
`MAX_DEATHS` workers that died is rejected. A batch or row that takes longer than its time ends its worker too, by a
timer in C that no thread can hold up. The notes live in memory beside the driver and die with it, on any storage: the
next run finds the row again. Where workers die again and again and nothing is done in between, no row is to blame, and
the job stops.
"""

from __future__ import annotations

import faulthandler
import os
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

import pyarrow as pa

from hedwig.pipelines.chain import Chain, Step

__all__ = ["MAX_DEATHS", "DecodeChain", "GuardedChain", "Suspects", "WorkersKeepDying", "suspects_actor"]

MAX_DEATHS = 2  # in company before rows are tried alone, and alone before one is rejected
MAX_FRUITLESS_STARTS = 10  # beyond one for each actor of the pool


class WorkersKeepDying(RuntimeError):
    """Workers died again and again before any of them finished a row."""


class Suspects:
    """Who works on what, and what died of it; lives in an actor without CPUs.

    Args:
        num_actors: the most workers that there are at once.
        timeout_s: after which a worker ends itself, for the reason's text; None for never.
    """

    def __init__(self, num_actors: int = 1, timeout_s: float | None = None) -> None:
        self._most_starts = num_actors + MAX_FRUITLESS_STARTS
        self._timeout_s = timeout_s
        self._begun: dict[str, tuple[str, bool]] = {}  # pano_id -> its worker, and whether it is alone there
        self._in_company: Counter[str] = Counter()  # deaths of workers that held the row among others
        self._deaths: Counter[str] = Counter()  # of workers that held it alone
        self._starts = 0

    def start(self) -> str | None:
        """A worker begins its life; returns why it must not, or None."""
        self._starts += 1
        if self._starts <= self._most_starts:
            return None
        return (
            f"{self._starts - 1} workers died or were started again, and none finished a row in between. Look at the "
            "workers' logs: the model may not fit into memory, or a library may be broken."
        )

    def begin(self, worker: str, ids: Sequence[str]) -> tuple[bool, str | None]:
        """A worker is about to work on `ids` together.

        Returns:
            Whether it must try them one by one instead, and, for a single id, why it is rejected.
        """
        for name in ids:
            other, alone = self._begun.pop(name, (worker, False))
            if other != worker:
                (self._deaths if alone else self._in_company)[name] += 1
        if len(ids) == 1 and self._deaths[ids[0]] >= MAX_DEATHS:
            return False, self._reason(ids[0])
        if len(ids) > 1 and any(self._deaths[i] or self._in_company[i] >= MAX_DEATHS for i in ids):
            return True, None
        for name in ids:
            self._begun[name] = (worker, len(ids) == 1)
        return False, None

    def _reason(self, name: str) -> str:
        hung = f", or it took longer than {self._timeout_s:g} s" if self._timeout_s is not None else ""
        return (
            f"killed its worker {self._deaths[name]} times: the process ended while this row was alone in it "
            f"(a crash in a library, or out of memory{hung})"
        )

    def in_trouble(self, worker: str, ids: Sequence[str]) -> bool:
        """Whether a worker has died over one of them."""
        return any(
            self._deaths[i] or self._in_company[i] or self._begun.get(i, (worker, False))[0] != worker for i in ids
        )

    def done(self, ids: Sequence[str]) -> None:
        """They were worked on, and their worker is alive."""
        self._starts = 0
        for name in ids:
            self._begun.pop(name, None)
            self._in_company.pop(name, None)
            self._deaths.pop(name, None)

    def num_deaths(self) -> int:
        """Deaths of workers that hold one row each, of rows not yet done."""
        return sum(self._deaths.values())


def suspects_actor(num_actors: int, timeout_s: float | None) -> Any:
    """A `Suspects` in an actor of this driver. Its notes are lost with its node, and then made again."""
    import ray

    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Suspects)
    return remote.remote(num_actors, timeout_s)


class GuardedChain:
    """A `Chain` in a Ray worker that tells `suspects` what it does.

    Args:
        steps: as for `Chain`.
        schema: as for `Chain`.
        suspects: handle of the actor.
        timeout_s: the longest that a batch, or a row that is tried alone, may take; None for ever.
        make_report: makes, in the worker, what is called with the `Chain.spent` of each batch.
        batch_size: rows that are worked on together; None for all that a call brings.
        read_ahead: while one such batch is worked on, the images of so many of the next are being fetched. Where a
            worker has died over one of the call's rows, none are: it would not be known which batch it died of.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        schema: pa.Schema,
        suspects: Any,
        timeout_s: float | None = None,
        make_report: Callable[[], Callable[[Mapping[str, float]], None]] | None = None,
        batch_size: int | None = None,
        read_ahead: int = 0,
    ) -> None:
        self._suspects, self._timeout_s = suspects, timeout_s
        self._batch_size, self._read_ahead = batch_size, read_ahead
        self._worker = f"{os.getpid()}-{uuid.uuid4().hex}"
        reason = self._ask("start")
        if reason is not None:
            raise WorkersKeepDying(reason)
        self._chain = Chain(steps, schema)
        self._report = make_report() if make_report is not None else None

    def __call__(self, table: pa.Table) -> pa.Table:
        """(B,) rows in, (B,) rows out, in the same order."""
        size = self._batch_size or max(1, table.num_rows)
        batches = [table.slice(first, size) for first in range(0, table.num_rows, size)]
        if len(batches) < 2:
            return self._work(table)
        ahead, out = self._read_ahead, []
        begun: list[Future[None]] = []
        if ahead and self._ask("in_trouble", self._worker, table["pano_id"].to_pylist()):
            ahead = 0
        for number, batch in enumerate(batches):
            if ahead:
                begun += [self._chain.prefetch(later) for later in batches[len(begun) : number + 1 + ahead]]
                wait([begun[number]])  # what went wrong there goes wrong again below, where it gets a reason
            out.append(self._work(batch))
        if ahead:
            self._chain.prefetch(table.slice(0, 0))
        return pa.concat_tables(out)

    def _work(self, table: pa.Table) -> pa.Table:
        """What a call does; Ray Data calls from a thread of its own and waits, so a call inside a call never ends."""
        ids = table["pano_id"].to_pylist()
        one_by_one, reason = self._ask("begin", self._worker, ids)
        if reason is not None:
            self._suspects.done.remote([])
            self._tell({"rows": len(ids), "rejected": len(ids)})
            return self._chain.rejected(table, reason)
        if one_by_one:
            return pa.concat_tables([self._work(table.slice(row, 1)) for row in range(len(ids))])
        if self._timeout_s is not None:
            faulthandler.dump_traceback_later(self._timeout_s, exit=True)
        try:
            out = self._chain(table)
        finally:
            if self._timeout_s is not None:
                faulthandler.cancel_dump_traceback_later()
        self._suspects.done.remote(ids)
        self._tell(self._chain.spent)
        return out

    def _tell(self, spent: Mapping[str, float]) -> None:
        if self._report is not None:
            self._report(spent)

    def _ask(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self._suspects, method).remote(*arguments))


class DecodeChain(GuardedChain):
    """The part of a chain before the one that embeds: rows are counted where they leave the last one, so not here."""

    def _tell(self, spent: Mapping[str, float]) -> None:
        super()._tell({name: value for name, value in spent.items() if name not in ("rows", "rejected")})
