"""Judge a run: join predictions with the truth, put every floor beside them, and write the report folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hedwig import storage
from hedwig.evaluate import Embedded, evaluate, join_predictions
from hedwig.geocells import Geocells, Geography
from hedwig.panorama import PanoramaSlicer, decode_image, stitch_bearings
from hedwig.pipelines.chain import columns_to_batch
from hedwig.pipelines.encode import slicing_of
from hedwig.pipelines.listing import geography_of
from hedwig.pipelines.run import STAGE_FOLDERS, Run
from hedwig.pipelines.world import SYNTHETIC_NOTE
from hedwig.report import ReportContent, write_report
from hedwig.retrieve import Calibration
from hedwig.sources import read_image

__all__ = ["report"]

logger = logging.getLogger(__name__)
GEOGRAPHY_CREDITS = ["Places: GeoNames, CC BY 4.0.", "Country outlines: Natural Earth, public domain."]
Columns = dict[str, NDArray[Any]]


def report(run: Run) -> storage.Manifest:
    """``report.json``, ``report.html`` and the pictures; without a test split with positions, everything but scores."""
    x = run.experiment
    config = {"evaluate": x.evaluate.model_dump(mode="json"), "name": x.name}
    stages = ["panoramas", "caption", "embed", "geocells", "train", "index", "predict"]
    stages += ["baseline"] if x.evaluate.baseline is not None else []
    inputs = run.inputs(*stages)

    def build() -> storage.Manifest:
        started = time.monotonic()
        content = _content(run)
        num = len(content.queries.get("pano_id", ()))
        with storage.writing(run.folder("evaluate")) as folder:
            write_report(folder, content)
        return storage.publish(
            run.folder("evaluate"), kind="report", config=config, inputs=inputs, num_in=num, num_out=num,
            seconds=time.monotonic() - started,
        )  # fmt: skip

    return run.make("evaluate", "report", config, inputs, build)


def _content(run: Run) -> ReportContent:
    x = run.experiment
    columns = ["pano_id", "lat", "lon", "country", "split", "image_uri", "caption", "source", "licence"]
    columns += ["projection", "heading", "bearing_uri", "bearing_deg"]
    rows = storage.read_table(run.folder("embed"), columns).to_pandas()
    train = rows[rows["split"] == "train"]
    truth = rows[(rows["split"] == "test") & rows["lat"].notna()]
    predictions = storage.read_table(run.folder("predict")).to_pandas()
    synthetic = x.data.panoramas is None or bool((rows["source"] == "hedwig synthetic world").all())
    note = encoder_note(run, "embed")
    with storage.local_copy(run.folder("geocells")) as folder:
        cells = Geocells.load(folder)
    record: dict[str, Any] | None = None
    queries, errors_km, gallery = pd.DataFrame(), {}, []
    if len(truth):
        geography = geography_of(run)
        own_polygons = x.geocells.polygons is not None
        calibration = _calibration(run)
        vectors = {"viclip_1nn": "embed"} | ({"clip_mean": "baseline"} if x.evaluate.baseline is not None else {})
        record = evaluate(
            truth[["pano_id", "lat", "lon", "country"]],
            predictions,
            train_lat=train["lat"],
            train_lon=train["lon"],
            cell_lat=cells.table["lat"],
            cell_lon=cells.table["lon"],
            assign=cells.assign,
            embeddings={name: _embedded(run, stage) for name, stage in vectors.items()},
            num_bootstrap=x.evaluate.num_bootstrap,
            seed=x.evaluate.seed,
            lookup=geography.lookup,
            places=None if own_polygons else geography.places(),
            confidence_km=calibration.confidence_km if calibration.confidence_weights else None,
        )
        record["encoder"] = note
        share = _manifest(run, "index").details.get("self_retrieval")
        if share is not None:  # the index is not built where rows and vectors have slipped against each other
            record["checks"]["self_retrieval"] = {"share_at_0_km": share, "passed": True}
        if x.evaluate.baseline is not None:
            record["clip_mean_encoder"] = encoder_note(run, "baseline")
        errors_km = record.pop("errors_km")
        queries = join_predictions(truth[["pano_id", "lat", "lon", "country"]], predictions)
        slicer = PanoramaSlicer(slicing=slicing_of(run, x.encoder), num_threads=1)
        gallery = _gallery(queries, rows.set_index("pano_id"), slicer)
    else:
        logger.warning("no test panorama has a position: the report has no scores")
    credits = [SYNTHETIC_NOTE] if synthetic else sorted({f"{s} ({w})" for s, w in zip(*_sources(rows), strict=True)})
    return ReportContent(
        title=x.name,
        experiment=x.model_dump(mode="json"),
        encoder_note=note,
        synthetic=synthetic,
        evaluation=record,
        accounting=_accounting(run),
        train=(train["lat"].to_numpy(np.float64), train["lon"].to_numpy(np.float64)),
        queries={str(name): queries[name].to_numpy() for name in queries.columns},
        errors_km=errors_km,
        geocells=cells.table,
        country_shapes=Geography.default().country_polygons(),
        land=Geography.default().land_rings(0.25),
        gallery=gallery,
        credits=[*credits, *GEOGRAPHY_CREDITS],
        versions=_manifest(run, "embed").versions,
        timings={name: _manifest(run, name).seconds for name in STAGE_FOLDERS if _has(run, name)},
        commands=[f"hedwig run EXPERIMENT output={x.output}", f"hedwig serve {x.output}"],
    )


def _calibration(run: Run) -> Calibration:
    """What the confidence of this run's answers means."""
    with storage.local_copy(run.folder("index")) as folder:
        return Calibration.load(folder / "calibration.json")


