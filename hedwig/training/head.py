"""Training the geolocator head: the projection and the geocell classifier, on embeddings that are already there.

The encoder never runs here, so an epoch over a few thousand panoramas takes a fraction of a second and fifty are
affordable (the paper did one). The driver checks the table before Ray is asked for anything; workers keep their share
of it in memory (see `hedwig.training.rows`). The epoch with the lowest validation loss is kept, and its temperature is
then fitted on the validation rows. Without validation rows the last epoch is kept and the temperature is 1.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hedwig.geo import haversine_km
from hedwig.losses import cross_entropy, haversine_smoothing_loss, haversine_targets
from hedwig.models.geolocator import Geolocator, GeolocatorConfig
from hedwig.storage import join, write_bytes
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
from hedwig.training.rows import Batch, CachedRows, Plan, StreamedRows, make_plan, stream

__all__ = ["train_geolocator"]

LOSSES = ("ce", "haversine", "haversine_raw")
EVALUATION_ROWS = 4096
TEMPERATURES = torch.logspace(-1.5, 1.5, 121, dtype=torch.float64)  # steps of 6 %


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
    loss: Literal["ce", "haversine", "haversine_raw"] = "haversine",
    tau_km: float = 75.0,
    epochs: int = 50,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup_fraction: float = 0.05,
    caption_dropout: float = 0.0,
    patience: int = 10,
    num_workers: int = 1,
    use_gpu: bool = False,
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
        loss: 'ce', or haversine smoothing with targets normalised ('haversine') or as published ('haversine_raw').
        tau_km: length over which smoothed targets fall by e.
        epochs: at most so many.
        batch_size: rows per step over all workers together.
        learning_rate: AdamW's, at the top of the schedule.
        weight_decay: AdamW's; not applied to biases and the scale.
        warmup_fraction: share of the steps in which the learning rate rises.
        caption_dropout: share of training rows whose caption is replaced by zeros in a step, so that the head also
            works on an image alone.
        patience: stop after so many epochs without a lower validation loss.
        num_workers: Ray Train workers; 0 trains in this process.
        use_gpu: one GPU per worker.
        seed: of weights, order and dropout.
        memory_budget_gib: what the training rows may take in each worker; above it they are streamed by Ray Data.
        checkpoint_interval_s: least time between checkpoints; 0 writes one per epoch.

    Returns:
        The final metrics: those of the kept epoch, the temperature, and counts.

    Raises:
        FileNotFoundError: there is no embedding table, or there are no geocells.
        ValueError: a bad setting or a bad table; see `hedwig.training.rows.make_plan`.
    """
    from hedwig.geocells import Geocells

    started = time.monotonic()
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}.")
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("patience", patience, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    plan = make_plan(
        embeddings,
        Geocells.load(geocells),
        image_column=image_column,
        text_column=text_column if use_text else None,
        num_frames=num_frames,
    )
    if max(num_workers, 1) > plan.count("train"):
        raise ValueError(f"{num_workers} workers for {plan.count('train')} training rows; use fewer workers.")
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
    streamed = plan.count("train") * plan.bytes_per_row > memory_budget_gib * 2**30 * max(num_workers, 1)
    settings = {
        "data": plan.digest(),
        "config": asdict(config),
        "loss": loss,
        "tau_km": tau_km,
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
        payload=plan,
        scratch=scratch,
        run_name=run_name,
        num_workers=num_workers,
        use_gpu=use_gpu,
        datasets={"train": stream(plan, geocells)} if streamed else None,
    )
    _write(output, replace(config, temperature=state["temperature"]), state)
    kept: dict[str, Any] = state["history"][state["best_epoch"]]
    return {
        **kept,
        "temperature": state["temperature"],
        "num_epochs": len(state["history"]),
        "num_train": plan.count("train"),
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
    plan: Plan = payload_of(settings)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    train: CachedRows | StreamedRows
    if settings["streamed"]:
        train = StreamedRows(plan, ray.train.get_dataset_shard("train"))
    else:
        train = CachedRows(plan, "train", rank=rank, world=world)
    fit = _Fit(settings, plan, CachedRows(plan, "val", rank=rank, world=world))
    num_rows = plan.count("train") // world  # the same in all workers, or the last step would wait for ever
    report = Reporter(settings, settings["checkpoint_interval_s"])
    while not fit.is_finished():
        fit.epoch(train, num_rows, batch_size=-(-settings["batch_size"] // world), rank=rank)
        if fit.is_finished():
            fit.calibrate()
        report(fit.state, {"epoch": len(fit.history)}, finished=fit.is_finished())


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
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings["weight_decay"]},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=settings["learning_rate"],
        )
        self.cell_lat = torch.tensor(plan.cell_lat, device=self.device)
        self.cell_lon = torch.tensor(plan.cell_lon, device=self.device)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.temperature = 1.0
        state = restore()
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history, self.best = state["history"], state["best"]
            self.best_epoch, self.temperature = state["best_epoch"], state["temperature"]
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
        }

    def is_finished(self) -> bool:
        """Whether there is no epoch left, or no hope."""
        done = len(self.history)
        waited = self.num_val > 0 and done - 1 - self.best_epoch >= self.settings["patience"]
        return done > 0 and (done >= self.settings["epochs"] or waited)

    def epoch(self, rows: CachedRows | StreamedRows, num_rows: int, *, batch_size: int, rank: int) -> None:
        """One pass over this worker's `num_rows` rows, and the validation after it."""
        started, number = time.monotonic(), len(self.history)
        steps = -(-num_rows // batch_size)
        seed = self.settings["seed"]
        order, dropout = seeded(seed, number, rank, 0), seeded(seed, number, rank, 1)
        total, rate = 0.0, 0.0
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
            _, logits = self.parallel(batch.image, text)
            loss = self._loss(logits, batch)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            total += loss.item() * len(batch.lat)
        sums = sum_over_workers(torch.tensor([total, num_rows], dtype=torch.float64))
        row = {"epoch": number, "train_loss": float(sums[0] / sums[1]), "learning_rate": rate}
        if self.num_val:
            row.update(self._validate())
        previous = self.history[self.best_epoch]["val_loss"] if self.num_val and self.history else np.inf
        if not self.num_val or row["val_loss"] < previous:
            self.best_epoch, self.best = number, _on_cpu(self.model)
        elif not self.best:
            raise ValueError(f"The validation loss is {row['val_loss']} after one epoch; lower learning_rate.")
        self.history.append({**row, "seconds": round(time.monotonic() - started, 4)})

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.settings["loss"] == "ce":
            return cross_entropy(logits, batch.cell_ids)
        targets = haversine_targets(
            self.cell_lat,
            self.cell_lon,
            batch.lat,
            batch.lon,
            batch.cell_ids,
            tau_km=self.settings["tau_km"],
            normalised=self.settings["loss"] == "haversine",
        )
        return haversine_smoothing_loss(logits, targets)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Loss, accuracy, and the error of the most probable cell's centre, over the validation rows of all workers."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        errors: list[NDArray[np.float64]] = [np.zeros(0)]
        for batch in self.val.batches(EVALUATION_ROWS, num_rows=len(self.val)):
            batch = batch.to(self.device)
            _, logits = self.model(batch.image, batch.text)
            guess = logits.argmax(dim=1)
            sums[0] += self._loss(logits, batch).item() * len(guess)
            sums[1] += float((guess == batch.cell_ids).sum())
            points = (self.cell_lat[guess], self.cell_lon[guess], batch.lat, batch.lon)
            errors.append(haversine_km(*(point.cpu().numpy() for point in points)))
        loss, hits = (sum_over_workers(sums) / self.num_val).tolist()
        return {
            "val_loss": loss,
            "val_accuracy": hits,
            "val_median_error_km": float(np.median(gather(np.concatenate(errors)))),
        }

    @torch.no_grad()
    def calibrate(self) -> None:
        """Temperature of the kept epoch with the lowest -log p(true cell) on the validation rows (Guo et al. 2017)."""
        if not self.num_val:
            return
        self.model.load_state_dict(self.best)
        self.model.eval()
        nll = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
        for batch in self.val.batches(EVALUATION_ROWS, num_rows=len(self.val)):
            batch = batch.to(self.device)
            logits = self.model(batch.image, batch.text)[1]
            for i, temperature in enumerate(TEMPERATURES.tolist()):
                nll[i] += float(F.cross_entropy(logits / temperature, batch.cell_ids, reduction="sum"))
        self.temperature = float(TEMPERATURES[sum_over_workers(nll).argmin()])


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
