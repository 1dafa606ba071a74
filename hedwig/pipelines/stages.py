"""The stages of a run in the order of the data, from the listing to the predictions.

Each is a function of the run: it states its settings and inputs, and builds its artefact when that is not there. What
flows row by row goes through `map_rows`; what needs the whole table is built by the driver from a table on disk.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
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
from hedwig.geocells import Geocells, Geography, build_geocells, refuse_swapped
from hedwig.models.encoder import encoder_sizes, load_encoder
from hedwig.panorama import PanoramaSlicer, Slicing
from hedwig.pipelines.chain import Chain, Step, columns_to_batch
from hedwig.pipelines.rows import RowsTask, enforce_max_rejected, map_rows
from hedwig.pipelines.run import Run
from hedwig.schema import PREDICTIONS, captions_schema, embeddings_schema
from hedwig.sources import ImageReader, check_listing, random_split, read_listing, spatial_split

__all__ = ["STAGES", "slicing_of"]

logger = logging.getLogger(__name__)
Manifest = storage.Manifest
DRIFT_PROBES = 8


def panoramas(run: Run) -> Manifest:
    """The listing, checked row by row and divided into splits."""
    data = run.experiment.data
    if data.panoramas is None and data.synthetic is None:
        raise ValueError(
            "The experiment names no panoramas: set data.panoramas=LISTING, or data.synthetic for a made-up world."
        )
    listing = storage.resolve(data.panoramas) if data.panoramas else storage.join(run.folder("synth"), "panoramas.csv")
    root = storage.resolve(data.image_root) if data.image_root else os.path.dirname(listing)
    config = {**data.model_dump(mode="json", exclude={"synthetic"}), "panoramas": data.panoramas}
    inputs = run.inputs("synth") if data.panoramas is None else {"listing": _digest_of_listing(listing)}

    def build() -> Manifest:
        started = time.monotonic()
        folder = run.folder("panoramas")
        storage.delete(folder)
        rows = read_listing(listing)
        checked = check_listing(rows, image_root=root, layout=data.layout)
        located = rows[rows["lat"].notna() & rows["lon"].notna()]
        refuse_swapped(located["lat"], located["lon"], located["country"].tolist(), geography_of(run))
        table = _with_splits(checked.panoramas, data.split.model_dump())
        _write_parts(folder, table)
        if checked.rejected.num_rows:
            storage.write_table(storage.join(folder, "rejected", "part-00000.parquet"), checked.rejected)
        num_rejected = checked.rejected.num_rows
        enforce_max_rejected("panoramas", num_rejected, checked.num_in, data.max_rejected, checked.reasons)
        if table.num_rows == 0:
            raise ValueError(f"The listing {listing} has no row that can be used; see {folder}/rejected/.")
        return storage.publish(
            folder,
            kind="panoramas",
            config=config,
            inputs=inputs,
            num_in=checked.num_in,
            num_out=table.num_rows,
            num_rejected=num_rejected,
            rejected_reasons=checked.reasons,
            details={"num_images": checked.num_images, "splits": _count(table["split"])},
            seconds=time.monotonic() - started,
        )

    return run.make("panoramas", "panoramas", config, inputs, build)


def _digest_of_listing(listing: str) -> str:
    if not storage.exists(listing):
        raise FileNotFoundError(f"No panorama listing at {listing!r}; give a .csv, .parquet or .geoparquet file.")
    files = storage.list_files(listing) if storage.is_folder(listing) else [listing]
    return hashlib.sha256(b"".join(hashlib.sha256(storage.read_bytes(f)).digest() for f in files)).hexdigest()


def _with_splits(table: pa.Table, split: Mapping[str, Any]) -> pa.Table:
    if split["method"] == "column":
        return table
    known = np.asarray(pc.is_valid(table["lat"]))
    sides = np.array(table["split"].to_pylist(), dtype=object)
    shares = {name: split[name] for name in ("val_fraction", "test_fraction", "seed")}
    located = table.filter(pa.array(known))
    if split["method"] == "random":
        sides[known] = random_split(located["pano_id"].to_pylist(), **shares)
    else:
        lat, lon = located["lat"].to_numpy(), located["lon"].to_numpy()
        space = {name: split[name] for name in ("block_km", "buffer_km")}
        sides[known] = spatial_split(lat, lon, located["sequence"].to_pylist(), **space, **shares)
    place = table.column_names.index("split")
    return table.set_column(place, table.schema.field("split"), pa.array(sides, pa.string()))


def _write_parts(folder: str, table: pa.Table, rows_per_file: int = 50_000) -> None:
    table = table.sort_by("pano_id")
    for number, start in enumerate(range(0, max(1, table.num_rows), rows_per_file)):
        part = table.slice(start, rows_per_file)
        storage.write_table(storage.join(folder, f"part-{number:05d}.parquet"), part)


def _count(column: Any) -> dict[str, int]:
    return {str(item["values"]): int(item["counts"]) for item in pc.value_counts(column.combine_chunks()).to_pylist()}


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
    return _rows(run, "caption", "captions", "panoramas", steps, captions_schema(), config)


def _rows(
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
    from hedwig.training import frames_schema

    x = run.experiment
    slicing = slicing_of(run, x.encoder)
    schema = frames_schema(slicing.num_frames, slicing.frame_px)
    config = {"slicing": _slicing_config(run, x.encoder)}
    steps = _slicing_steps(run, x.encoder)
    return _rows(run, "frames", "frames", "caption", steps, schema, config, keep=("train", "val"))


def encoder(run: Run) -> Manifest:
    """A tiny encoder (and the baseline of the same size, with the same budget) trained from scratch on these frames."""
    from hedwig.training import train_encoder

    x = run.experiment
    if x.encoder.train is None:
        raise ValueError("encoder.train is not set: the encoder's weights are given, there is nothing to train.")
    names = [x.encoder.name] + ([x.evaluate.baseline.name] if _trains_baseline(run) and x.evaluate.baseline else [])
    options = x.encoder.train.model_dump()
    config = {"encoders": names, "training": options}
    inputs = run.inputs("frames")

    def build() -> Manifest:
        started = time.monotonic()
        with storage.local_copy(run.folder("frames")) as source, storage.writing(run.folder("encoder")) as target:
            metrics = train_encoder(
                frames=str(source),
                output=str(target),
                encoders=names,
                scratch=_scratch(run),
                run_name=_run_name("encoder", config, inputs),
                **options,
            )
        source_manifest = storage.read_manifest(run.folder("frames"))
        num = source_manifest.num_out if source_manifest else 0
        return _published(
            run, run.folder("encoder"), kind="encoder", config=config, inputs=inputs, num_in=num, num_out=num,
            details={"metrics": metrics}, seconds=time.monotonic() - started,
        )  # fmt: skip

    return run.make("encoder", "encoder", config, inputs, build)


def _published(run: Run, folder: str, **record: Any) -> Manifest:
    """Publish what was trained, and only then drop the checkpoints that a killed run would have gone on from."""
    manifest = storage.publish(folder, **record)
    storage.delete(_scratch(run))
    return manifest


def _scratch(run: Run) -> str:
    return storage.join(storage.resolve(run.experiment.output), ".train")


def _run_name(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The same work has the same name, so that Ray Train goes on from its checkpoints after a killed driver."""
    return f"{kind}-{storage.fingerprint(kind, config, inputs)[:16]}"


