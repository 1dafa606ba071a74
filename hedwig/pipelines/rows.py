"""One table in, one table out, exactly once per row: Ray Data's checkpoint below, an audit of the ids on top.

The flow is the one shape that Ray 2.60's checkpoint keeps exact: read Parquet -> one actor pool -> write Parquet, one
row per panorama from end to end. Everything, failed rows too, is first written to ``<folder>/.staging``; then the
staged files become ``part-*.parquet`` and the failed rows ``rejected/part-*.parquet``, and the manifest follows. Killed
at any point, the same call first settles what it finds: whole staged files become parts, half ones are deleted, rows
that were rejected get another chance (storage may have been down), and the checkpoint is written anew from the ids that
the parts really hold. So what Ray skips is what is there, and an audit of all ids ends every run.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hedwig import storage
from hedwig.config import EmbedConfig
from hedwig.pipelines.chain import FAILURE, Chain, Step, check_chain
from hedwig.pipelines.cluster import configure_data
from hedwig.schema import REJECTED

__all__ = ["RowsTask", "TooManyRejected", "enforce_max_rejected", "map_rows"]

logger = logging.getLogger(__name__)
STAGING, CHECKPOINT = ".staging", ".checkpoint"


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


def map_rows(task: RowsTask, on_progress: Callable[[int, int], None] | None = None) -> storage.Manifest:
    """Run the steps over every row of the source and publish the result; resumes what an earlier call began.

    Raises:
        SchemaError: the steps do not fit together or to the source.
        TooManyRejected: more than ``max_rejected`` rows failed; what succeeded is kept for the next try.
    """
    started = time.monotonic()
    ids = _source_ids(task)
    staging = storage.join(task.folder, STAGING)
    _forget_other_work(task)
    done = _settle(task)
    if done:
        logger.info("%-9s resumed: %d/%d rows were done before", task.kind, len(done), len(ids))
    if ids - done:
        with _watching(staging, len(ids), len(done), on_progress):
            _run(task, len(ids))
    counts = _publish_files(task)
    enforce_max_rejected(task.kind, counts.rejected, len(ids), task.max_rejected, counts.reasons, counts.example)
    _audit(task, ids)
    manifest = storage.publish(
        task.folder,
        kind=task.kind,
        config=task.config,
        inputs=task.inputs,
        num_in=len(ids),
        num_out=counts.out,
        num_rejected=counts.rejected,
        rejected_reasons=counts.reasons,
        details=task.details() if task.details is not None else {},
        seconds=time.monotonic() - started,
        skip=task.skip,
    )
    for leftover in (STAGING, CHECKPOINT):
        storage.delete(storage.join(task.folder, leftover))
    return manifest


def _parts(folder: str) -> list[str]:
    return [f for f in storage.list_files(folder, suffix=".parquet") if os.path.basename(f).startswith("part-")]


def _source_ids(task: RowsTask) -> set[str]:
    table = storage.read_table(task.source, ["pano_id", "split"])
    fs, first = storage.filesystem(_parts(task.source)[0])
    check_chain(pq.read_schema(first, filesystem=fs).names, task.steps, task.schema.names)
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


def _settle(task: RowsTask) -> set[str]:
    """Bring an unfinished folder into order; returns the ids that are done."""
    for path in storage.list_files(storage.join(task.folder, STAGING), suffix=".parquet"):
        try:
            pq.read_metadata(*_where(path))
        except pa.ArrowInvalid:
            storage.delete(path)  # cut off by a kill, so never committed
    _publish_files(task)
    for leftover in (STAGING, CHECKPOINT, "rejected"):
        storage.delete(storage.join(task.folder, leftover))
    tables = [pq.read_table(*_where(path), columns=["pano_id"]) for path in _parts(task.folder)]
    if not tables:
        return set()
    done = pa.concat_tables(tables)
    storage.write_table(storage.join(task.folder, CHECKPOINT, "settled.parquet"), done)
    return set(done["pano_id"].to_pylist())


def _run(task: RowsTask, num_rows: int) -> None:
    """The Ray Data flow itself."""
    import ray
    from ray.data import ActorPoolStrategy

    pool = task.pool
    fs, staging = storage.filesystem(storage.join(task.folder, STAGING))
    checkpoint = storage.filesystem(storage.join(task.folder, CHECKPOINT))[1]
    remote = storage.is_remote(task.folder)
    configure_data(checkpoint=checkpoint, filesystem=fs if remote else None)
    _check_cpus(pool)
    actors = max(1, min(pool.max_actors or pool.num_actors, -(-num_rows // pool.rows_per_block)))
    blocks = max(-(-num_rows // pool.rows_per_block), min(2 * actors, num_rows))
    try:
        rows = ray.data.read_parquet(
            [storage.filesystem(f)[1] for f in _parts(task.source)],
            filesystem=storage.filesystem(task.source)[0],
            override_num_blocks=blocks,
        )
        if task.keep is not None:
            rows = rows.map_batches(_Keep(tuple(task.keep)), batch_format="pyarrow", batch_size=None)
        rows.map_batches(
            Chain,
            fn_constructor_kwargs={"steps": list(task.steps), "schema": task.schema},
            batch_format="pyarrow",
            batch_size=pool.batch_size,
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus or None,
            compute=ActorPoolStrategy(min_size=min(pool.num_actors, actors), max_size=actors),
        ).write_parquet(staging, filesystem=fs if remote else None)
    finally:
        configure_data()


class _Keep:
    """Keep the rows of some splits; a class of its own, so that Ray can name it in its plan."""

    def __init__(self, splits: tuple[str, ...]) -> None:
        self.splits = splits

    def __call__(self, table: pa.Table) -> pa.Table:
        return table.filter(pc.is_in(table["split"], pa.array(list(self.splits))))


def _check_cpus(pool: EmbedConfig) -> None:
    import ray

    available = ray.cluster_resources().get("CPU", 0.0)
    needed = pool.num_actors * pool.num_cpus + 2
    if available < needed:
        raise ValueError(
            f"{pool.num_actors} actors of {pool.num_cpus} CPUs, a reader and the checkpoint filter need {needed:g} "
            f"CPUs, and Ray has {available:g}: it would wait for ever. Lower embed.num_actors or embed.num_cpus."
        )


@contextmanager
def _watching(staging: str, total: int, before: int, on_progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """Count the committed rows once a second while the block runs."""
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
                        fs, inner = storage.filesystem(path)
                        counted[path] = pq.read_metadata(inner, filesystem=fs).num_rows
            except (OSError, pa.ArrowInvalid):
                continue  # a file that is being written; it counts at the next look
            on_progress(min(before + sum(counted.values()), total), total)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


@dataclass
class _Counts:
    out: int
    rejected: int
    reasons: dict[str, int]
    example: str


def _publish_files(task: RowsTask) -> _Counts:
    """Turn staged files into the table and its rejected rows; the same staged file always makes the same two files."""
    rejected_folder = storage.join(task.folder, "rejected")
    for path in storage.list_files(storage.join(task.folder, STAGING), suffix=".parquet"):
        fs, inner = storage.filesystem(path)
        table = pq.read_table(inner, filesystem=fs)
        name = f"part-{os.path.basename(path)}"
        failed = pc.is_valid(table[FAILURE])
        good = table.filter(pc.invert(failed)).select(task.schema.names).cast(task.schema)
        if good.num_rows:
            storage.write_table(storage.join(task.folder, name), good)
        bad = table.filter(failed)
        if bad.num_rows:
            storage.write_table(storage.join(rejected_folder, name), _rejections(bad, task.kind))
        storage.delete(path)
    num_out = sum(_num_rows(f) for f in _parts(task.folder))
    files = storage.list_files(rejected_folder, suffix=".parquet")
    texts = [t for file in files for t in pq.read_table(*_where(file), columns=["reason"])["reason"].to_pylist()]
    reasons = Counter(text.split(":")[0] for text in texts)
    return _Counts(num_out, len(texts), dict(reasons.most_common()), texts[0] if texts else "")


def _where(path: str) -> tuple[Any]:
    fs, inner = storage.filesystem(path)
    return (fs.open_input_file(inner),)


def _num_rows(path: str) -> int:
    fs, inner = storage.filesystem(path)
    return int(pq.read_metadata(inner, filesystem=fs).num_rows)


def _rejections(bad: pa.Table, kind: str) -> pa.Table:
    size = bad.num_rows
    uris = bad["image_uri"] if "image_uri" in bad.column_names else pa.nulls(size, pa.string())
    return pa.table(
        [bad["pano_id"], uris, pa.nulls(size, pa.int64()), pa.array([kind] * size), bad[FAILURE]], schema=REJECTED
    )


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


def _audit(task: RowsTask, ids: set[str]) -> None:
    """Compare the ids on disk with the ids asked for, one by one."""
    seen: Counter[str] = Counter()
    for folder in (task.folder, storage.join(task.folder, "rejected")):
        for path in storage.list_files(folder, suffix=".parquet"):
            seen.update(pq.read_table(*_where(path), columns=["pano_id"])["pano_id"].to_pylist())
    lost, doubled = ids - set(seen), [i for i, count in seen.items() if count > 1]
    strange = set(seen) - ids
    if lost or doubled or strange:
        raise RuntimeError(
            f"{task.kind}: the audit found {len(lost)} lost, {len(doubled)} doubled and {len(strange)} unknown ids "
            f"(e.g. {[*lost, *doubled, *strange][:3]}). Delete {task.folder} and run again; please report this."
        )
