"""The stages of a run in the order of the data, and those of them that need a whole table at once.

Each is a function of the run: it states its settings and inputs, and builds its artefact when that is not there. What
flows row by row is in `encode`; what is here is built by the driver, or by Ray Train, from tables on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hedwig import storage
from hedwig.geocells import Geocells, build_geocells, measure
from hedwig.pipelines.caption import captions
from hedwig.pipelines.chain import Step, columns_to_batch
from hedwig.pipelines.checks import keeps_frames
from hedwig.pipelines.encode import (
    baseline,
    embeddings,
    frames,
    given_weights,
    rows_stage,
    trained_folder,
    trains_baseline,
)
from hedwig.pipelines.listing import count_values, geography_of, panoramas
from hedwig.pipelines.run import Run
from hedwig.retrieve import Predictor, build_index
from hedwig.schema import PREDICTIONS
from hedwig.training import finetune_encoder, train_encoder, train_geolocator

__all__ = ["STAGES"]

Manifest = storage.Manifest


def encoder(run: Run) -> Manifest:
    """The encoder whose weights the run makes itself on its frames: trained from scratch, or fine-tuned."""
    if run.experiment.encoder.finetune is not None:
        return _finetuned(run)
    if run.experiment.encoder.train is not None:
        return _trained_from_scratch(run)
    raise ValueError(
        "Neither encoder.train nor encoder.finetune is set: the encoder's weights are used as given, there is nothing "
        "to train."
    )


def _trained_from_scratch(run: Run) -> Manifest:
    """A tiny encoder, and the baseline of the same size with the same budget."""
    x = run.experiment
    encoders = [x.encoder] + ([x.evaluate.baseline] if trains_baseline(run) and x.evaluate.baseline else [])
    names = [encoder.name for encoder in encoders]
    fusions = {encoder.name: {"fusion": encoder.fusion, "temporal": encoder.temporal} for encoder in encoders}
    options = x.encoder.train.model_dump() if x.encoder.train else {}
    config = {"encoders": names, "fusions": fusions, "training": options}
    inputs = run.inputs("frames")

    def train(source: str, target: str) -> Mapping[str, Any]:
        return train_encoder(
            frames=source,
            output=target,
            encoders=names,
            fusions=fusions,
            scratch=_scratch(run),
            run_name=_run_name("encoder", config, inputs),
            **options,
        )

    return _encoder_stage(run, config, inputs, train)


def _finetuned(run: Run) -> Manifest:
    """The encoder's given weights, changed; the baseline stays as its publisher left it."""
    chosen = run.experiment.encoder
    options = chosen.finetune.model_dump() if chosen.finetune else {}
    place, recorded, digests = given_weights(chosen)
    loading: dict[str, Any] = {
        "encoder": chosen.name,
        "quick_gelu": chosen.quick_gelu,
        "fusion": chosen.fusion,
        "temporal": chosen.temporal,
        "long_captions": chosen.long_captions,
        "random_seed": chosen.seed,
    }
    config = {"finetuned": {**loading, "weights": recorded}, "training": options}
    inputs = run.inputs("frames") | digests

    def train(source: str, target: str) -> Mapping[str, Any]:
        figures = finetune_encoder(
            frames=source,
            output=storage.join(target, trained_folder(chosen)),
            scratch=_scratch(run),
            run_name=_run_name("finetune", config, inputs),
            weights=place,
            sha256=chosen.sha256,
            **loading,
            **options,
        )
        return {chosen.name: figures}

    return _encoder_stage(run, config, inputs, train)


