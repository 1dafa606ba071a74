"""How fast the head trains on Ray Train, beside a bare PyTorch loop over the same rows in the same run.

Synthetic embeddings are written as an embedding table and trained on from there, by the function that the pipeline
uses (handed in, because the modules of this floor do not import each other). The bare loop is what one would write
without Ray: the rows in memory, the same model, loss, optimiser, batch size and threads, and no metrics, checkpoints
or schedule. One epoch of it runs before and one after, because other work on the machine comes and goes. An epoch of
Ray Train's counts from the end of the epoch before, so its checkpoint is in it; start-up and reading are not.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hedwig.geo import lat_lon
from hedwig.geocells import Geocells
from hedwig.losses import haversine_smoothing_loss, haversine_targets
from hedwig.models.geolocator import Geolocator, GeolocatorConfig
from hedwig.schema import vector_field
from hedwig.storage import write_table
from hedwig.vectors import vector_array

__all__ = ["Rows", "TrainingFigures", "bare_epoch", "measure_training", "synthetic_table"]

PART_ROWS = 16_384
TAU_KM, LEARNING_RATE, WEIGHT_DECAY = 75.0, 1e-3, 0.01
WARM_UP_STEPS = 5


@dataclass(frozen=True)
class TrainingFigures:
    """One measurement; medians over epochs, ratios above 1 where Ray Train is the faster one."""

    ratio_to_bare_loop: float
    ratio_to_bare_loop_cpu: float
    epoch_seconds: float
    epoch_cpu_seconds: float
    bare_epoch_seconds: float
    bare_epoch_cpu_seconds: float
    rows_per_s: float
    total_seconds: float
    num_rows: int
    dim: int
    num_cells: int
    num_workers: int
    num_threads: int
    num_epochs: int
    batch_size: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For readers."""
        return "\n".join(
            [
                f"{self.num_rows:,} x {self.dim} embeddings, {self.num_cells:,} cells, batches of {self.batch_size}, "
                f"{self.num_workers} worker(s) of {self.num_threads // max(1, self.num_workers)} thread(s)",
                f"  {self.epoch_seconds:.4g} s an epoch, {self.epoch_cpu_seconds:.4g} CPU s, "
                f"{self.rows_per_s:,.0f} rows/s (median of {self.num_epochs})",
                f"  bare loop {self.bare_epoch_seconds:.4g} s, {self.bare_epoch_cpu_seconds:.4g} CPU s: Ray Train at "
                f"{self.ratio_to_bare_loop:.2f} of it, in CPU time {self.ratio_to_bare_loop_cpu:.2f}",
                f"  {self.total_seconds:.4g} s altogether with starting Ray's workers and reading the table",
            ]
        )


def measure_training(
    train: Callable[..., dict[str, Any]],
    *,
    num_rows: int = 240_000,
    dim: int = 1536,
    num_cells: int = 2000,
    num_workers: int = 1,
    num_threads: int = 1,
    num_epochs: int = 3,
    batch_size: int = 256,
) -> TrainingFigures:
    """Train on synthetic embeddings; Ray must be running unless `num_workers` is 0.

    Args:
        train: `hedwig.training.train_geolocator`.
        num_rows: N, all for training.
        dim: of image and caption together, half each.
        num_cells: C.
        num_workers: Ray Train workers; 0 for this process.
        num_threads: of the bare loop, and of all workers together.
        num_epochs: on Ray Train.
        batch_size: rows per step over all workers together.
    """
    if num_threads < max(1, num_workers) or dim < 2 or dim % 2:
        raise ValueError(
            f"Need a thread per worker and an even dim; got {num_threads} threads for {num_workers} workers, {dim}."
        )
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with tempfile.TemporaryDirectory(prefix="hedwig-bench-") as folder:
            rows, cells = synthetic_table(folder, num_rows=num_rows, dim=dim, num_cells=num_cells)
            bare = [bare_epoch(rows, cells, batch_size)]
            began = time.perf_counter()
            metrics = train(
                embeddings=str(Path(folder, "embeddings")),
                geocells=str(Path(folder, "geocells")),
                output=str(Path(folder, "output")),
                scratch=str(Path(folder, "scratch")),
                run_name="bench",
                loss="haversine",
                tau_km=TAU_KM,
                epochs=num_epochs,
                batch_size=batch_size,
                learning_rate=LEARNING_RATE,
                weight_decay=WEIGHT_DECAY,
                num_workers=num_workers,
                cpus_per_worker=num_threads // max(1, num_workers),
                memory_budget_gib=float("inf"),
            )
            total = time.perf_counter() - began
            bare.append(bare_epoch(rows, cells, batch_size))
            epochs = _epochs(Path(folder, "output", "metrics.jsonl"))
    finally:
        torch.set_num_threads(before)
    bare_s, bare_cpu_s = (statistics.mean(values) for values in zip(*bare, strict=True))
    epoch_s, epoch_cpu_s = (statistics.median(values) for values in zip(*epochs, strict=True))
    epoch_cpu_s *= max(1, num_workers)  # what is noted is the first worker's
    return TrainingFigures(
        ratio_to_bare_loop=bare_s / epoch_s,
        ratio_to_bare_loop_cpu=bare_cpu_s / epoch_cpu_s,
        epoch_seconds=epoch_s,
        epoch_cpu_seconds=epoch_cpu_s,
        bare_epoch_seconds=bare_s,
        bare_epoch_cpu_seconds=bare_cpu_s,
        rows_per_s=num_rows / epoch_s,
        total_seconds=total,
        num_rows=int(metrics["num_train"]),
        dim=dim,
        num_cells=num_cells,
        num_workers=num_workers,
        num_threads=num_threads,
        num_epochs=num_epochs,
        batch_size=batch_size,
    )


