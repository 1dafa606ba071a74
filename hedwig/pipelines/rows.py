"""One table in, one table out, exactly once per row: Ray Data's checkpoint below, an audit of the ids on top.

The flow is the one shape that Ray 2.60's checkpoint keeps exact: read Parquet -> one actor pool, or two
(`hedwig.pipelines.pools`) -> write Parquet, one row per panorama from end to end. Everything, failed rows too, is first
written aside, below an epoch of this run's own (`hedwig.pipelines.staged`); then the staged files become
``part-*.parquet`` and the failed rows ``rejected/part-*.parquet``, and the manifest follows. Killed at any point, the
same call first settles what it finds: whole staged files become parts, half ones are deleted, rows that were rejected
get another chance (storage may have been down), and the checkpoint is written anew from the ids that the parts really
hold. So what Ray skips is what is there, and an audit of all ids ends every run. A row that kills its worker is found
and rejected by `hedwig.pipelines.suspects`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hedwig import storage
from hedwig.config import EmbedConfig
from hedwig.pipelines.chain import Step, check_chain
from hedwig.pipelines.cluster import configure_data
from hedwig.pipelines.measured import Reporter, measured_record, meter_actor
from hedwig.pipelines.pools import Layout, lay_out, watched_plan
from hedwig.pipelines.reuse import Earlier, take_over
from hedwig.pipelines.staged import Staged, audit, num_rows, open_parquet, part_files
from hedwig.pipelines.suspects import suspects_actor

__all__ = ["RowsTask", "TooManyRejected", "enforce_max_rejected", "map_rows"]

logger = logging.getLogger(__name__)


class TooManyRejected(ValueError):
    """More rows were rejected than the experiment allows; the message has the counts and the commonest reasons."""


@dataclass(frozen=True)
class RowsTask:
    """What `map_rows` is to do.

    Attributes:
        kind: name of the artefact.
        source: folder of the input table.
        folder: folder of the result.
        steps: the stages.
        schema: columns of the result.
        config: settings that the result depends on, for the manifest.
        inputs: name -> manifest digest of the artefacts that the result depends on.
        pool: actors, batches, blocks.
        max_rejected: share (< 1) or count (>= 1) of rows that may be rejected.
        keep: splits of the source that take part; None means all.
        details: what else to write into the manifest, found out when all rows are there.
        skip: beginnings of the names of files that the manifest does not list; "rejected/" where rejected rows are
            tried again without making the artefact another one.
        timeout_s: the longest that one batch may take, and a row that is tried alone; None for ever.
        earlier: a table whose rows are taken over where they would come out the same.
    """

    kind: str
    source: str
    folder: str
    steps: Sequence[Step]
    schema: pa.Schema
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    pool: EmbedConfig
    max_rejected: float
    keep: Sequence[str] | None = None
    details: Callable[[], dict[str, Any]] | None = None
    skip: Sequence[str] = ()
    timeout_s: float | None = None
    earlier: Earlier | None = None


def map_rows(task: RowsTask, on_progress: Callable[..., None] | None = None) -> storage.Manifest:
    """Run the steps over every row of the source and publish the result; resumes what an earlier call began.

    Args:
        task: what to do.
        on_progress: called about once a second with (rows done, rows in all, rows rejected by this call).

    Raises:
        SchemaError: the steps do not fit together or to the source.
        TooManyRejected: more than ``max_rejected`` rows failed; what succeeded is kept for the next try.
    """
    started = time.monotonic()
    ids = _source_ids(task)
    _forget_other_work(task)
    staged = Staged(task.folder, task.kind, task.schema)
    done = staged.settle()
    if done:
        logger.info("%-9s resumed: %d/%d rows were done before", task.kind, len(done), len(ids))
    reused = _take_over(task, ids - done, staged)
    done |= reused
    details: dict[str, Any] = {"reused": len(reused)} if task.earlier is not None else {}
    if ids - done:
        details["measured"] = _measured_run(task, ids, done, staged, on_progress)
    counts = staged.publish()
    enforce_max_rejected(task.kind, counts.rejected, len(ids), task.max_rejected, counts.reasons, counts.example)
    audit(task.folder, task.kind, ids)
    staged.check()
    manifest = storage.publish(
        task.folder,
        kind=task.kind,
        config=task.config,
        inputs=task.inputs,
        num_in=len(ids),
        num_out=counts.out,
        num_rejected=counts.rejected,
        rejected_reasons=counts.reasons,
        details={**(task.details() if task.details is not None else {}), **details},
        seconds=time.monotonic() - started,
        skip=task.skip,
    )
    staged.clear()
    return manifest


def _take_over(task: RowsTask, wanted: set[str], staged: Staged) -> set[str]:
    """Put the rows that an earlier table has into the folder, and their ids among those that Ray need not do."""
    if task.earlier is None or not wanted:
        return set()
    written = {name for step in task.steps for name in step.stage.writes}
    there = _source_schema(task).names
    source = storage.read_table(task.source, list(dict.fromkeys(
        ["pano_id", *(n for n in task.schema.names if n in there and n not in written), *task.earlier.read]
    )))  # fmt: skip
    source = source.filter(pc.is_in(source["pano_id"], pa.array(sorted(wanted))))
    taken = take_over(task.earlier, source, task.folder, task.schema)
    if taken:
        ids = pa.table([pa.array(sorted(taken))], schema=pa.schema([task.schema.field("pano_id")]))
        storage.write_table(storage.join(staged.checkpoint, "taken-over.parquet"), ids)
    logger.info("%-9s %d of %d rows are as before and were taken over", task.kind, len(taken), len(wanted))
    return taken


def _measured_run(
    task: RowsTask,
    ids: set[str],
    done: set[str],
    staged: Staged,
    on_progress: Callable[..., None] | None,
) -> dict[str, Any]:
    """Run the flow over the rows that are not done; returns what it took."""
    import ray

    layout = lay_out(task.kind, task.steps, task.schema, _source_schema(task), task.pool, len(ids))
    logger.info("%-9s %s", task.kind, layout.text())
    meter, began = meter_actor(), time.monotonic()
    with _watching(staged.staging, len(ids), len(done), meter, on_progress):
        operators = _run(task, layout, len(ids), staged, meter)
    totals, plan = ray.get(meter.totals.remote()), {"plan": layout.text(), "operators": operators}
    return measured_record(totals, time.monotonic() - began, layout.num_workers, plan)


def _source_schema(task: RowsTask) -> pa.Schema:
    return pq.read_schema(open_parquet(part_files(task.source)[0]))


def _source_ids(task: RowsTask) -> set[str]:
    table = storage.read_table(task.source, ["pano_id", "split"])
    check_chain(_source_schema(task).names, task.steps, task.schema.names)
    if task.keep is not None:
        table = table.filter(pc.is_in(table["split"], pa.array(list(task.keep))))
    return set(table["pano_id"].to_pylist())


def _forget_other_work(task: RowsTask) -> None:
    """Unfinished work of other settings must not be continued: a marker file says what the folder is being made for."""
    marker, wanted = storage.join(task.folder, ".asked"), storage.fingerprint(task.kind, task.config, task.inputs)
    found = storage.read_bytes(marker).decode() if storage.exists(marker) else None
    if found != wanted:
        storage.delete(task.folder)
        storage.write_bytes(marker, wanted.encode())
    storage.delete(storage.join(task.folder, storage.MANIFEST))


def _run(task: RowsTask, layout: Layout, num_rows: int, staged: Staged, meter: Any) -> list[str]:
    """The Ray Data flow itself; returns the names of the operators that Ray made of it."""
    import ray
    from ray.data import ActorPoolStrategy

    fs, staging = storage.filesystem(staged.staging)
    checkpoint = storage.filesystem(staged.checkpoint)[1]
    remote = storage.is_remote(task.folder)
    configure_data(checkpoint=checkpoint, filesystem=fs if remote else None)
    _check_cpus(layout)
    size = task.pool.rows_per_block
    suspects = [suspects_actor(pool.most, task.timeout_s) for pool in layout.pools]
    blocks = max(-(-num_rows // size), min(2 * max(pool.most for pool in layout.pools), num_rows))
    try:
        with watched_plan(layout) as operators:
            rows = ray.data.read_parquet(
                [storage.filesystem(f)[1] for f in part_files(task.source)],
                filesystem=storage.filesystem(task.source)[0],
                override_num_blocks=blocks,
            )
            if task.keep is not None:
                rows = rows.map_batches(_Keep(tuple(task.keep)), batch_format="pyarrow", batch_size=None)
            for pool, notes in zip(layout.pools, suspects, strict=True):
                rows = rows.map_batches(
                    pool.chain,
                    fn_constructor_kwargs={
                        "steps": list(pool.steps),
                        "schema": pool.schema,
                        "suspects": notes,
                        "timeout_s": task.timeout_s,
                        "make_report": partial(Reporter, task.kind, meter),
                        "batch_size": pool.batch_size,
                        "read_ahead": pool.read_ahead,
                    },
                    batch_format="pyarrow",
                    batch_size=pool.call_rows(-(-num_rows // blocks)),
                    num_cpus=pool.num_cpus,
                    num_gpus=pool.num_gpus or None,
                    compute=ActorPoolStrategy(min_size=pool.least, max_size=pool.most),
                )
            # A block of frames is a fraction of what one read brings, and a file is to hold as many rows as ever.
            rows.write_parquet(
                staging, filesystem=fs if remote else None, min_rows_per_file=size if len(layout.pools) > 1 else None
            )
    finally:
        configure_data()
    return operators


class _Keep:
    """Keep the rows of some splits; a class of its own, so that Ray can name it in its plan."""

    def __init__(self, splits: tuple[str, ...]) -> None:
        self.splits = splits

    def __call__(self, table: pa.Table) -> pa.Table:
        return table.filter(pc.is_in(table["split"], pa.array(list(self.splits))))


def _check_cpus(layout: Layout) -> None:
    import ray

    available = ray.cluster_resources().get("CPU", 0.0)
    needed = sum(pool.least * pool.num_cpus for pool in layout.pools) + 2
    if available < needed:
        raise ValueError(
            f"{' and '.join(f'{pool.least} actors of {pool.num_cpus:g} CPUs' for pool in layout.pools)}, a reader and "
            f"the checkpoint filter need {needed:g} CPUs, and Ray has {available:g}: it would wait for ever. Lower "
            "embed.num_actors, embed.num_cpus or embed.decode_workers, or raise cluster.num_cpus of a local Ray."
        )


@contextmanager
def _watching(
    staging: str, total: int, before: int, meter: Any, on_progress: Callable[..., None] | None
) -> Iterator[None]:
    """Count the committed and the rejected rows once a second while the block runs."""
    import ray

    if on_progress is None:
        yield
        return
    stop = threading.Event()

    def watch() -> None:
        counted: dict[str, int] = {}
        while not stop.wait(1.0):
            try:
                for path in storage.list_files(staging, suffix=".parquet"):
                    if path not in counted:
                        counted[path] = num_rows(path)
                rejected = int(ray.get(meter.totals.remote(), timeout=5.0).get("rejected", 0))
            except (OSError, pa.ArrowInvalid, ray.exceptions.RayError):
                continue  # a file that is being written, or an actor that starts again: at the next look
            on_progress(min(before + sum(counted.values()), total), total, rejected)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def enforce_max_rejected(
    kind: str,
    num_rejected: int,
    num_in: int,
    max_rejected: float,
    reasons: Mapping[str, int],
    example: str = "",
    *,
    where: str | None = None,
    setting: str = "data.max_rejected",
) -> None:
    """Raise TooManyRejected when the limit, a share below 1 or else a count, is passed."""
    limit = max_rejected * num_in if max_rejected < 1 else max_rejected
    if num_rejected > limit:
        commonest = "; ".join(f"{count} x {reason}" for reason, count in list(reasons.items())[:5])
        raise TooManyRejected(
            f"{kind}: {num_rejected} of {num_in} rows were rejected, and {setting}={max_rejected:g} allows "
            f"{int(np.floor(limit))}. Commonest reasons: {commonest}."
            + (f" For example: {example}." if example else "")
            + f" Every rejected row stands in {where or f'{kind}/rejected/'}. Mend the input, or raise {setting}."
        )
