"""The embedding job as `hedwig bench pipeline` measures it: the same flow as a run's, on a listing made for it."""

from __future__ import annotations

import os
import tempfile
from typing import Any, Literal

import pyarrow as pa

from hedwig.benchmark.pipeline import LateReader, PipelineFigures, TimedSlicer, measure_pipeline
from hedwig.benchmark.preprocessing import synthetic_panoramas
from hedwig.config import ClusterConfig, EmbedConfig, EncoderConfig
from hedwig.panorama import Slicing
from hedwig.pipelines.chain import Step
from hedwig.pipelines.checks import sizes_of
from hedwig.pipelines.cluster import ray_running
from hedwig.pipelines.rows import RowsTask, map_rows

__all__ = ["pipeline_figures"]


def pipeline_figures(
    model: str,
    *,
    num_rows: int,
    batch_size: int,
    rows_per_block: int,
    num_threads: int,
    num_gpus: float = 0.0,
    address: str | None = None,
    num_images: int = 8,
    decode: Literal["actor", "apart"] = "actor",
    decode_workers: int = 1,
    read_ahead: int = 2,
    latency_s: float = 0.0,
    **options: Any,
) -> PipelineFigures:
    """Embed `num_rows` synthetic panoramas of 2048 x 1024 px on one actor and measure.

    Args:
        model: name of the encoder; its weights are random, which are as fast.
        num_rows: panoramas.
        batch_size: of the actor.
        rows_per_block: of Ray Data.
        num_threads: decoding and torch threads of the actor; a worker that only decodes has one.
        num_gpus: reserved by the actor.
        address: of a running Ray; None for a local one. All nodes must see the temporary folder.
        num_images: different images among them.
        decode: in the actor, or in `decode_workers` apart from it.
        decode_workers: how many there are then; no more than blocks.
        read_ahead: of `EmbedConfig`.
        latency_s: that every image is late, as those of object storage are.
        **options: of the encoder, such as device and dtype.
    """
    slicing = Slicing(frame_px=sizes_of(EncoderConfig(name=model)).frame_px)
    pool = EmbedConfig(
        batch_size=batch_size, rows_per_block=rows_per_block, num_threads=num_threads, num_gpus=num_gpus,
        decode=decode, decode_workers=decode_workers, read_ahead=read_ahead,
    )  # fmt: skip
    apart = min(decode_workers, -(-num_rows // rows_per_block)) if decode == "apart" else 0
    cluster = ClusterConfig(address=address, num_cpus=None if address else max(4, os.cpu_count() or 1, apart + 3))
    stages: list[tuple[Any, dict[str, Any]]] = [
        (LateReader, {"latency_s": latency_s}),
        (TimedSlicer, {"slicing": slicing, "num_threads": 1 if apart else num_threads}),
    ]

    def job(source: str, folder: str, whole: list[tuple[Any, dict[str, Any]]], schema: pa.Schema) -> None:
        steps = [Step(stage, arguments) for stage, arguments in whole]
        map_rows(
            RowsTask(
                kind="bench", source=source, folder=folder, steps=steps, schema=schema, config={}, inputs={},
                pool=pool, max_rejected=0,
            )
        )  # fmt: skip

    with ray_running(cluster), tempfile.TemporaryDirectory(prefix="hedwig-bench-") as folder:
        return measure_pipeline(
            job, synthetic_panoramas(num_images), folder, stages=stages, model=model, num_panoramas=num_rows,
            batch_size=batch_size, decode_workers=apart, here=address is None, num_frames=slicing.num_frames,
            num_threads=num_threads, **options,
        )  # fmt: skip
