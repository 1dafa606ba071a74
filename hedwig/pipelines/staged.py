"""The folder of a table that is being made: what each run wrote aside, what is settled, and who may go on.

Every run writes below ``.staging/<epoch>/`` and keeps Ray's checkpoint in ``.checkpoint/<epoch>/``, the epoch being its
own. Workers of a killed driver live on for seconds and may still commit files, but only under their own, dead epoch:
the next run takes what is whole of it once, at its start, drops ids that it already has, and ignores what comes later.
``.epoch`` names the run that the folder belongs to; an older one that is still alive finds another name there and stops
before it publishes. A staged file always makes the same two files, the part and its rejected rows, so that settling may
itself be killed and begun again.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hedwig import storage
from hedwig.faults import retried
from hedwig.pipelines.chain import FAILURE
from hedwig.schema import REJECTED

__all__ = [
    "Counts", "Staged", "TakenOver", "audit", "num_rows", "open_parquet", "part_files", "read_part",
]  # fmt: skip

STAGING, CHECKPOINT, EPOCH = ".staging", ".checkpoint", ".epoch"


class TakenOver(RuntimeError):
    """Another run of the same work began while this one was at it, and the folder is the other's now."""


@dataclass(frozen=True)
class Counts:
    """Rows of a folder: `out` in its parts, `rejected` beside them, how many for each reason, and one whole reason."""

    out: int
    rejected: int
    reasons: dict[str, int]
    example: str


def part_files(folder: str) -> list[str]:
    """The files of a table; while it is being made, and has no manifest, all that are there."""
    return storage.table_files(folder)


def open_parquet(path: str) -> Any:
    """A file that pyarrow.parquet can read."""
    fs, inner = storage.filesystem(path)
    return fs.open_input_file(inner)


@retried
def read_part(path: str, columns: list[str] | None = None) -> pa.Table:
    """A whole Parquet file; a body that was cut short is read again, which pyarrow's own client does not do."""
    return pq.read_table(open_parquet(path), columns=columns)


@retried
def num_rows(path: str) -> int:
    """Rows of a Parquet file, from its footer."""
    return int(pq.read_metadata(open_parquet(path)).num_rows)


