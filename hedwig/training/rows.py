"""The embedding table as training sees it: checked once on the driver, then each worker's own share of it.

The driver reads the table in a stream and keeps only positions, ids and cells (the plan), sorted by pano_id, so that
neither the order of the rows nor the number of files matters. A worker keeps every num_workers-th training row of the
plan in memory, so that an epoch costs no reading. Where the shares would exceed the memory given, the training rows
are streamed from the files in every epoch by Ray Data instead, shuffled within a buffer; the validation rows are
always kept in memory. Where the head pools frames, the image column holds V vectors a row, one after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import torch
from numpy.typing import NDArray
from torch import Tensor

from hedwig.schema import check_columns
from hedwig.storage import filesystem, open_table, table_files
from hedwig.vectors import read_tensor, read_vectors, vector_form

__all__ = ["Batch", "CachedRows", "Plan", "StreamedRows", "make_plan", "stream"]

POSITION = ("pano_id", "lat", "lon", "split")
SHUFFLE_ROWS = 16_384
BUFFER_BYTES = 2**28  # the shuffle buffer and a batch read from disk; wide rows (V vectors) get fewer


@dataclass(frozen=True)
class Batch:
    """B rows: image (B, Di) or (B, V, Di), text (B, Dt) or None, cell_ids (B,) int64, lat, lon (B,) float64 degrees."""

    image: Tensor
    text: Tensor | None
    cell_ids: Tensor
    lat: Tensor
    lon: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        return Batch(
            self.image.to(device),
            None if self.text is None else self.text.to(device),
            self.cell_ids.to(device),
            self.lat.to(device),
            self.lon.to(device),
        )


@dataclass(frozen=True)
class Plan:
    """What the driver knows of the table.

    Attributes:
        folder: the embedding table.
        image_column: name of the image embedding's column.
        text_column: name of the text embedding's column, None if it is not read.
        image_dim: Di.
        text_dim: Dt, 0 if it is not read.
        rows: pano_id, split, lat, lon, cell_id of the training and validation rows, sorted by pano_id.
        cell_lat: (C,) degrees, centres of the cells.
        cell_lon: (C,) degrees.
        num_frames: V, the vectors in a row's image column; 0 if it holds one, and no pool is to read it.
        parents: for each coarser level in use, the parent (C,) of each cell, below 0 if it has none.
    """

    folder: str
    image_column: str
    text_column: str | None
    image_dim: int
    text_dim: int
    rows: pa.Table
    cell_lat: NDArray[np.float64]
    cell_lon: NDArray[np.float64]
    num_frames: int = 0
    parents: tuple[NDArray[np.int64], ...] = ()

    def count(self, split: str) -> int:
        """Rows of a split."""
        return int(pc.sum(pc.equal(self.rows["split"], split)).as_py() or 0)

    def digest(self) -> str:
        """sha256 over ids, splits, positions, cells and their parents."""
        digest = hashlib.sha256()
        for name in ("pano_id", "split", "lat", "lon", "cell_id"):
            digest.update("\0".join(map(str, self.rows[name].to_pylist())).encode())
        digest.update(self.cell_lat.tobytes() + self.cell_lon.tobytes())
        digest.update(b"".join(parent.tobytes() for parent in self.parents))
        return digest.hexdigest()

    @property
    def bytes_per_row(self) -> int:
        """Memory of one row's embeddings."""
        return 4 * (max(1, self.num_frames) * self.image_dim + self.text_dim)

    def image(self, table: pa.Table) -> Tensor:
        """(N, Di), or (N, V, Di) if frames are pooled, of the image column."""
        flat = _vectors(table, self.image_column)
        return flat.reshape(len(flat), self.num_frames, self.image_dim) if self.num_frames else flat


