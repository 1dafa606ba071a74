"""Embed a listing without an experiment: listing -> one embedding table, every row accounted for in its manifest.

The same stages as a run, in a hidden work folder below the table, so that a killed command goes on where it stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from hedwig import storage
from hedwig.config import Experiment
from hedwig.pipelines.caption import captions
from hedwig.pipelines.checks import check_encoders
from hedwig.pipelines.cluster import ray_running, use_storage
from hedwig.pipelines.encode import embeddings
from hedwig.pipelines.listing import panoramas
from hedwig.pipelines.run import Run

__all__ = ["embed_listing"]

_STAGES = ("panoramas", "caption", "embed")


def embed_listing(
    experiment: Experiment,
    out: str,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    check_images: Literal["stamps", "contents"] | None = None,
) -> storage.Manifest:
    """Write the embedding table of the experiment's listing into `out`.

    Args:
        experiment: its output is the work folder, inside `out`.
        out: folder of the table.
        progress: called with (stage, rows done, rows in all).
        check_images: see `hedwig.pipelines.run.Run`.

    Returns:
        The manifest of `out`: rows of the listing in, rows of the table out, and every rejected row of any stage.
    """
    use_storage(experiment.storage.model_dump())
    check_encoders(experiment, _STAGES)
    run = Run(experiment, progress=progress, check_images=check_images)
    with ray_running(experiment.cluster):
        made = [panoramas(run), captions(run), embeddings(run)]
    config = made[-1].config
    inputs = {**made[0].inputs, "embeddings": storage.manifest_digest(run.folder("embed"))}
    there = storage.read_manifest(out)
    if there is not None and there.fingerprint == storage.fingerprint("embeddings", config, inputs):
        return there
    _clear(out)
    for path in storage.table_files(run.folder("embed")):
        storage.write_bytes(storage.join(out, path.rsplit("/", 1)[-1]), storage.read_bytes(path))
    reasons: Counter[str] = Counter()
    for stage, manifest in zip(_STAGES, made, strict=True):
        reasons.update(manifest.rejected_reasons)
        rejected = storage.list_files(storage.join(run.folder(stage), "rejected"), suffix=".parquet")
        if rejected:
            table = pa.concat_tables([pq.read_table(pa.BufferReader(storage.read_bytes(f))) for f in rejected])
            storage.write_table(storage.join(out, "rejected", f"part-{stage}.parquet"), table)
    return storage.publish(
        out,
        kind="embeddings",
        config=config,
        inputs=inputs,
        num_in=made[0].num_in,
        num_out=made[-1].num_out,
        num_rejected=sum(m.num_rejected for m in made),
        rejected_reasons=dict(reasons.most_common()),
        details=made[-1].details,
        seconds=sum(m.seconds for m in made),
    )


def _clear(out: str) -> None:
    """Remove an earlier table from `out`, and nothing else that may lie there."""
    storage.delete(storage.join(out, storage.MANIFEST))
    storage.delete(storage.join(out, "rejected"))
    for path in storage.list_files(out, suffix=".parquet"):
        if path.rsplit("/", 1)[-1].startswith("part-"):
            storage.delete(path)
