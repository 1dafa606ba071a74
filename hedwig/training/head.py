"""Training the geolocator head: the projection and the geocell classifier, on embeddings that are already there.

The encoder never runs here, so an epoch over a few thousand panoramas takes a fraction of a second and fifty are
affordable (the paper did one). The driver checks the table before Ray is asked for anything; workers keep their share
of it in memory, on the GPU if there is one (see `hedwig.training.rows`). What is minimised is decided in
`hedwig.training.criterion`. The epoch with the lowest validation loss is kept, and its temperature is then fitted on
the validation rows. Without validation rows the last epoch is kept and the temperature is 1.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray.train
import ray.train.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hedwig.geo import haversine_km
from hedwig.models.geolocator import Geolocator, GeolocatorConfig
from hedwig.storage import join, resolve, write_bytes
from hedwig.training.calibration import calibration_figures, fit_temperature
from hedwig.training.criterion import Criterion, check_losses, parents_of
from hedwig.training.loop import (
    Reporter,
    gather,
    jsonl,
    payload_of,
    restore,
    run,
    schedule,
    seeded,
    sum_over_workers,
)
from hedwig.training.rows import CachedRows, Plan, StreamedRows, make_plan, stream
from hedwig.training.tracking import Tracker

__all__ = ["train_geolocator"]

EVALUATION_ROWS = 4096


def train_geolocator(
    *,
    embeddings: str,
    geocells: str,
    output: str,
    scratch: str,
    run_name: str,
    image_column: str = "image_embedding",
    text_column: str = "text_embedding",
    num_frames: int = 0,
    use_text: bool = True,
    projection_dim: int = 768,
    hidden_dim: int = 0,
    cosine: bool = False,
    loss: Literal["ce", "mse", "haversine", "haversine_raw"] = "haversine",
    tau_km: float = 75.0,
    hierarchy_weights: tuple[float, ...] = (),
    contrastive_weight: float = 0.0,
    near_km: float = 25.0,
    far_km: float = 200.0,
    epochs: int = 50,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup_fraction: float = 0.05,
    caption_dropout: float = 0.0,
    patience: int = 10,
    num_workers: int = 1,
    min_workers: int | None = None,
    cpus_per_worker: int = 1,
    use_gpu: bool = False,
    bf16: bool = False,
    seed: int = 0,
    memory_budget_gib: float = 2.0,
    checkpoint_interval_s: float = 2.0,
) -> dict[str, Any]:
    """Train a geolocator and write model.safetensors, model.json and metrics.jsonl into `output`.

    For a fixed seed and number of workers the result is the same whatever the order of the rows in the files (not so
    for a table that is streamed).

    Args:
        embeddings: folder of the embedding table.
        geocells: folder of the geocells.
        output: folder or URI for the result; each file appears whole.
        scratch: folder or URI for checkpoints, reachable by all workers.
        run_name: the same name and scratch continue a run that was killed; a finished one only writes its result.
        image_column: column of the image embedding.
        text_column: column of the text embedding.
        num_frames: V, where the image column holds the vectors of V frames, which the head then learns to pool.
        use_text: read the captions' embeddings.
        projection_dim: P.
        hidden_dim: width of the hidden layer, 0 for none.
        cosine: logits are scaled cosines.
        loss: 'ce', 'mse' (the Brier score), or haversine smoothing with targets normalised ('haversine') or as
            published ('haversine_raw').
        tau_km: length over which smoothed targets fall by e; 75 in PIGEON, 65 in PIGEOTTO.
        hierarchy_weights: of the cross entropy over the coarser levels of the geocells, the coarsest first.
        contrastive_weight: of the contrastive loss over pairs in a batch; 0 for none.
        near_km: panoramas nearer than this attract each other's projected embeddings.
        far_km: panoramas farther than this repel each other's.
        epochs: at most so many.
        batch_size: rows per step over all workers together.
        learning_rate: AdamW's, at the top of the schedule.
        weight_decay: AdamW's; not applied to biases and the scale.
        warmup_fraction: share of the steps in which the learning rate rises.
        caption_dropout: share of training rows whose caption is replaced by zeros in a step, so that the head also
            works on an image alone.
        patience: stop after so many epochs without a lower validation loss.
        num_workers: Ray Train workers; 0 trains in this process.
        min_workers: begin and go on with as few, where the cluster has no more; None for exactly `num_workers`.
        cpus_per_worker: CPUs and threads of each worker without a GPU.
        use_gpu: one GPU per worker.
        bf16: autocast to bfloat16 on a GPU; without effect on a CPU, where it is slower.
        seed: of weights, order and dropout.
        memory_budget_gib: what the training rows may take in each worker; above it they are streamed by Ray Data.
        checkpoint_interval_s: least time between checkpoints; 0 writes one per epoch.

    Returns:
        The final metrics: those of the kept epoch, the temperature with the validation loss and calibration error
        before and after it, and counts.

    Raises:
        FileNotFoundError: there is no embedding table, or there are no geocells.
        ValueError: a bad setting or a bad table; see `hedwig.training.rows.make_plan`.
    """
    from hedwig.geocells import Geocells

    started = time.monotonic()
    check_losses(loss, hierarchy_weights, contrastive_weight, near_km, far_km)
    for name, value in {"epochs": epochs, "batch_size": batch_size, "patience": patience}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    cells = Geocells.load(geocells)
    plan = make_plan(
        embeddings,
        cells,
        image_column=image_column,
        text_column=text_column if use_text else None,
        num_frames=num_frames,
        parents=parents_of(cells, len(hierarchy_weights)),
    )
    num_train = plan.count("train")
    if max(num_workers, 1) > num_train:
        raise ValueError(f"{num_workers} workers for {num_train} training rows; use fewer workers.")
    config = GeolocatorConfig(
        image_dim=plan.image_dim,
        text_dim=plan.text_dim,
        use_text=use_text,
        projection_dim=projection_dim,
        num_cells=len(plan.cell_lat),
        cosine=cosine,
        hidden_dim=hidden_dim,
        num_frames=num_frames,
    )
    fewest = max(1, num_workers if min_workers is None else min_workers)
    streamed = num_train * plan.bytes_per_row > memory_budget_gib * 2**30 * fewest
    settings = {
        "data": plan.digest(),
        "config": asdict(config),
        "loss": loss,
        "tau_km": tau_km,
        "hierarchy_weights": list(hierarchy_weights),
        "contrastive_weight": contrastive_weight,
        "near_km": near_km,
        "far_km": far_km,
        "bf16": bf16,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup_fraction": warmup_fraction,
        "caption_dropout": caption_dropout,
        "patience": patience,
        "seed": seed,
        "streamed": streamed,
        "checkpoint_interval_s": checkpoint_interval_s,
    }
    state = run(
        _worker,
        settings,
        payload=(plan, resolve(scratch), run_name),
        scratch=scratch,
        run_name=run_name,
        num_workers=num_workers,
        use_gpu=use_gpu,
        datasets={"train": stream(plan, geocells)} if streamed else None,
        min_workers=min_workers,
        cpus_per_worker=cpus_per_worker,
    )
    _write(output, replace(config, temperature=state["temperature"]), state)
    kept: dict[str, Any] = state["history"][state["best_epoch"]]
    return {
        **kept,
        **state["calibration"],
        "temperature": state["temperature"],
        "num_epochs": len(state["history"]),
        "num_train": num_train,
        "num_val": plan.count("val"),
        "num_cells": config.num_cells,
        "num_workers": num_workers,
        "seconds": round(time.monotonic() - started, 3),
    }


def _write(output: str, config: GeolocatorConfig, state: dict[str, Any]) -> None:
    model = Geolocator(config)
    model.load_state_dict(state["best"])
    with tempfile.TemporaryDirectory(prefix="hedwig-") as folder:
        model.save(folder)
        for file in sorted(Path(folder).iterdir()):
            write_bytes(join(output, file.name), file.read_bytes())
    write_bytes(join(output, "metrics.jsonl"), jsonl(state["history"]))


def _worker(settings: dict[str, Any]) -> None:
    """One worker of the training; `settings` is what `train_geolocator` and `run` put together."""
    plan: Plan
    plan, scratch, run_name = payload_of(settings)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if settings["num_threads"]:
        torch.set_num_threads(settings["num_threads"])  # also where OMP_NUM_THREADS says otherwise
    train: CachedRows | StreamedRows
    if settings["streamed"]:
        train = StreamedRows(plan, ray.train.get_dataset_shard("train"))
    else:
        train = CachedRows(plan, "train", rank=rank, world=world).to(device)
    fit = _Fit(settings, plan, CachedRows(plan, "val", rank=rank, world=world).to(device))
    num_rows = plan.count("train") // world  # the same in all workers, or the last step would wait for ever
    report = Reporter(settings, settings["checkpoint_interval_s"])
    track = Tracker(scratch, run_name, settings, first_epoch=len(fit.history)) if rank == 0 else None
    fit.clock = time.monotonic()  # starting is no part of an epoch
    while not fit.is_finished():
        fit.epoch(train, num_rows, batch_size=-(-settings["batch_size"] // world), rank=rank)
        if track is not None:
            track(fit.history[-1])
        if fit.is_finished():
            fit.calibrate()
        report(fit.state, {"epoch": len(fit.history)}, finished=fit.is_finished())
    if track is not None:
        track.close()


class _Fit:
    """The model in training, with all that a checkpoint holds."""

    def __init__(self, settings: dict[str, Any], plan: Plan, val: CachedRows) -> None:
        self.settings, self.val = settings, val
        self.num_val = plan.count("val")
        self.device = ray.train.torch.get_device()
        torch.manual_seed(settings["seed"])
        self.model = Geolocator(GeolocatorConfig(**settings["config"])).to(self.device)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        rate, decay = settings["learning_rate"], settings["weight_decay"]
        # Fused: of a step over 2,000 cells on a CPU it takes 2 ms instead of 9.
        self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=True)
        self.criterion = Criterion(settings, plan, self.device)
        self.cell_lat, self.cell_lon = plan.cell_lat, plan.cell_lon
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.temperature = 1.0
        self.calibration: dict[str, float] = {}
        self.clock = time.monotonic()
        state = restore()
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history, self.best = state["history"], state["best"]
            self.best_epoch, self.temperature = state["best_epoch"], state["temperature"]
            self.calibration = state["calibration"]
        self.parallel: nn.Module = ray.train.torch.prepare_model(self.model)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "model": _on_cpu(self.model),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "temperature": self.temperature,
            "calibration": self.calibration,
        }

    def is_finished(self) -> bool:
        """Whether there is no epoch left, or no hope."""
        done = len(self.history)
        waited = self.num_val > 0 and done - 1 - self.best_epoch >= self.settings["patience"]
        return done > 0 and (done >= self.settings["epochs"] or waited)

    def epoch(self, rows: CachedRows | StreamedRows, num_rows: int, *, batch_size: int, rank: int) -> None:
        """One pass over this worker's `num_rows` rows, and the validation after it."""
        number = len(self.history)
        steps = -(-num_rows // batch_size)
        seed = self.settings["seed"]
        order, dropout = seeded(seed, number, rank, 0), seeded(seed, number, rank, 1)
        total, rate = torch.zeros(3, dtype=torch.float64, device=self.device), 0.0
        started, cpu_started = time.monotonic(), time.process_time()
        self.parallel.train()
        batches = rows.batches(batch_size, num_rows=num_rows, order=order, seed=seed + number)
        for step, batch in enumerate(batches):
            rate = self.settings["learning_rate"] * schedule(
                number * steps + step, self.settings["epochs"] * steps, self.settings["warmup_fraction"]
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            batch = batch.to(self.device)
            text = batch.text
            if text is not None and self.settings["caption_dropout"] > 0:
                keep = torch.rand(len(text), 1, generator=dropout) >= self.settings["caption_dropout"]
                text = text * keep.to(self.device)
            projected, logits = self._forward(self.parallel, batch.image, text)
            loss = self.criterion.cells(logits, batch)
            if self.settings["contrastive_weight"] > 0:
                pairs, num_near = self.criterion.pairs(projected, batch)
                loss = loss + pairs
                total[1] += num_near
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            total[0] += loss.detach() * len(batch.lat)  # stays on the device: reading it would wait for the step
        total[2] = num_rows
        train_seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
        sums = sum_over_workers(total.cpu())
        row: dict[str, Any] = {"epoch": number, "train_loss": float(sums[0] / sums[2]), "learning_rate": rate}
        if self.settings["contrastive_weight"] > 0:
            row["share_with_near"] = float(sums[1] / sums[2])
        if self.num_val:
            row.update(self._validate())
        previous = self.history[self.best_epoch]["val_loss"] if self.num_val and self.history else np.inf
        if not self.num_val or row["val_loss"] < previous:
            self.best_epoch, self.best = number, _on_cpu(self.model)
        elif not self.best:
            raise ValueError(f"The validation loss is {row['val_loss']} after one epoch; lower learning_rate.")
        row |= {"train_seconds": round(train_seconds, 4), "train_cpu_seconds": round(cpu_seconds, 4)}  # of this worker
        self.history.append({**row, "seconds": round(time.monotonic() - self.clock, 4)})  # with the checkpoint before
        self.clock = time.monotonic()

    def _forward(self, model: nn.Module, image: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """Projected and logits, both float32."""
        half = bool(self.settings["bf16"]) and self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            projected, logits = model(image, text)
        return projected.float(), logits.float()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Loss, accuracy, and the error of the most probable cell's centre, over the validation rows of all workers."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        errors: list[NDArray[np.float64]] = [np.zeros(0)]
        for batch in self.val.batches(EVALUATION_ROWS, num_rows=len(self.val)):
            batch = batch.to(self.device)
            _, logits = self._forward(self.model, batch.image, batch.text)
            guess = logits.argmax(dim=1)
            sums[0] += self.criterion.cells(logits, batch).item() * len(guess)
            sums[1] += float((guess == batch.cell_ids).sum())
            cell, lat, lon = (values.cpu().numpy() for values in (guess, batch.lat, batch.lon))
            errors.append(haversine_km(self.cell_lat[cell], self.cell_lon[cell], lat, lon))
        loss, hits = (sum_over_workers(sums) / self.num_val).tolist()
        return {
            "val_loss": loss,
            "val_accuracy": hits,
            "val_median_error_km": float(np.median(gather(np.concatenate(errors)))),
        }

    @torch.no_grad()
    def calibrate(self) -> None:
        """Fit the temperature of the kept epoch on the validation rows, and say what it changed."""
        if not self.num_val:
            return
        self.model.load_state_dict(self.best)
        self.model.eval()

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in self.val.batches(EVALUATION_ROWS, num_rows=len(self.val)):
                batch = batch.to(self.device)
                yield self._forward(self.model, batch.image, batch.text)[1], batch.cell_ids

        self.temperature = fit_temperature(batches)
        self.calibration = calibration_figures(batches, self.temperature)


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
