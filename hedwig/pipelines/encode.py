"""The stages that flow row by row: captions, the frames cache, embeddings and the baseline's embeddings.

All cut the same frames in the same way, as `hedwig.retrieve` will cut a query's; each is one chain of stages in one
actor pool, so that image bytes and frames never travel.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hedwig import storage
from hedwig.captions import TemplateCaptioner, captioner_options
from hedwig.config import EncoderConfig
from hedwig.embed import Embedder
from hedwig.models.encoder import encoder_sizes, load_encoder
from hedwig.models.weights import weights_file
from hedwig.panorama import PanoramaSlicer, Slicing
from hedwig.pipelines.chain import Chain, Step, columns_to_batch
from hedwig.pipelines.rows import RowsTask, map_rows
from hedwig.pipelines.run import Run
from hedwig.schema import captions_schema, embeddings_schema
from hedwig.sources import ImageReader
from hedwig.training.frames import frames_schema

__all__ = ["baseline", "captions", "embeddings", "frames", "rows_stage", "slicing_of", "trains_baseline"]

logger = logging.getLogger(__name__)
Manifest = storage.Manifest
DRIFT_PROBES = 8


def slicing_of(run: Run, encoder: EncoderConfig) -> Slicing:
    """The slicing section with the frame size that the encoder takes."""
    frame_px, num_frames, _ = encoder_sizes(encoder.name)
    settings = run.experiment.slicing.model_dump()
    if settings["num_frames"] != num_frames:
        raise ValueError(f"slicing.num_frames is {settings['num_frames']}, and {encoder.name} takes {num_frames}.")
    return Slicing(**settings, frame_px=frame_px)


def _slicing_steps(run: Run, encoder: EncoderConfig) -> list[Step]:
    pool = run.experiment.embed
    return [
        Step(ImageReader, {"num_threads": max(4, pool.num_threads)}),
        Step(PanoramaSlicer, {"slicing": slicing_of(run, encoder), "num_threads": pool.num_threads}),
    ]


def _slicing_config(run: Run, encoder: EncoderConfig) -> dict[str, Any]:
    return asdict(slicing_of(run, encoder))


class _NoCaptions:
    """Every caption empty: the head is fed the image alone, and the text embedding is zero."""

    reads = ("frames",)
    writes = ("caption", "caption_num_tokens")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        size = len(batch["frames"])
        captions = np.full(size, "", dtype=object)
        return {**batch, "caption": captions, "caption_num_tokens": np.zeros(size, dtype=np.int32)}


def captions(run: Run) -> Manifest:
    """One caption per panorama."""
    x = run.experiment
    steps = _slicing_steps(run, x.encoder)
    slicing = _slicing_config(run, x.encoder)
    template = Step(TemplateCaptioner, captioner_options(slicing))
    steps.append(template if x.captions.source == "template" else Step(_NoCaptions))
    config = {"captions": x.captions.model_dump(mode="json"), "slicing": slicing}
    return rows_stage(run, "caption", "captions", "panoramas", steps, captions_schema(), config)


def rows_stage(
    run: Run,
    stage: str,
    kind: str,
    source: str,
    steps: list[Step],
    schema: pa.Schema,
    config: dict[str, Any],
    *,
    inputs: Mapping[str, str] | None = None,
    keep: tuple[str, ...] | None = None,
    details: Callable[[], dict[str, Any]] | None = None,
) -> Manifest:
    """One stage of the run as a `RowsTask`: see there for the arguments."""
    task = RowsTask(
        kind=kind,
        source=run.folder(source),
        folder=run.folder(stage),
        steps=steps,
        schema=schema,
        config=config,
        inputs=run.inputs(source) if inputs is None else inputs,
        pool=run.experiment.embed,
        max_rejected=run.experiment.data.max_rejected,
        keep=keep,
        details=details,
    )
    return run.make(stage, kind, config, task.inputs, lambda: map_rows(task, run.rows_progress(stage)))


def frames(run: Run) -> Manifest:
    """The frames of the training and validation panoramas, kept on disk for the epochs of `encoder`."""
    x = run.experiment
    slicing = slicing_of(run, x.encoder)
    schema = frames_schema(slicing.num_frames, slicing.frame_px)
    config = {"slicing": _slicing_config(run, x.encoder)}
    steps = _slicing_steps(run, x.encoder)
    return rows_stage(run, "frames", "frames", "caption", steps, schema, config, keep=("train", "val"))


def trains_baseline(run: Run) -> bool:
    """Whether the baseline gets the training that the encoder gets."""
    baseline = run.experiment.evaluate.baseline
    return run.experiment.encoder.train is not None and baseline is not None and baseline.weights is None


def _embeddings(run: Run, stage: str, encoder: EncoderConfig, trained: bool) -> Manifest:
    x = run.experiment
    # Inside the run, weights are named relative to it: a run folder may be moved.
    given = storage.resolve(encoder.weights) if encoder.weights is not None else None
    weights = f"{os.path.basename(run.folder('encoder'))}/{encoder.name}" if trained else given
    place = storage.join(storage.resolve(x.output), weights) if trained and weights else given
    model = {"name": encoder.name, "weights": weights, "seed": encoder.seed, "dtype": encoder.dtype}
    config: dict[str, Any] = {
        "encoder": model,
        "slicing": _slicing_config(run, encoder),
        "captions": x.captions.model_dump(mode="json"),
    }
    inputs = run.inputs("caption", *(["encoder"] if trained else []))
    if place is not None and not trained:
        inputs["weights"] = _digest_of_weights(place)
    arguments = {
        "encoder_name": encoder.name,
        "weights": place,
        "seed": encoder.seed,
        "device": encoder.device,
        "dtype": encoder.dtype,
        "batch_size": x.embed.batch_size,
        "num_threads": x.embed.num_threads,
    }
    steps = [*_slicing_steps(run, encoder), Step(Embedder, arguments)]
    dim = encoder_sizes(encoder.name)[2]
    schema = embeddings_schema(dim, dim)

    def details() -> dict[str, Any]:
        model = load_encoder(encoder.name, weights=place, seed=encoder.seed, device="cpu", dtype=encoder.dtype)
        record: dict[str, Any] = {"model_id": model.model_id, "weights_note": model.weights_note}
        if x.slicing.half_size:
            record["half_size_drift"] = _half_size_drift(run, encoder, arguments)
        return record

    return rows_stage(run, stage, "embeddings", "caption", steps, schema, config, inputs=inputs, details=details)


def _half_size_drift(run: Run, encoder: EncoderConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Cosines between embeddings from half-size and from full decoding, on the first panoramas of the table."""
    table = storage.read_table(run.folder("caption")).slice(0, DRIFT_PROBES)
    vectors = []
    for half_size in (True, False):
        slicing = replace(slicing_of(run, encoder), half_size=half_size)
        steps = [Step(ImageReader), Step(PanoramaSlicer, {"slicing": slicing}), Step(Embedder, arguments)]
        done = Chain(steps, pa.schema([("image_embedding", pa.list_(pa.float32(), encoder_sizes(encoder.name)[2]))]))
        vectors.append(columns_to_batch(done(table).filter(pc.is_null(pc.field("failure"))), ["image_embedding"]))
    cosines = (vectors[0]["image_embedding"] * vectors[1]["image_embedding"]).sum(axis=1)
    if len(cosines) == 0:
        return {"num_panoramas": 0}
    drift = {"num_panoramas": len(cosines), "min_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}
    logger.warning("slicing.half_size is not faithful: cosine to full decoding %(min_cosine).5f at worst", drift)
    return drift


def _digest_of_weights(place: str) -> str:
    digest = hashlib.sha256()
    with open(weights_file(place), "rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def embeddings(run: Run) -> Manifest:
    """Image and text vectors of every panorama."""
    x = run.experiment
    return _embeddings(run, "embed", x.encoder, trained=x.encoder.train is not None)


def baseline(run: Run) -> Manifest:
    """Mean-pooled CLIP of the same frames, to compare with."""
    config = run.experiment.evaluate.baseline
    if config is None:
        raise ValueError("evaluate.baseline is not set: there is no baseline to embed.")
    return _embeddings(run, "baseline", config, trained=trains_baseline(run))