def _sources(rows: pd.DataFrame) -> tuple[list[str], list[str]]:
    pairs = rows[["source", "licence"]].fillna("not given").drop_duplicates()
    return pairs["source"].tolist(), pairs["licence"].tolist()


def _has(run: Run, stage: str) -> bool:
    return stage != "evaluate" and storage.read_manifest(run.folder(stage)) is not None


def _manifest(run: Run, stage: str) -> storage.Manifest:
    manifest = storage.read_manifest(run.folder(stage))
    if manifest is None:
        raise FileNotFoundError(f"There is no finished {STAGE_FOLDERS[stage]} in {run.experiment.output}.")
    return manifest


def encoder_note(run: Run, stage: str) -> str:
    """Name of the encoder behind a table of embeddings, and in words where its weights come from."""
    manifest = _manifest(run, stage)
    return f"{manifest.config['encoder']['name']}, {manifest.details['weights_note']}"


def _embedded(run: Run, stage: str) -> Embedded:
    table = storage.read_table(run.folder(stage), ["pano_id", "lat", "lon", "split", "image_embedding"])
    batch = columns_to_batch(table, table.column_names)
    train, test = batch["split"] == "train", batch["split"] == "test"
    return Embedded(
        query_ids=batch["pano_id"][test],
        queries=batch["image_embedding"][test],
        references=batch["image_embedding"][train],
        lat=batch["lat"][train],
        lon=batch["lon"][train],
    )


def _accounting(run: Run) -> list[dict[str, Any]]:
    """Rows in, out and rejected of every table, in the order of the data."""
    return [
        {
            "stage": folder,
            "num_in": manifest.num_in,
            "num_out": manifest.num_out,
            "num_rejected": manifest.num_rejected,
            "reasons": manifest.rejected_reasons,
        }
        for stage, folder in STAGE_FOLDERS.items()
        if stage != "evaluate" and (manifest := storage.read_manifest(run.folder(stage))) is not None
    ]


def _gallery(queries: pd.DataFrame, rows: pd.DataFrame, slicer: PanoramaSlicer) -> list[dict[str, Any]]:
    """Two of the best, two in the middle and two of the worst answers, with the panoramas that decided them."""
    order = queries.sort_values("error_km", ignore_index=True)
    middle = len(order) // 2
    picks = {"best": [0, 1], "typical": [middle, middle + 1], "worst": [len(order) - 1, len(order) - 2]}
    gallery, seen = [], set()
    for kind, places in picks.items():
        for place in places:
            if not 0 <= place < len(order) or place in seen:
                continue
            seen.add(place)
            query = order.iloc[place]
            pairs = list(zip(query["neighbour_ids"], query["neighbour_scores"], strict=True))[:2]
            gallery.append(
                {
                    "kind": kind,
                    "pano_id": query["pano_id"],
                    "strip": _strip(rows.loc[query["pano_id"]]),
                    "frames": _frames(rows.loc[query["pano_id"]], slicer),
                    "error_km": float(query["error_km"]),
                    "truth": (float(query["lat"]), float(query["lon"])),
                    "prediction": (float(query["pred_lat"]), float(query["pred_lon"])),
                    "caption": rows.loc[query["pano_id"], "caption"],
                    "neighbours": [_neighbour(rows.loc[name], name, float(score)) for name, score in pairs],
                }
            )
    return gallery


def _neighbour(row: Mapping[str, Any], name: str, score: float) -> dict[str, Any]:
    place = {"lat": float(row["lat"]), "lon": float(row["lon"])}
    return {"pano_id": name, **place, "score": score, "strip": _strip(row)}


def _frames(row: Mapping[str, Any], slicer: PanoramaSlicer) -> NDArray[np.uint8] | None:
    """The frames (V, S, S, 3) that the encoder saw; None when the image is gone, which `_strip` has said."""
    try:
        if row["projection"] == "bearings":
            item: Any = [read_image(str(uri)) for uri in row["bearing_uri"]]
        else:
            item = read_image(str(row["image_uri"]))
    except OSError:
        return None
    batch = {"image_bytes": [item], **{name: [row[name]] for name in ("projection", "heading", "bearing_deg")}}
    done = slicer({name: _objects(values) for name, values in batch.items()})
    return None if done["failure"][0] is not None else np.asarray(done["frames"][0])


def _objects(values: list[Any]) -> NDArray[Any]:
    column = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):
        column[row] = value
    return column


def _strip(row: Mapping[str, Any], width: int = 640) -> NDArray[np.uint8] | None:
    """A small picture of a panorama for the page; None, with a line in the log, when its image is gone."""
    from PIL import Image

    try:
        bearings = row["bearing_uri"]
        if bearings is not None and len(bearings):
            images = [decode_image(read_image(str(uri))) for uri in bearings]
            image = stitch_bearings(images, list(range(len(images))))
        else:
            image = decode_image(read_image(str(row["image_uri"])))
    except (OSError, ValueError) as error:
        logger.warning("no picture of %s in the report: %s", row["image_uri"], error)
        return None
    height, full = image.shape[:2]
    if full >= 2 * height:  # keep the middle: the poles of an equirectangular image show little
        cut = height // 5
        image = image[cut : height - cut]
    small = Image.fromarray(image).resize((width, max(1, round(width * image.shape[0] / full))))
    return np.asarray(small)