def _batches(folder: str, columns: list[str], splits: tuple[str, ...]) -> Iterator[pa.Table]:
    wanted = ds.field("split").isin(list(splits)) & ds.field("lat").is_valid() & ds.field("lon").is_valid()
    positioned = wanted & ~pc.is_nan(ds.field("lat")) & ~pc.is_nan(ds.field("lon"))
    dataset = open_table(folder)
    kinds = [dataset.schema.field(name).type for name in columns]
    width = sum(kind.byte_width for kind in kinds if pa.types.is_fixed_size_binary(kind))
    num_rows = max(64, min(8192, BUFFER_BYTES // 4 // (width + 1)))  # the scanner reads several batches ahead
    for batch in dataset.to_batches(columns=columns, filter=positioned, batch_size=num_rows):
        if batch.num_rows:
            yield pa.Table.from_batches([batch])


def _vectors(table: pa.Table, column: str) -> Tensor:
    """(N, D) float32 of a vector column, read-only; zeros where it is null."""
    return read_tensor(table, column, missing=0.0).float()


def make_plan(
    folder: str,
    geocells: Any,
    *,
    image_column: str,
    text_column: str | None,
    num_frames: int = 0,
    parents: tuple[NDArray[np.int64], ...] = (),
) -> Plan:
    """Check the embedding table and give every training and validation row its cell.

    Args:
        folder: the embedding table.
        geocells: has ``table`` with columns lat and lon (row number = cell_id), and ``assign(lat, lon)``.
        image_column: a vector column.
        text_column: likewise; None to leave captions out.
        num_frames: V, where the image column holds so many vectors in a row.
        parents: for each coarser level in use, (C,).

    Raises:
        FileNotFoundError: `folder` holds no table.
        ValueError: a column is missing, its rows are not V vectors long, there is no training row, an id is there
            twice, a training or validation row lies in no cell, or an embedding is not finite.
    """
    vectors = [image_column] + ([text_column] if text_column else [])
    schema = open_table(folder).schema
    check_columns(schema.names, [*POSITION, *vectors], where=f"The embedding table {folder!r}")
    dims = {name: vector_form(schema, name, where=f"The embedding table {folder!r}")[1] for name in vectors}
    if dims[image_column] % max(1, num_frames):
        raise ValueError(
            f"{image_column} of {folder!r} is {dims[image_column]} numbers a row, which are not {num_frames} vectors; "
            "run `hedwig embed` again."
        )
    if text_column and dims[text_column] == 1:
        raise ValueError(
            f"{text_column} of {folder!r} is one zero a row: its encoder reads no text. Set training.use_text=false."
        )
    kept = []
    for table in _batches(folder, [*POSITION, *vectors], ("train", "val")):
        if table[image_column].null_count:
            row = table.filter(table[image_column].is_null())["pano_id"][0]
            raise ValueError(f"{row.as_py()!r} in {folder!r} has no {image_column}; embed it, or take the row out.")
        for name in vectors:
            bad = ~np.isfinite(read_vectors(table, name, missing=0.0)).all(axis=1)
            if bad.any():
                ids = table["pano_id"].to_numpy(zero_copy_only=False)[bad]
                raise ValueError(
                    f"{name} of {bad.sum()} row(s) in {folder!r} holds NaN or infinity, first {ids[0]!r}; embed "
                    "them again, or take them out."
                )
        kept.append(table.select(POSITION))
    rows = pa.concat_tables(kept).combine_chunks().sort_by("pano_id") if kept else None
    if rows is None or not pc.any(pc.equal(rows["split"], "train")).as_py():
        raise ValueError(
            f"{folder!r} has no training rows: none has split 'train' and a position. Check the listing and the split."
        )
    ids = rows["pano_id"].to_numpy(zero_copy_only=False)
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise ValueError(f"{folder!r} holds {twice[0]!r} twice; ids must be unique.")
    cell_lat = np.asarray(geocells.table["lat"], dtype=np.float64)
    cell_lon = np.asarray(geocells.table["lon"], dtype=np.float64)
    cell_ids = np.asarray(geocells.assign(rows["lat"].to_numpy(), rows["lon"].to_numpy()), dtype=np.int64)
    if cell_ids.min() < 0 or cell_ids.max() >= len(cell_lat):
        where = int(np.flatnonzero((cell_ids < 0) | (cell_ids >= len(cell_lat)))[0])
        raise ValueError(f"{ids[where]!r} lies in no geocell (cell_id {cell_ids[where]} of {len(cell_lat)} cells).")
    return Plan(
        folder=folder,
        image_column=image_column,
        text_column=text_column,
        image_dim=dims[image_column] // max(1, num_frames),
        text_dim=dims[text_column] if text_column else 0,
        rows=rows.append_column("cell_id", pa.array(cell_ids)),
        cell_lat=cell_lat,
        cell_lon=cell_lon,
        num_frames=num_frames,
        parents=parents,
    )


class CachedRows:
    """Rows of one split kept in memory: number `rank`, `rank` + `world`, ... of the plan's.

    Args:
        plan: of the table.
        split: 'train' or 'val'.
        rank: of this worker.
        world: number of workers.
    """

    def __init__(self, plan: Plan, split: str, *, rank: int, world: int) -> None:
        mine = plan.rows.filter(pc.equal(plan.rows["split"], split)).combine_chunks()
        mine = mine.take(np.arange(rank, len(mine), world)) if len(mine) else mine
        self.lat = torch.from_numpy(mine["lat"].to_numpy().copy())
        self.lon = torch.from_numpy(mine["lon"].to_numpy().copy())
        self.cell_ids = torch.from_numpy(mine["cell_id"].to_numpy().copy())
        frames = (plan.num_frames,) if plan.num_frames else ()
        self.image = torch.zeros(len(mine), *frames, plan.image_dim)
        self.text = torch.zeros(len(mine), plan.text_dim) if plan.text_column else None
        ids = mine["pano_id"].combine_chunks() if len(mine) else pa.array([], pa.string())
        columns = ["pano_id", plan.image_column] + ([plan.text_column] if plan.text_column else [])
        for table in _batches(plan.folder, columns, (split,)):
            place = pc.index_in(table["pano_id"], value_set=ids)
            table = table.filter(place.is_valid())
            to = torch.from_numpy(place.drop_null().to_numpy().astype(np.int64))
            self.image[to] = plan.image(table)
            if self.text is not None and plan.text_column:
                self.text[to] = _vectors(table, plan.text_column)

    def __len__(self) -> int:
        return len(self.lat)

    def to(self, device: torch.device) -> CachedRows:
        """Move all rows to `device`, so that no step waits for a copy."""
        self.lat, self.lon, self.cell_ids = (part.to(device) for part in (self.lat, self.lon, self.cell_ids))
        self.image = self.image.to(device)
        self.text = None if self.text is None else self.text.to(device)
        return self

    def batches(
        self, batch_size: int, *, num_rows: int, order: torch.Generator | None = None, seed: int = 0
    ) -> Iterator[Batch]:
        """`num_rows` rows in batches; shuffled by `order`, else as in the plan. `seed` is for streamed rows."""
        del seed
        index = torch.arange(len(self)) if order is None else torch.randperm(len(self), generator=order)
        for rows in torch.split(index[:num_rows].to(self.image.device), batch_size):
            text = None if self.text is None else self.text[rows]
            yield Batch(self.image[rows], text, self.cell_ids[rows], self.lat[rows], self.lon[rows])


class AssignCells:
    """Adds cell_id to Arrow batches; not a stage on numpy, because Ray would turn the vectors into another type.

    Args:
        geocells: the artefact's folder.
    """

    def __init__(self, *, geocells: str) -> None:
        from hedwig.geocells import Geocells

        self.geocells = Geocells.load(geocells)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Append cell_id, int64, from lat and lon."""
        cell_ids = self.geocells.assign(table["lat"].to_numpy(), table["lon"].to_numpy())
        return table.append_column("cell_id", pa.array(np.asarray(cell_ids, dtype=np.int64)))


def stream(plan: Plan, geocells: str) -> Any:
    """The training rows as a Ray dataset, read anew in every epoch."""
    import ray.data
    from ray.data.expressions import col

    columns = [*POSITION, plan.image_column] + ([plan.text_column] if plan.text_column else [])
    dataset = ray.data.read_parquet(
        [filesystem(f)[1] for f in table_files(plan.folder)],
        filesystem=filesystem(plan.folder)[0],
        columns=columns,
    ).filter(expr=(col("split") == "train") & (col("lat") >= -90.0))  # which neither null nor NaN is
    dataset.context.enable_progress_bars = False
    return dataset.map_batches(
        AssignCells,
        fn_constructor_kwargs={"geocells": geocells},
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.5,
        batch_size=4096,
        batch_format="pyarrow",
    )


class StreamedRows:
    """Rows of one worker's share of a Ray dataset, shuffled within a buffer, read anew in every epoch.

    Args:
        plan: of the table.
        shard: what ``ray.train.get_dataset_shard`` returns.
    """

    def __init__(self, plan: Plan, shard: Any) -> None:
        self.plan = plan
        self.shard = shard

    def batches(
        self, batch_size: int, *, num_rows: int, order: torch.Generator | None = None, seed: int = 0
    ) -> Iterator[Batch]:
        """`num_rows` rows in batches, in an order decided by `seed` as far as the reading is deterministic."""
        del order
        left = num_rows
        buffer = max(min(SHUFFLE_ROWS, BUFFER_BYTES // self.plan.bytes_per_row), 2 * batch_size)
        for rows in self.shard.iter_batches(
            batch_size=batch_size,
            batch_format="pyarrow",
            local_shuffle_buffer_size=buffer,
            local_shuffle_seed=seed,
        ):
            rows = rows.slice(0, left)
            left -= len(rows)
            text = self.plan.text_column
            yield Batch(
                self.plan.image(rows),
                _vectors(rows, text) if text else None,
                *(torch.from_numpy(rows[name].to_numpy().copy()) for name in ("cell_id", "lat", "lon")),
            )
            if left == 0:
                return
