"""The stages that cut frames and flow row by row: the frames cache, embeddings and the baseline's embeddings.

All cut the same frames in the same way, as `hedwig.retrieve` will cut a query's; each is one chain of stages in one
actor pool, so that image bytes and frames never travel, unless ``embed.decode=apart`` says that frames shall.

Frames and fusion are two settings. ``slicing.num_frames`` is how many frames are cut, 1 to 64: where ViCLIP fuses
them (``encoder.fusion=viclip``) it chooses its eight among them or interpolates (``encoder.temporal``); any other
fusion looks at every frame alone. So the ablation *frames 1/4/8/10* is ``slicing.num_frames``, and *panorama or
individual images* is ``encoder.fusion``: viclip sees the frames as one panorama, mean sees each by itself and averages.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hedwig import storage
from hedwig.config import EncoderConfig
from hedwig.embed import Embedder, FrameEmbedder
from hedwig.models.encoder import load_encoder
from hedwig.models.fetched import check_pinned, file_sha256, resolve_weights
from hedwig.models.weights import settings_digest, weights_file
from hedwig.panorama import PanoramaSlicer, Slicing
from hedwig.pipelines.chain import Chain, Step, columns_to_batch
from hedwig.pipelines.checks import keeps_frames, sizes_of, weights_of
from hedwig.pipelines.reuse import Earlier, find_earlier, images_changed
from hedwig.pipelines.rows import RowsTask, map_rows
from hedwig.pipelines.run import Run
from hedwig.schema import embeddings_schema, vector_field
from hedwig.sources import ImageReader
from hedwig.sources.stamps import STAMP, ImageStamper
from hedwig.training.frames import frames_schema

__all__ = [
    "baseline",
    "cutting_steps",
    "embeddings",
    "frames",
    "given_weights",
    "rows_stage",
    "slicing_of",
    "trained_folder",
    "trains_baseline",
]

logger = logging.getLogger(__name__)
Manifest = storage.Manifest
DRIFT_PROBES = 8
NO_GPU = {"num_gpus": 0.0, "decode": "actor"}


def slicing_of(run: Run, encoder: EncoderConfig) -> Slicing:
    """The slicing section with the frame size that the encoder takes."""
    return Slicing(**run.experiment.slicing.model_dump(), frame_px=sizes_of(encoder).frame_px)


def cutting_steps(run: Run, slicing: Slicing) -> list[Step]:
    """Read the images and cut their frames, with the threads of the embedding pool or of a worker that only decodes."""
    embed = run.experiment.embed
    threads = embed.num_threads if embed.decode == "actor" else 1  # a worker apart has one CPU
    return [
        Step(ImageReader),
        Step(PanoramaSlicer, {"slicing": slicing, "num_threads": threads}),
    ]


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
    incremental: bool = False,
    on_gpu: bool = False,
) -> Manifest:
    """One stage of the run as a `RowsTask`: see there for the arguments.

    Only stages that are `on_gpu` reserve what embed.num_gpus says, for the others would hold GPUs that they do not use,
    and only they decode apart where embed.decode says so.
    With `incremental`, for stages that read images, each row keeps its image's stamp, and only rows that are new or
    changed are computed: the rest comes from the stage's own last table, or from that of a sibling.
    """
    if incremental:
        steps, schema = [Step(ImageStamper), *steps], schema.append(pa.field(STAMP, pa.string()))
    task = RowsTask(
        kind=kind,
        source=run.folder(source),
        folder=run.folder(stage),
        steps=steps,
        schema=schema,
        config=config,
        inputs=run.inputs(source) if inputs is None else inputs,
        pool=run.experiment.embed if on_gpu else run.experiment.embed.model_copy(update=NO_GPU),
        max_rejected=run.experiment.data.max_rejected,
        keep=keep,
        details=details,
        timeout_s=run.experiment.embed.batch_timeout_s,
    )
    progress = run.rows_progress(stage)
    if not incremental:
        return run.make(stage, kind, config, task.inputs, lambda: map_rows(task, progress))

    def build() -> Manifest:
        with earlier_table(run, stage, task, os.path.basename(run.folder(source))) as folder:
            return map_rows(task if folder is None else replace(task, earlier=_earlier(folder, task, run)), progress)

    def outdated(folder: str) -> bool:
        return run.check_images is not None and images_changed(folder, rehash=run.check_images == "contents")

    return run.make(stage, kind, config, task.inputs, build, outdated)


@contextmanager
def earlier_table(run: Run, stage: str, task: RowsTask, source: str) -> Iterator[str | None]:
    """The folder of a table that rows may be taken from, or None.

    The stage's own last table is set aside first, as links on a local disk, since its folder is about to be emptied;
    it goes when the block ends without an error, and a killed run finds it again.
    """
    config = json.loads(json.dumps(task.config))  # as it was read back
    asked = (task.kind, config, task.inputs, source)
    aside = storage.join(storage.resolve(run.experiment.output), ".earlier", os.path.basename(task.folder))
    if find_earlier([task.folder], *asked) is not None:
        storage.clone(task.folder, aside)
        storage.delete(task.folder)  # finished, and about to be made anew: nothing in it is to be gone on with
    siblings = [storage.join(output, os.path.basename(task.folder)) for output in run.siblings]
    yield find_earlier([aside, *siblings], *asked)
    storage.delete(aside)


def _earlier(folder: str, task: RowsTask, run: Run) -> Earlier:
    read = {n for step in task.steps for n in (*step.stage.reads, *getattr(step.stage, "reads_if_there", ()))}
    written = {name for step in task.steps for name in step.stage.writes}
    return Earlier(folder, sorted(read - written), sorted(written), rehash=run.check_images == "contents")


def frames(run: Run) -> Manifest:
    """The frames of the training and validation panoramas, kept on disk for the epochs of `encoder`."""
    x = run.experiment
    slicing = slicing_of(run, x.encoder)
    schema = frames_schema(slicing.num_frames, slicing.frame_px)
    config = {"slicing": asdict(slicing)}
    steps = cutting_steps(run, slicing)
    return rows_stage(run, "frames", "frames", "caption", steps, schema, config, keep=("train", "val"))


def trains_baseline(run: Run) -> bool:
    """Whether the baseline gets the training that the encoder gets; it is never fine-tuned."""
    baseline = run.experiment.evaluate.baseline
    return run.experiment.encoder.train is not None and baseline is not None and baseline.weights is None


def trained_folder(encoder: EncoderConfig) -> str:
    """Where in the artefact of `encoder` the weights of one are that the run makes itself."""
    return encoder.name.replace(":", "-")


def given_weights(encoder: EncoderConfig) -> tuple[str | None, str | None, dict[str, str]]:
    """Where the weights are that the settings name, what to record as their name, and the digests of their files."""
    place = weights_of(encoder)
    if encoder.weights is None or place is None:
        return None, None, {}
    fetched = encoder.weights if resolve_weights(encoder.weights) != encoder.weights else None
    return place, fetched or place, _digests_of_weights(place, fetched)


def _embeddings(run: Run, stage: str, encoder: EncoderConfig, trained: bool) -> Manifest:
    x = run.experiment
    slicing, spec = slicing_of(run, encoder), sizes_of(encoder)
    # Inside the run, weights are named relative to it, for a run folder may be moved; fetched ones by their name.
    if trained:
        inside = f"{os.path.basename(run.folder('encoder'))}/{trained_folder(encoder)}"
        weights = (storage.join(storage.resolve(x.output), inside), inside, dict[str, str]())
    place, recorded, digests = weights if trained else given_weights(encoder)
    # All that changes a vector, and so all that a query must be embedded with.
    options: dict[str, Any] = {
        "seed": encoder.seed,
        "dtype": encoder.dtype,
        "fusion": encoder.fusion,
        "temporal": encoder.temporal,
        "long_captions": encoder.long_captions,
    }
    if encoder.quick_gelu is not None or not encoder.name.startswith("viclip-"):
        options["quick_gelu"] = encoder.quick_gelu
    config: dict[str, Any] = {
        "encoder": {"name": encoder.name, "weights": recorded, **options},
        "slicing": asdict(slicing),
        "captions": {"source": x.captions.source},  # the rest is in the digest of captions/
    }
    inputs = run.inputs("caption", *(["encoder"] if trained else [])) | digests
    arguments = {
        "encoder_name": encoder.name,
        "weights": place,
        "sha256": None if trained else encoder.sha256,
        "device": encoder.device,
        "compile": encoder.compile,
        "num_frames": slicing.num_frames,
        "batch_size": x.embed.batch_size,
        "num_threads": x.embed.num_threads,
        **options,
    }
    frames_kept = slicing.num_frames if keeps_frames(encoder.fusion) else 0
    steps = [*cutting_steps(run, slicing), Step(FrameEmbedder if frames_kept else Embedder, arguments)]
    schema = embeddings_schema(spec.image_dim, spec.text_dim, frames_kept)

    def details() -> dict[str, Any]:
        model = load_encoder(encoder.name, weights=place, device="cpu", num_frames=slicing.num_frames, **options)
        record: dict[str, Any] = {"model_id": model.model_id, "weights_note": model.weights_note}
        record["num_captions_truncated"] = _count_truncated(run, stage, encoder)
        if x.slicing.half_size:
            record["half_size_drift"] = _half_size_drift(run, encoder, arguments)
        return record

    return rows_stage(
        run, stage, "embeddings", "caption", steps, schema, config, inputs=inputs, details=details, incremental=True,
        on_gpu=True,
    )  # fmt: skip


def _count_truncated(run: Run, stage: str, encoder: EncoderConfig) -> int:
    """How many captions of the finished table the text encoder saw without their end; says so in the log."""
    column = storage.read_table(run.folder(stage), ["caption_truncated"])["caption_truncated"]
    num = int(pc.sum(column).as_py() or 0)
    if num:
        logger.warning(
            "%s: %d of %d captions are longer than what %s reads and lost their end; long_captions=chunks reads them "
            "whole, and captions.token_budget makes shorter ones", stage, num, len(column), encoder.name,
        )  # fmt: skip
    return num


def _half_size_drift(run: Run, encoder: EncoderConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Cosines between embeddings from half-size and from full decoding, on the first panoramas of the table."""
    table = storage.read_table(run.folder("caption")).slice(0, DRIFT_PROBES)
    vectors = []
    for half_size in (True, False):
        slicing = replace(slicing_of(run, encoder), half_size=half_size)
        steps = [Step(ImageReader), Step(PanoramaSlicer, {"slicing": slicing}), Step(Embedder, arguments)]
        done = Chain(steps, pa.schema([vector_field("image_embedding", sizes_of(encoder).image_dim)]))
        vectors.append(columns_to_batch(done(table).filter(pc.is_null(pc.field("failure"))), ["image_embedding"]))
    cosines = (vectors[0]["image_embedding"] * vectors[1]["image_embedding"]).sum(axis=1)
    if len(cosines) == 0:
        return {"num_panoramas": 0}
    drift = {"num_panoramas": len(cosines), "min_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}
    logger.warning("slicing.half_size is not faithful: cosine to full decoding %(min_cosine).5f at worst", drift)
    return drift


def _digests_of_weights(place: str, fetched: str | None) -> dict[str, str]:
    """Of the weights file and of the files beside it, which hold normalisation, sizes and vocabulary.

    Raises:
        ValueError: the file is not the one that is pinned for the model `fetched`.
    """
    digests = {"weights": file_sha256(weights_file(place))}
    if fetched is not None:
        check_pinned(fetched, digests["weights"])
    settings = settings_digest(place)
    return digests if settings is None else {**digests, "weights_settings": settings}


def embeddings(run: Run) -> Manifest:
    """Image and text vectors of every panorama."""
    x = run.experiment
    return _embeddings(run, "embed", x.encoder, trained=x.encoder.is_trained)


def baseline(run: Run) -> Manifest:
    """Mean-pooled CLIP of the same frames, to compare with."""
    config = run.experiment.evaluate.baseline
    if config is None:
        raise ValueError("evaluate.baseline is not set: there is no baseline to embed.")
    return _embeddings(run, "baseline", config, trained=trains_baseline(run))