def _trains_baseline(run: Run) -> bool:
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

    return _rows(run, stage, "embeddings", "caption", steps, schema, config, inputs=inputs, details=details)


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
    from hedwig.models.weights import weights_file

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
    return _embeddings(run, "baseline", config, trained=_trains_baseline(run))


def geography_of(run: Run) -> Geography:
    """The administrative hierarchy: the user's polygons, or the offline default."""
    polygons = run.experiment.geocells.polygons
    if polygons is None:
        return Geography.default()
    return Geography.from_polygons(**{k: storage.resolve(v) for k, v in polygons.model_dump().items() if v is not None})


def geocells(run: Run) -> Manifest:
    """The partition of the Earth, from the positions of the training panoramas."""
    section = run.experiment.geocells
    config = section.model_dump(mode="json")
    inputs = run.inputs("embed")

    def build() -> Manifest:
        started = time.monotonic()
        table = storage.read_table(run.folder("embed"), ["pano_id", "lat", "lon", "split"])
        train = table.filter(pc.equal(table["split"], "train"))
        if train.num_rows == 0:
            raise ValueError("No training panorama has a position; geocells cannot be built. See data.split.")
        cells = build_geocells(
            train["lat"].to_numpy(),
            train["lon"].to_numpy(),
            method=section.method,
            min_panoramas=section.min_panoramas,
            max_panoramas=section.max_panoramas,
            num_cells=section.num_cells,
            geography=geography_of(run),
            seed=section.seed,
        )
        with storage.writing(run.folder("geocells")) as folder:
            cells.save(folder)
        return storage.publish(
            run.folder("geocells"), kind="geocells", config=config, inputs=inputs, num_in=train.num_rows,
            num_out=train.num_rows, details={"num_cells": len(cells.table)}, seconds=time.monotonic() - started,
        )  # fmt: skip

    return run.make("geocells", "geocells", config, inputs, build)