class Staged:
    """One run's hold on a folder.

    Args:
        folder: of the result.
        kind: of the artefact, for the rejected rows.
        schema: columns of the result.
    """

    def __init__(self, folder: str, kind: str, schema: pa.Schema) -> None:
        self.folder, self.kind, self.schema = folder, kind, schema
        self.epoch = f"{time.time_ns():x}-{uuid.uuid4().hex[:8]}"
        storage.write_bytes(storage.join(folder, EPOCH), self.epoch.encode())

    @property
    def staging(self) -> str:
        """Where this run writes."""
        return storage.join(self.folder, STAGING, self.epoch)

    @property
    def checkpoint(self) -> str:
        """Where Ray notes the ids that this run need not do, or has done."""
        return storage.join(self.folder, CHECKPOINT, self.epoch)

    def check(self) -> None:
        """Raise TakenOver when the folder has become another run's."""
        path = storage.join(self.folder, EPOCH)
        found = storage.read_bytes(path).decode() if storage.exists(path) else "none"
        if found != self.epoch:
            raise TakenOver(
                f"{self.folder} was taken over by another run of the same command (epoch {found}, this one is "
                f"{self.epoch}); nothing is lost, the other one goes on. Run one at a time."
            )

    def settle(self) -> set[str]:
        """Bring what earlier runs left into order, and note it for Ray; returns the ids that are done.

        Rows that were rejected get another chance: storage may have been down.
        """
        storage.delete(storage.join(self.folder, "rejected"))
        left = storage.join(self.folder, STAGING)
        for path in storage.list_files(left, suffix=".parquet", recursive=True):
            try:
                num_rows(path)
            except (pa.ArrowInvalid, FileNotFoundError):
                storage.delete(path)  # cut off by a kill, so never committed
        self._take(storage.list_files(left, suffix=".parquet", recursive=True), rejected=False)
        for leftover in (STAGING, CHECKPOINT):
            storage.delete(storage.join(self.folder, leftover))
        tables = [read_part(path, ["pano_id"]) for path in part_files(self.folder)]
        if not tables:
            return set()
        done = pa.concat_tables(tables)
        storage.write_table(storage.join(self.checkpoint, "settled.parquet"), done)
        return set(done["pano_id"].to_pylist())

    def publish(self) -> Counts:
        """Turn what this run staged into parts and rejected rows, and count all that is there."""
        self.check()
        self._take(storage.list_files(self.staging, suffix=".parquet"), rejected=True)
        num_out = sum(num_rows(f) for f in part_files(self.folder))
        files = storage.list_files(storage.join(self.folder, "rejected"), suffix=".parquet")
        texts = [t for file in files for t in read_part(file, ["reason"])[0].to_pylist()]
        reasons = Counter(text.split(":")[0] for text in texts)
        return Counts(num_out, len(texts), dict(reasons.most_common()), texts[0] if texts else "")

    def clear(self) -> None:
        """Remove what only unfinished work needs, late files of dead epochs too."""
        for leftover in (STAGING, CHECKPOINT, EPOCH):
            storage.delete(storage.join(self.folder, leftover))

    def _take(self, staged: list[str], *, rejected: bool) -> None:
        if not staged:
            return
        rejected_folder = storage.join(self.folder, "rejected")
        holder: dict[str, str] = {}  # which file holds an id
        for path in part_files(self.folder):
            ids = read_part(path, ["pano_id"])["pano_id"].to_pylist()
            holder.update(dict.fromkeys(ids, os.path.basename(path)))
        for path in staged:
            table, name = read_part(path), f"part-{os.path.basename(path)}"
            ids = table["pano_id"].to_pylist()
            failed = pc.is_valid(table[FAILURE])
            keep = [holder.get(i, name) == name for i in ids]
            table = table.filter(pa.array(keep)) if not all(keep) else table
            failed = failed.filter(pa.array(keep)) if not all(keep) else failed
            good = table.filter(pc.invert(failed)).select(self.schema.names).cast(self.schema)
            if good.num_rows:
                storage.write_table(storage.join(self.folder, name), good)
                holder.update(dict.fromkeys(good["pano_id"].to_pylist(), name))
            bad = table.filter(failed)
            if bad.num_rows and rejected:
                storage.write_table(storage.join(rejected_folder, name), _rejections(bad, self.kind))
                holder.update(dict.fromkeys(bad["pano_id"].to_pylist(), name))
            storage.delete(path)


def _rejections(bad: pa.Table, kind: str) -> pa.Table:
    size = bad.num_rows
    uris = bad["image_uri"] if "image_uri" in bad.column_names else pa.nulls(size, pa.string())
    return pa.table(
        [bad["pano_id"], uris, pa.nulls(size, pa.int64()), pa.array([kind] * size), bad[FAILURE]], schema=REJECTED
    )


def audit(folder: str, kind: str, ids: set[str]) -> None:
    """Compare the ids on disk with the ids asked for, one by one.

    Raises:
        RuntimeError: an id is lost, there twice, or unknown.
    """
    seen: Counter[str] = Counter()
    for place in (folder, storage.join(folder, "rejected")):
        for path in storage.list_files(place, suffix=".parquet"):
            seen.update(read_part(path, ["pano_id"])["pano_id"].to_pylist())
    lost, doubled = ids - set(seen), [i for i, count in seen.items() if count > 1]
    strange = set(seen) - ids
    if lost or doubled or strange:
        raise RuntimeError(
            f"{kind}: the audit found {len(lost)} lost, {len(doubled)} doubled and {len(strange)} unknown ids "
            f"(e.g. {[*lost, *doubled, *strange][:3]}). Delete {folder} and run again; please report this."
        )
