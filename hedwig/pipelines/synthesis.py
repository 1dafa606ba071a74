"""Make panoramas from captions on Ray: images, a listing that says of every row that it was made, and a manifest.

One panorama asked for is one row, whether it is the first or the third of a caption, so that `map_rows` can account for
each and go on after a kill. Only training rows may ask: a panorama made from a held-out row's caption would carry its
place into training. Images are written before their row is committed and depend on nothing but their row, so an image
that is written twice is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hedwig import storage
from hedwig.config import ClusterConfig, EmbedConfig
from hedwig.diffusion import PanoramaGenerator, check_checkpoint
from hedwig.panorama import Slicing, decode_image, slice_panorama
from hedwig.pipelines.asked import read_asked
from hedwig.pipelines.chain import Step
from hedwig.pipelines.cluster import ray_running
from hedwig.pipelines.rows import RowsTask, map_rows
from hedwig.schema import PANORAMAS
from hedwig.sources import ImageReader
from hedwig.sources.synthesised import SYNTHESISED

__all__ = ["LICENCE", "made_schema", "synthesize"]

LICENCE = "synthetic image; the terms of the model that made it apply"
NOTE = "made by a diffusion model, not photographs: for training, never for evaluation"
VIEW_PX = 512
SPHERE_RATIO, RATIO_TOLERANCE = 2.0, 0.05
OURS = ("images", "rows", "captions", "panoramas.csv")
Batch = dict[str, NDArray[Any]]


def made_schema() -> pa.Schema:
    """The panorama columns, and how each panorama was made."""
    made = {
        "caption": pa.string(),
        "prompt": pa.string(),
        "num_words_cut": pa.int32(),
        "seam_ratio": pa.float64(),
        "seed": pa.int64(),
    }
    schema = PANORAMAS
    for name, kind in made.items():
        schema = schema.append(pa.field(name, kind))
    return schema


def synthesize(
    source: str,
    out: str,
    *,
    generator: Mapping[str, Any],
    num_images_per_row: int = 1,
    licence: str = LICENCE,
    max_rejected: float = 0.05,
    pool: EmbedConfig | None = None,
    cluster: ClusterConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> storage.Manifest:
    """Make panoramas for the training rows of `source` and write images/, panoramas.csv and rows/ into `out`.

    Args:
        source: a captions table (folder), or a .csv, .tsv or .parquet file with a column `caption`.
        out: folder or URI; the same call continues what a killed one began.
        generator: arguments of `PanoramaGenerator`; its folders must be the same on every machine.
        num_images_per_row: panoramas per caption, each of its own noise.
        licence: what the rows say.
        max_rejected: share (< 1) or count of panoramas that may fail.
        pool: actors and batches; None for one actor, with a GPU where Ray has one.
        cluster: which Ray; None for a local one.
        progress: called with (panoramas made, panoramas asked for).

    Raises:
        FileNotFoundError: no source, no model, or a part of it is not there.
        ValueError: nothing may be made of the source, the checkpoint does not fit, or `out` holds images or a listing
            that are not ours.
        TooManyRejected: more panoramas failed than `max_rejected` allows.
    """
    started = time.monotonic()
    if num_images_per_row < 1:
        raise ValueError(f"num_images_per_row is {num_images_per_row}; it must be at least 1.")
    source, out = storage.resolve(source), storage.resolve(out)
    options = {key: value for key, value in generator.items() if value is not None}
    asked = read_asked(source)
    config = _config(options, num_images_per_row, licence)
    inputs = {"captions": asked.digest}
    wanted = storage.fingerprint("synthesis", config, inputs)
    there = storage.read_manifest(out)
    num_faulty = (asked.table.num_rows - asked.table["fault"].null_count) * num_images_per_row
    finished = there is not None and there.fingerprint == wanted and storage.exists(storage.join(out, "panoramas.csv"))
    # A row that is wrong stays wrong; the others that failed may succeed this time.
    if there is not None and finished and there.num_rejected <= num_faulty:
        return there
    _begin(out, wanted)
    table = _one_row_per_panorama(asked.table, num_images_per_row, config, with_view="controlnet" in options)
    storage.write_table(storage.join(out, "captions", "part-00000.parquet"), table)
    with ray_running(cluster or ClusterConfig()):
        task = RowsTask(
            kind="rows",
            source=storage.join(out, "captions"),
            folder=storage.join(out, "rows"),
            steps=_steps(out, options),
            schema=made_schema(),
            config=config,
            inputs=inputs,
            pool=pool or _pool(),
            max_rejected=max_rejected,
        )
        made = map_rows(task, progress)
    rows = storage.read_table(storage.join(out, "rows"))
    storage.write_bytes(storage.join(out, "panoramas.csv"), _listing(rows))
    return storage.publish(
        out,
        kind="synthesis",
        config=config,
        inputs=inputs,
        num_in=made.num_in,
        num_out=made.num_out,
        num_rejected=made.num_rejected,
        rejected_reasons=made.rejected_reasons,
        details={
            "note": NOTE,
            "left_out": asked.left_out,
            "split_unknown": asked.split_unknown,
            **_summary(rows),
        },
        seconds=time.monotonic() - started,
        skip=("images/", "rows/", "captions/", "panoramas.card."),
    )


def _config(options: Mapping[str, Any], num_images_per_row: int, licence: str) -> dict[str, Any]:
    """The settings that the panoramas depend on; models by name and digest, not by where they lie."""
    checkpoint = check_checkpoint(options["model"])
    config = {key: value for key, value in options.items() if key not in ("model", "device", "template")}
    template = options.get("template")
    if template is not None:
        config["template"] = [template.prefix, template.suffix, template.negative]
    name = checkpoint.name
    for part in ("controlnet", "lora"):
        if part in options:
            folder = storage.resolve(options[part])
            config[part] = _digest(folder)
            name += f"+{os.path.basename(folder.rstrip('/'))}"
    facts = {"model": name, "model_digest": checkpoint.digest(), "family": checkpoint.family}
    settings = {**config, **facts, "num_images_per_row": num_images_per_row, "licence": licence}
    result: dict[str, Any] = json.loads(json.dumps(settings))  # as a manifest will give it back
    return result


def _digest(folder: str) -> str:
    files = [f for f in storage.list_files(folder) if f.endswith((".safetensors", ".bin", ".json"))]
    if not files:
        raise FileNotFoundError(f"{folder!r} holds no weights; name the folder of the ControlNet or LoRA.")
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _begin(out: str, wanted: str) -> None:
    """Delete what other settings left of ours in `out`, and nothing else; without our marker nothing there is ours."""
    marker = storage.join(out, ".asked")
    if not storage.exists(marker):
        others = [name for name in OURS if storage.exists(storage.join(out, name))]
        if others:
            raise ValueError(f"{out} holds {', '.join(others)}, and not from a synthesis; choose an empty --out.")
    elif storage.read_bytes(marker).decode() != wanted:
        for name in OURS:
            storage.delete(storage.join(out, name))
    storage.delete(storage.join(out, storage.MANIFEST))
    storage.write_bytes(marker, wanted.encode())


def _one_row_per_panorama(asked: pa.Table, num: int, config: Mapping[str, Any], *, with_view: bool) -> pa.Table:
    """The rows of the panoramas to make: new ids, marked as made, in the training split."""
    rows = []
    marks = {
        "split": "train",
        "source": f"{SYNTHESISED}{config['model']}",
        "licence": config["licence"],
        "captured_at": None,
        "sha256": None,
        "fov_deg": None,
    }
    for row in asked.to_pylist():
        stem = row["pano_id"]
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", stem):  # it becomes a file's name
            stem = hashlib.sha256(stem.encode()).hexdigest()[:22]
        # Without a view the model has chosen the heading, and nobody knows which.
        known = {} if with_view else {"heading": None}
        for number in range(num):
            new = f"{stem}-s{config.get('seed', 0)}-{number}"
            rows.append({**row, **marks, **known, "pano_id": new, "made_from": row["pano_id"]})
    return pa.Table.from_pylist(rows, schema=asked.schema)


def _steps(out: str, options: Mapping[str, Any]) -> list[Step]:
    steps = [Step(AskedRows)]
    if "controlnet" in options:
        fov = options.get("view_fov_deg", 90.0)
        view = Slicing(mode="perspective", num_frames=1, frame_px=VIEW_PX, fov_deg=fov, headings_deg=(0.0,))
        steps += [Step(ImageReader), Step(FrontView, {"view": view})]
    ending = {"jpeg": ".jpg", "png": ".png"}[options.get("image_format", "jpeg")]
    folder = storage.join(out, "images")
    return [*steps, Step(PanoramaGenerator, options), Step(PanoramaWriter, {"folder": folder, "ending": ending})]


def _pool() -> EmbedConfig:
    import ray

    with_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    return EmbedConfig(num_gpus=1.0 if with_gpu else 0.0, batch_size=8 if with_gpu else 2, rows_per_block=16)


class AskedRows:
    """Stage: turns away the rows whose listing was wrong, with the reason."""

    reads = ("pano_id", "fault")
    writes: tuple[str, ...] = ()

    def __call__(self, batch: Batch) -> Batch:
        """Add `failure` (B,) from `fault`."""
        return {**batch, "failure": batch["fault"]}


class FrontView:
    """Stage: the one square view around which a panorama is made.

    Of a sphere it is the middle, rectilinear; of a photograph the middle square, taken to have the view's field of
    view. Where the listing does not say which it is, an image that is not about twice as wide as high is a photograph.

    Args:
        view: one perspective frame at the middle.
    """

    reads = ("image_bytes", "projection", "projection_known")
    writes = ("frames",)

    def __init__(self, *, view: Slicing) -> None:
        self._view = view

    def __call__(self, batch: Batch) -> Batch:
        """Add `frames` (B, 1, S, S, 3) uint8."""
        size, side = len(batch["image_bytes"]), self._view.frame_px
        frames, failures = np.zeros((size, 1, side, side, 3), np.uint8), np.full(size, None, dtype=object)
        for row in range(size):
            try:
                frames[row] = self._frames(*(batch[name][row] for name in self.reads))
            except ValueError as error:
                failures[row] = str(error)
        return {**batch, "frames": frames, "failure": failures}

    def _frames(self, data: Any, projection: str, known: bool) -> NDArray[np.uint8]:
        if projection == "bearings":
            raise ValueError("Separate bearings have no view in front: stitch them first (hedwig stitch).")
        image = decode_image(data)
        height, width, _ = image.shape
        if not known:
            is_sphere = abs(width / height - SPHERE_RATIO) <= RATIO_TOLERANCE
            projection = "equirectangular" if is_sphere else "perspective"
        if projection == "perspective":
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            image = image[top : top + side, left : left + side]
        return slice_panorama(image, self._view, projection=projection)


class PanoramaWriter:
    """Stage: writes `image_bytes` into a folder and says where.

    Args:
        folder: folder or URI of the images.
        ending: of their names.
    """

    reads = ("pano_id", "image_bytes")
    writes = ("image_uri", "sha256", "projection", "bearing_uri", "bearing_deg")

    def __init__(self, *, folder: str, ending: str) -> None:
        self._folder, self._ending = folder, ending

    def __call__(self, batch: Batch) -> Batch:
        """Add `image_uri` (B,), and what every panorama made is: one equirectangular image."""
        size = len(batch["pano_id"])
        uris, digests, failures = (np.full(size, None, dtype=object) for _ in range(3))
        for row, pano_id in enumerate(batch["pano_id"]):
            uri = storage.join(self._folder, f"{pano_id}{self._ending}")
            try:
                storage.write_bytes(uri, batch["image_bytes"][row])
            except OSError as error:
                failures[row] = f"image not writable: {error}"
            uris[row], digests[row] = uri, hashlib.sha256(batch["image_bytes"][row]).hexdigest()
        nothing = np.full(size, None, dtype=object)
        made = {"image_uri": uris, "sha256": digests, "projection": np.full(size, "equirectangular", dtype=object)}
        return {**batch, **made, "bearing_uri": nothing, "bearing_deg": nothing, "failure": failures}


def _listing(rows: pa.Table) -> bytes:
    frame = rows.drop_columns(["bearing_uri", "bearing_deg"]).to_pandas()
    frame["image_uri"] = [f"images/{os.path.basename(uri)}" for uri in frame["image_uri"]]
    text: str = frame.to_csv(index=False, lineterminator="\n")
    return text.encode()


def _summary(rows: pa.Table) -> dict[str, Any]:
    ratio = rows["seam_ratio"].to_numpy()
    cut = rows["num_words_cut"].to_numpy()
    return {
        "seam_ratio_median": round(float(np.median(ratio)), 4) if len(ratio) else None,
        "seam_ratio_p95": round(float(np.quantile(ratio, 0.95)), 4) if len(ratio) else None,
        "num_captions_cut": int((cut > 0).sum()),
        "made_from": len(Counter(rows["made_from"].to_pylist())),
    }
