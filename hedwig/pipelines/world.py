"""Render a synthetic world on Ray: images, a listing that looks like anybody's, and a manifest.

An image that is already there is not drawn again; images are written whole and depend on nothing but their row, so a
killed rendering goes on where it stopped without any bookkeeping.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from hedwig import storage
from hedwig.config import SyntheticConfig
from hedwig.geocells import Geography
from hedwig.pipelines.chain import columns_to_batch
from hedwig.pipelines.cluster import configure_data
from hedwig.pipelines.run import Run
from hedwig.synthetic import PanoramaRenderer, World

__all__ = ["render_world", "synth"]

ROWS_PER_BLOCK = 48
SYNTHETIC_NOTE = "synthetic: procedural panoramas at real coordinates (GeoNames), not photographs"


def synth(run: Run) -> storage.Manifest:
    """The synthetic world of ``data.synthetic``."""
    section = run.experiment.data.synthetic
    if section is None:
        raise ValueError("data.synthetic is not set: there is no world to render.")
    config = section.model_dump(mode="json")
    progress = run.rows_progress("synth")
    return run.make("synth", "world", config, {}, lambda: render_world(run.folder("synth"), section, progress))


def render_world(
    folder: str, section: SyntheticConfig, progress: Callable[[int, int], None] | None = None
) -> storage.Manifest:
    """Draw the panoramas of `section` into ``folder/images`` and write ``folder/panoramas.csv`` and the manifest."""
    started = time.monotonic()
    config = section.model_dump(mode="json")
    wanted = storage.fingerprint("world", config, {})
    marker = storage.join(folder, ".asked")
    if not storage.exists(marker) or storage.read_bytes(marker).decode() != wanted:
        _refuse_to_delete(folder, marker)
        storage.delete(folder)
        storage.write_bytes(marker, wanted.encode())
    rows = World(_places(section), section.seed).rows(section.num, width=section.width)
    there = {os.path.basename(path) for path in storage.list_files(storage.join(folder, "images"))}
    todo = rows[~rows["image_uri"].map(os.path.basename).isin(there)]
    _render(folder, todo, section.width, len(rows) - len(todo), progress)
    listing = rows.drop(columns=["population"]).to_csv(index=False, lineterminator="\n")
    storage.write_bytes(storage.join(folder, "panoramas.csv"), listing.encode())
    return storage.publish(
        folder, kind="world", config=config, inputs={}, num_in=len(rows), num_out=len(rows),
        details={"note": SYNTHETIC_NOTE}, seconds=time.monotonic() - started, skip=("images/",),
    )  # fmt: skip


def _refuse_to_delete(folder: str, marker: str) -> None:
    """Only a folder that a world was made in may be emptied for another one."""
    there = storage.read_manifest(folder)
    ours = storage.exists(marker) or (there is not None and there.kind == "world")
    if not ours and storage.list_files(folder, recursive=True):
        raise ValueError(f"{folder} holds files that are not a synthetic world's; choose an empty folder for it.")


def _places(section: SyntheticConfig) -> pd.DataFrame:
    """The places of the section's countries."""
    places = Geography.default().places()
    if not section.countries:
        return places
    unknown = sorted(set(section.countries) - set(places["country"]))
    if unknown:
        raise ValueError(f"data.synthetic.countries: no place is in {unknown[0]!r}; use ISO 3166-1 alpha-2, like US.")
    return places[places["country"].isin(section.countries)].reset_index(drop=True)


def _render(
    folder: str, rows: pd.DataFrame, width: int, done: int, progress: Callable[[int, int], None] | None
) -> None:
    import ray

    if rows.empty:
        return
    configure_data()
    blocks = [
        pa.Table.from_pandas(rows.iloc[i : i + ROWS_PER_BLOCK], preserve_index=False)
        for i in range(0, len(rows), ROWS_PER_BLOCK)
    ]
    actors = max(1, min(len(blocks), int(ray.cluster_resources().get("CPU", 1)), os.cpu_count() or 1))
    drawn = ray.data.from_arrow(blocks).map_batches(
        _Drawer,
        fn_constructor_kwargs={"folder": folder, "width": width},
        batch_format="pyarrow",
        batch_size=ROWS_PER_BLOCK,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    total, finished = done + len(rows), done
    for batch in drawn.iter_batches(batch_format="pyarrow", batch_size=None):
        finished += batch.num_rows
        if progress is not None:
            progress(finished, total)


class _Drawer:
    """Render rows and write their images; what is returned is only which ones."""

    def __init__(self, folder: str, width: int) -> None:
        self._folder, self._stage = folder, PanoramaRenderer(width=width)

    def __call__(self, table: pa.Table) -> pa.Table:
        names: list[str] = [*self._stage.reads, "population", "image_uri"]
        batch: dict[str, Any] = self._stage(columns_to_batch(table, names))
        for uri, data, failure in zip(batch["image_uri"], batch["image_bytes"], batch["failure"], strict=True):
            if failure is not None:
                raise RuntimeError(f"the renderer failed on {uri}: {failure}; this is a bug, please report it")
            storage.write_bytes(storage.join(self._folder, str(uri)), data)
        return pa.table({"pano_id": np.asarray(batch["pano_id"], dtype=object).astype(str)})