def _encoder_stage(
    run: Run, config: Mapping[str, Any], inputs: Mapping[str, str], train: Callable[[str, str], Mapping[str, Any]]
) -> Manifest:
    """What `train(frames, output)` makes, published with its metrics."""

    def build() -> Manifest:
        started = time.monotonic()
        with storage.local_copy(run.folder("frames")) as source, storage.writing(run.folder("encoder")) as target:
            metrics = train(str(source), str(target))
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
        lat, lon, geography = train["lat"].to_numpy(), train["lon"].to_numpy(), geography_of(run)
        cells = build_geocells(
            lat,
            lon,
            method=section.method,
            min_panoramas=section.min_panoramas,
            max_panoramas=section.max_panoramas,
            num_cells=section.num_cells,
            depth=section.depth,
            levels=section.levels,
            geography=geography,
            seed=section.seed,
        )
        figures = measure(cells, lat, lon, geography.lookup(lat, lon))
        with storage.writing(run.folder("geocells")) as folder:
            cells.save(folder)
        return storage.publish(
            run.folder("geocells"), kind="geocells", config=config, inputs=inputs, num_in=train.num_rows,
            num_out=train.num_rows, details=figures, seconds=time.monotonic() - started,
        )  # fmt: skip

    return run.make("geocells", "geocells", config, inputs, build)


def geolocator(run: Run) -> Manifest:
    """Projection and geocell classifier, trained by Ray Train."""
    options = run.experiment.training.model_dump()
    inputs = run.inputs("embed", "geocells")
    fusion, num_frames = _frames_of(run)
    pooled: dict[str, Any] = (
        {"image_column": "frame_embeddings", "num_frames": num_frames} if fusion == "attention" else {}
    )

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
                **pooled,
            )
        splits = count_values(storage.read_table(run.folder("embed"), ["split"])["split"])
        num = splits.get("train", 0) + splits.get("val", 0)
        return _published(
            run, run.folder("train"), kind="geolocator", config=options, inputs=inputs, num_in=num, num_out=num,
            details={"metrics": metrics}, seconds=time.monotonic() - started,
        )  # fmt: skip

    return run.make("train", "geolocator", options, inputs, build)


def _frames_of(run: Run) -> tuple[str, int]:
    """The fusion that the embedding table was made with, whatever the experiment says now, and its V."""
    manifest = storage.read_manifest(run.folder("embed"))
    config: Mapping[str, Any] = manifest.config if manifest else {}
    return config.get("encoder", {}).get("fusion", "auto"), config.get("slicing", {}).get("num_frames", 0)


def index(run: Run) -> Manifest:
    """The training panoramas in FAISS lists that are the geocells, and the radius calibrated on validation rows."""
    x = run.experiment
    config = {**x.index.model_dump(mode="json"), "retrieve": x.retrieve.model_dump(mode="json")}
    inputs = run.inputs("embed", "geocells", "train")
    fusion, _ = _frames_of(run)
    vectors = ["image_embedding", "text_embedding"] + (["frame_embeddings"] if keeps_frames(fusion) else [])

    def build() -> Manifest:
        started = time.monotonic()
        with (
            storage.local_copy(run.folder("geocells")) as cells,
            storage.local_copy(run.folder("train")) as head,
            storage.writing(run.folder("index")) as target,
        ):
            columns = ["pano_id", "lat", "lon", "split", *vectors]
            table = storage.read_table(run.folder("embed"), columns)
            rows = columns_to_batch(table.filter(pc.is_in(table["split"], pa.array(["train", "val"]))), columns)
            details = build_index(
                rows, Geocells.load(cells), head, target, **x.index.model_dump(), retrieve=x.retrieve.model_dump(),
                each_frame=fusion == "max_sim",
            )  # fmt: skip
        num = int(details["num_vectors"])
        return storage.publish(
            run.folder("index"), kind="index", config=config, inputs=inputs, num_in=num, num_out=num,
            details=details, seconds=time.monotonic() - started,
        )  # fmt: skip

    return run.make("index", "index", config, inputs, build)


def predictions(run: Run) -> Manifest:
    """Where each held-out panorama, and each one without a position, was taken, with the evidence."""
    config = {"retrieve": run.experiment.retrieve.model_dump(mode="json")}
    steps = [Step(Predictor, {"run": storage.resolve(run.experiment.output)})]
    inputs = run.inputs("embed", "geocells", "train", "index")
    splits = ("val", "test", "query")
    return rows_stage(run, "predict", "predictions", "embed", steps, PREDICTIONS, config, inputs=inputs, keep=splits)


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
