"""The first stage: a listing becomes the panorama table, checked row by row and divided into splits."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hedwig import storage
from hedwig.geocells import Geography, refuse_swapped
from hedwig.pipelines.rows import enforce_max_rejected
from hedwig.pipelines.run import Run
from hedwig.sources import check_listing, random_split, read_listing, spatial_split
from hedwig.sources.leaks import leak_report
from hedwig.sources.synthesised import is_synthesised, keep_out_of_evaluation

__all__ = ["count_values", "geography_of", "panoramas"]

logger = logging.getLogger(__name__)


def panoramas(run: Run) -> storage.Manifest:
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

    def build() -> storage.Manifest:
        started = time.monotonic()
        folder = run.folder("panoramas")
        storage.delete(folder)
        rows = read_listing(listing)
        checked = check_listing(rows, image_root=root, layout=data.layout)
        located = rows[rows["lat"].notna() & rows["lon"].notna()]
        refuse_swapped(located["lat"], located["lon"], located["country"].tolist(), geography_of(run))
        table = _with_splits(checked.panoramas, data.split.model_dump())
        leaks = leak_report(table, method=data.split.method)
        if not leaks["clean"]:
            logger.warning("panoramas %s", leaks["sentence"])
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
            details={"num_images": checked.num_images, "splits": count_values(table["split"]), "leaks": leaks},
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
        return _made_follow_origin(table, unknown_may_train=True)
    known = np.asarray(pc.is_valid(table["lat"]))
    sides = np.array(table["split"].to_pylist(), dtype=object)
    shares = {name: split[name] for name in ("val_fraction", "test_fraction", "seed")}
    located = table.filter(pa.array(known))
    if split["method"] == "random":
        # A made row has the side of the row that it was made from.
        ids = zip(located["made_from"].to_pylist(), located["pano_id"].to_pylist(), strict=True)
        sides[known] = random_split([origin or pano_id for origin, pano_id in ids], **shares)
    else:
        lat, lon = located["lat"].to_numpy(), located["lon"].to_numpy()
        space = {name: split[name] for name in ("block_km", "buffer_km")}
        sides[known] = spatial_split(lat, lon, located["sequence"].to_pylist(), **space, **shares)
    place = table.column_names.index("split")
    table = table.set_column(place, table.schema.field("split"), pa.array(sides, pa.string()))
    return _made_follow_origin(table, unknown_may_train=False)


def _made_follow_origin(table: pa.Table, *, unknown_may_train: bool) -> pa.Table:
    """Made rows into 'buffer', unless they are in training and the row that each was made from is, too.

    A made panorama copies its origin's place: with a held-out origin, or in a held-out block, it is neither scored nor
    trained on. Where the origin is not in the table, only a split that somebody wrote down is believed.
    """
    table = keep_out_of_evaluation(table, instead="buffer")
    sides = table["split"].to_pylist()
    side_of = dict(zip(table["pano_id"].to_pylist(), sides, strict=True))
    rows = zip(table["source"].to_pylist(), table["made_from"].to_pylist(), strict=True)
    for row, (source, origin) in enumerate(rows):
        if is_synthesised(source) and sides[row] == "train":
            origin_side = side_of.get(origin)
            leaks = origin_side in ("val", "test", "buffer") or (origin_side is None and not unknown_may_train)
            sides[row] = "buffer" if leaks else "train"
    place = table.column_names.index("split")
    return table.set_column(place, table.schema.field("split"), pa.array(sides, pa.string()))


def _write_parts(folder: str, table: pa.Table, rows_per_file: int = 50_000) -> None:
    table = table.sort_by("pano_id")
    for number, start in enumerate(range(0, max(1, table.num_rows), rows_per_file)):
        part = table.slice(start, rows_per_file)
        storage.write_table(storage.join(folder, f"part-{number:05d}.parquet"), part)


def count_values(column: Any) -> dict[str, int]:
    """How often each value of an Arrow column occurs."""
    return {str(item["values"]): int(item["counts"]) for item in pc.value_counts(column.combine_chunks()).to_pylist()}


def geography_of(run: Run) -> Geography:
    """The administrative hierarchy: the user's polygons, or the offline default."""
    polygons = run.experiment.geocells.polygons
    if polygons is None:
        return Geography.default()
    given: dict[str, Any] = {name: value for name, value in polygons.model_dump().items() if value is not None}
    for name in ("admin0", "admin1", "admin2"):
        if name in given:
            paths = given[name]
            given[name] = storage.resolve(paths) if isinstance(paths, str) else [storage.resolve(p) for p in paths]
    return Geography.from_polygons(**given)