def geolocator(run: Run) -> Manifest:
    """Projection and geocell classifier, trained by Ray Train."""
    from hedwig.training import train_geolocator

    options = run.experiment.training.model_dump()
    inputs = run.inputs("embed", "geocells")

    def build() -> Manifest:
        started = time.monotonic()
        with (
            storage.local_copy(run.folder("embed")) as vectors,
            storage.local_copy(run.folder("geocells")) as cells,
            storage.writing(run.folder("train")) as target,
        ):
            metrics = train_geolocator(
                embeddings=str(vectors),
                geocells=str(cells),
                output=str(target),
                scratch=_scratch(run),
                run_name=_run_name("geolocator", options, inputs),
                **options,
            )
        splits = _count(storage.read_table(run.folder("embed"), ["split"])["split"])
        num = splits.get("train", 0) + splits.get("val", 0)
        return _published(
            run, run.folder("train"), kind="geolocator", config=options, inputs=inputs, num_in=num, num_out=num,
            details={"metrics": metrics}, seconds=time.monotonic() - started,
        )  # fmt: skip

    return run.make("train", "geolocator", options, inputs, build)


def index(run: Run) -> Manifest:
    """The training panoramas in FAISS lists that are the geocells, and the radius calibrated on validation rows."""
    from hedwig.retrieve import build_index

    x = run.experiment
    config = {**x.index.model_dump(mode="json"), "retrieve": x.retrieve.model_dump(mode="json")}
    inputs = run.inputs("embed", "geocells", "train")

    def build() -> Manifest:
        started = time.monotonic()
        with (
            storage.local_copy(run.folder("geocells")) as cells,
            storage.local_copy(run.folder("train")) as head,
            storage.writing(run.folder("index")) as target,
        ):
            rows = columns_to_batch(
                storage.read_table(run.folder("embed")),
                ["pano_id", "lat", "lon", "split", "image_embedding", "text_embedding"],
            )
            details = build_index(
                rows, Geocells.load(cells), head, target, **x.index.model_dump(), retrieve=x.retrieve.model_dump()
            )
        num = int(details["num_vectors"])
        return storage.publish(
            run.folder("index"), kind="index", config=config, inputs=inputs, num_in=num, num_out=num,
            details=details, seconds=time.monotonic() - started,
        )  # fmt: skip

    return run.make("index", "index", config, inputs, build)


def predictions(run: Run) -> Manifest:
    """Where each held-out panorama, and each one without a position, was taken, with the evidence."""
    from hedwig.retrieve import Predictor

    config = {"retrieve": run.experiment.retrieve.model_dump(mode="json")}
    steps = [Step(Predictor, {"run": storage.resolve(run.experiment.output)})]
    inputs = run.inputs("embed", "geocells", "train", "index")
    splits = ("val", "test", "query")
    return _rows(run, "predict", "predictions", "embed", steps, PREDICTIONS, config, inputs=inputs, keep=splits)


# In the order of the data; `synth` and `evaluate` live in modules of their own.
STAGES: dict[str, Callable[[Run], Manifest]] = {
    "panoramas": panoramas,
    "caption": captions,
    "frames": frames,
    "encoder": encoder,
    "embed": embeddings,
    "baseline": baseline,
    "geocells": geocells,
    "train": geolocator,
    "index": index,
    "predict": predictions,
}