def _epochs(metrics: Path) -> list[tuple[float, float]]:
    """Seconds and CPU seconds of each epoch."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [(row["seconds"], row["train_cpu_seconds"]) for row in rows]


@dataclass(frozen=True)
class Rows:
    """Image and text (N, D/2), cell_ids (N,) int64, lat and lon (N,) float64 degrees."""

    image: Tensor
    text: Tensor
    cell_ids: Tensor
    lat: Tensor
    lon: Tensor


def synthetic_table(folder: str, *, num_rows: int, dim: int, num_cells: int) -> tuple[Rows, Geocells]:
    """Write ``embeddings`` and ``geocells`` into `folder`, and give what they hold.

    Cells are single places all over the globe; a row's embedding is its cell's random vector and noise.
    """
    rng = np.random.default_rng(0)
    place_lat, place_lon = lat_lon(rng.standard_normal((num_cells, 3)))
    cells = Geocells.from_membership(place_lat, place_lon, np.arange(num_cells))
    cells.save(Path(folder, "geocells"))
    ids = rng.integers(0, num_cells, num_rows)
    lat, lon = (np.asarray(cells.table[name])[ids] for name in ("lat", "lon"))
    parts: dict[str, list[NDArray[np.float32]]] = {"image": [], "text": []}
    for vectors in parts.values():
        centre = rng.standard_normal((num_cells, dim // 2), dtype=np.float32)
        for part in range(0, num_rows, PART_ROWS):
            own = ids[part : part + PART_ROWS]
            some = centre[own] + rng.standard_normal((len(own), dim // 2), dtype=np.float32)
            vectors.append(some / np.linalg.norm(some, axis=1, keepdims=True))
    for number, part in enumerate(range(0, num_rows, PART_ROWS)):
        here = slice(part, part + PART_ROWS)
        names = [f"{i:09d}" for i in range(part, part + len(lat[here]))]
        table = pa.table({"pano_id": names, "lat": lat[here], "lon": lon[here], "split": ["train"] * len(names)})
        for name, vectors in parts.items():
            field = vector_field(f"{name}_embedding", dim // 2)
            table = table.append_column(field, vector_array(vectors[number], field))
        write_table(str(Path(folder, "embeddings", f"part-{number:05d}.parquet")), table)
    image, text = (torch.from_numpy(np.concatenate(parts.pop(name))) for name in ("image", "text"))
    return Rows(image, text, torch.from_numpy(ids), torch.from_numpy(lat), torch.from_numpy(lon)), cells


def bare_epoch(rows: Rows, cells: Geocells, batch_size: int) -> tuple[float, float]:
    """Seconds and CPU seconds of one epoch of the plain loop, with a new model."""
    torch.manual_seed(0)
    half = rows.image.shape[1]
    config = GeolocatorConfig(
        image_dim=half, text_dim=half, use_text=True, projection_dim=768, num_cells=len(cells.table)
    )
    model = Geolocator(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    cell_lat, cell_lon = (torch.tensor(np.asarray(cells.table[name])) for name in ("lat", "lon"))

    def steps(order: Tensor) -> None:
        for index in torch.split(order, batch_size):
            logits = model(rows.image[index], rows.text[index])[1]
            targets = haversine_targets(
                cell_lat, cell_lon, rows.lat[index], rows.lon[index], None, tau_km=TAU_KM, normalised=True
            )
            loss = haversine_smoothing_loss(logits, targets)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

    order = torch.randperm(len(rows.lat))
    steps(order[: WARM_UP_STEPS * batch_size])
    began, cpu_began = time.perf_counter(), time.process_time()
    steps(order)
    return time.perf_counter() - began, time.process_time() - cpu_began
