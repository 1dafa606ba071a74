"""Training a tiny encoder from scratch, on the training split of the experiment itself.

For demonstrations without pretrained weights: a ViCLIP of 1 M weights besides its vocabulary, and by the same function
and budget a mean-pooled CLIP, the honest baseline. Objective: haversine-smoothed classification over coarse cells,
read off the normalised video vector by a head that is thrown away, plus a contrastive loss between videos and captions.
Three quarters of the patches are hidden from each training step, as in FLIP and ViCLIP's own training, which makes
a step cheaper. float32 throughout: under bfloat16 autocast a step measured 3 % (ViCLIP) and 34 % (CLIP) slower on a CPU
with AVX-512 BF16. Frames stay in memory as uint8, a share per worker; several encoders are trained one after another
in one fit, because starting Ray Train costs as much as several epochs. An encoder is trained as it will be asked: on
its fused frames, or, where its fusion looks at every frame alone, on the mean of their vectors.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from hedwig.geo import haversine_km, spherical_mean, unit_vectors
from hedwig.losses import haversine_smoothing_loss, haversine_targets, video_text_loss
from hedwig.models.encoder import evenly, load_encoder, save_encoder
from hedwig.models.viclip import ViCLIP
from hedwig.storage import join, write_bytes
from hedwig.training.frames import read_frames, read_positions
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
from hedwig.training.objective import HidePatches, Objective, augmented, with_others

__all__ = ["train_encoder"]

EVALUATION_ROWS = 64
MEASURED_STEPS = 20
MAX_NORM = 1.0


def train_encoder(
    *,
    frames: str,
    output: str,
    scratch: str,
    run_name: str,
    encoders: Sequence[str] = ("viclip-tiny",),
    fusions: Mapping[str, Mapping[str, str]] | None = None,
    epochs: int = 12,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    warmup_fraction: float = 0.1,
    num_cells: int = 64,
    tau_km: float = 500.0,
    text_weight: float = 0.1,
    hidden_patches: float = 0.75,
    roll_probability: float = 0.5,
    brightness: float = 0.1,
    time_budget_s: float | None = None,
    num_workers: int = 1,
    use_gpu: bool = False,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Train encoders on a frames cache and write each into ``output/<name>/``, with metrics.jsonl beside its weights.

    For a fixed seed and number of workers the result is the same, unless there is a time budget.

    Args:
        frames: folder written by `hedwig.training.write_frames`; rows with split 'train' are trained on, those with
            'val' are only measured, the others are ignored.
        output: folder or URI for the results.
        scratch: folder or URI for checkpoints, reachable by all workers.
        run_name: the same name and scratch continue a run that was killed.
        encoders: names for `hedwig.models.encoder.load_encoder`, of models that take frames of this size.
        fusions: by encoder, its `fusion` and `temporal` as `load_encoder` takes them; their defaults where absent.
        epochs: passes over the training split per encoder; with a time budget, at most so many.
        batch_size: panoramas per step over all workers together.
        learning_rate: AdamW's, at the top of the schedule.
        weight_decay: AdamW's, for matrices.
        warmup_fraction: share of the steps in which the learning rate rises.
        num_cells: coarse k-means cells of the training positions (fewer for a small split).
        tau_km: length over which the smoothed targets fall by e.
        text_weight: factor on the contrastive loss; 0 leaves the text tower untrained.
        hidden_patches: share of the patches left out of a training step.
        roll_probability: share of the panoramas whose frames are rotated by a random number of places in a step.
        brightness: each panorama is scaled by a factor within 1 ± this in a step.
        time_budget_s: for the training steps of all encoders together. The number of epochs then comes from the
            speed of the first 20 steps, so that the schedule ends in time; without it epochs are what they are.
        num_workers: Ray Train workers; 0 trains in this process.
        use_gpu: one GPU per worker.
        seed: of weights, order and augmentation.

    Returns:
        By encoder, the metrics of its last epoch and counts.

    Raises:
        FileNotFoundError: there is no frames cache.
        ValueError: no training rows, or a bad setting.
    """
    if not encoders or len(set(encoders)) != len(encoders):
        raise ValueError(f"encoders must name at least one encoder, none twice; got {list(encoders)}.")
    for name, value, good in (
        ("epochs", epochs, epochs >= 1),
        ("batch_size", batch_size, batch_size >= 1),
        ("hidden_patches", hidden_patches, 0 <= hidden_patches < 1),
        ("brightness", brightness, 0 <= brightness < 1),
        ("time_budget_s", time_budget_s, time_budget_s is None or time_budget_s > 0),
    ):
        if not good:
            raise ValueError(f"{name} is out of range: {value}.")
    plan = _plan(frames, num_cells, seed)
    num_train = len(plan["train"])
    if num_train < max(num_workers, 1):
        raise ValueError(f"{num_train} training rows with a position in {frames!r} for {num_workers} worker(s).")
    settings = {
        "data": hashlib.sha256("\0".join([*plan["train"], "", *plan["val"]]).encode()).hexdigest(),
        "encoders": list(encoders),
        "fusions": {name: dict(options) for name, options in (fusions or {}).items()},
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup_fraction": warmup_fraction,
        "num_cells": len(plan["cell_lat"]),
        "tau_km": tau_km,
        "text_weight": text_weight,
        "hidden_patches": hidden_patches,
        "roll_probability": roll_probability,
        "brightness": brightness,
        "time_budget_s": time_budget_s,
        "seed": seed,
    }
    state = run(
        _worker,
        settings,
        payload=plan,
        scratch=scratch,
        run_name=run_name,
        num_workers=num_workers,
        use_gpu=use_gpu,
    )
    results = {}
    for name in encoders:
        history = state["histories"][name]
        module = load_encoder(name, seed=seed, device="cpu").module
        module.load_state_dict(state["trained"][name])
        note = f"trained from scratch on {num_train} panoramas, {len(history)} epochs"
        with tempfile.TemporaryDirectory(prefix="hedwig-") as folder:
            save_encoder(module, name, folder, note)
            for file in sorted(Path(folder).iterdir()):
                write_bytes(join(output, name, file.name), file.read_bytes())
        write_bytes(join(output, name, "metrics.jsonl"), jsonl(history))
        results[name] = {**history[-1], "num_train": num_train, "num_val": len(plan["val"]), "note": note}
        results[name]["seconds"] = round(sum(row["seconds"] for row in history), 3)
    return results


def _plan(frames: str, num_cells: int, seed: int) -> dict[str, Any]:
    """Ids of both splits in sorted order, and the centres (C,) of coarse cells of the training positions."""
    from hedwig.geocells.kmeans import spherical_kmeans

    rows = read_positions(frames).to_pandas()
    rows = rows[rows["lat"].notna() & rows["lon"].notna()]
    train = rows[rows["split"] == "train"]
    if train.empty:
        raise ValueError(f"{frames!r} has no training rows: none has split 'train' and a position.")
    num_cells = max(1, min(num_cells, len(train) // 4))
    vectors = unit_vectors(train["lat"], train["lon"])
    labels = spherical_kmeans(vectors, num_cells, 1, len(train), seed=seed)
    centres = [spherical_mean(*train.loc[labels == c, ["lat", "lon"]].to_numpy().T) for c in range(num_cells)]
    return {
        "frames": frames,
        "train": train["pano_id"].tolist(),
        "val": rows.loc[rows["split"] == "val", "pano_id"].tolist(),
        "cell_lat": np.array([lat for lat, _ in centres]),
        "cell_lon": np.array([lon for _, lon in centres]),
    }


def _worker(settings: dict[str, Any]) -> None:
    """One worker: every encoder in turn, a checkpoint per epoch."""
    plan = payload_of(settings)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    shares = {split: read_frames(plan["frames"], plan[split][rank::world]) for split in ("train", "val")}
    state = restore() or {"trained": {}, "histories": {name: [] for name in settings["encoders"]}, "model": None}
    report = Reporter(settings, 0.0)
    for place, name in enumerate(settings["encoders"]):
        if name in state["trained"]:
            continue
        fit = _Fit(name, settings, plan, shares)
        if state["model"] is not None:
            fit.restore(state)
        history = state["histories"][name]
        while len(history) < fit.num_epochs:
            history.append(fit.epoch(len(history), rank, world))
            last = len(history) >= fit.num_epochs
            if last:
                state["trained"][name] = _on_cpu(fit.objective.encoder)
            state.update({"model": None} if last else fit.state())
            finished = last and place == len(settings["encoders"]) - 1
            report(lambda: state, {"encoder": name, "epoch": len(history)}, finished=finished)


class _Fit:
    """One encoder in training, with what a checkpoint holds of it."""

    def __init__(self, name: str, settings: dict[str, Any], plan: dict[str, Any], shares: dict[str, Any]) -> None:
        self.settings, self.shares = settings, shares
        self.num_train, self.num_val = len(plan["train"]), len(plan["val"])
        self.num_epochs = int(settings["epochs"])
        self.planned = settings["time_budget_s"] is None
        self.device = ray.train.torch.get_device()
        encoder = load_encoder(name, seed=settings["seed"], device="cpu", **settings["fusions"].get(name, {}))
        torch.manual_seed(settings["seed"])
        with_text = settings["text_weight"] > 0
        self.objective = Objective(
            encoder.module,
            encoder.image_dim,
            settings["num_cells"],
            with_text=with_text,
            joint=encoder.fusion == "viclip",
            interpolate=encoder.temporal == "interpolate",
        )
        num_frames, own = shares["train"]["frames"].shape[1], encoder.num_frames
        chooses = encoder.fusion == "viclip" and encoder.temporal == "select" and num_frames not in (1, own)
        self.chosen = torch.from_numpy(evenly(num_frames, own) if chooses else np.arange(num_frames))
        self.hide = HidePatches(settings["hidden_patches"])
        towers = encoder.module.vision_encoder if isinstance(encoder.module, ViCLIP) else encoder.module.model.visual
        towers.ln_pre.register_forward_pre_hook(self.hide)
        for key, parameter in encoder.module.named_parameters():
            unused = key in ("temp", "model.logit_scale")
            parameter.requires_grad_(not unused and (with_text or not _is_text(key)))
        self.tokens = {
            split: encoder.module.tokenise([text or "" for text in share["caption"]])[0] if with_text else None
            for split, share in shares.items()
        }
        self.objective.to(self.device)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": settings["weight_decay"]},
                {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=settings["learning_rate"],
            betas=(0.9, 0.98),
            fused=True,
        )
        self.parallel: nn.Module = ray.train.torch.prepare_model(self.objective)
        self.cell_lat = torch.from_numpy(plan["cell_lat"]).to(self.device)
        self.cell_lon = torch.from_numpy(plan["cell_lon"]).to(self.device)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of an unfinished encoder."""
        return {
            "model": _on_cpu(self.objective),
            "optimizer": self.optimizer.state_dict(),
            "num_epochs": self.num_epochs,
            "planned": self.planned,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.objective.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_epochs, self.planned = state["num_epochs"], state["planned"]

    def epoch(self, number: int, rank: int, world: int) -> dict[str, Any]:
        """One pass over the training rows, and the validation after it."""
        started, seed = time.monotonic(), self.settings["seed"]
        num_rows = self.num_train // world  # the same in all workers, or the last step would wait for ever
        batch_size = -(-self.settings["batch_size"] // world)
        steps = max(1, num_rows // batch_size)  # a short last batch would make a noisy contrastive loss
        order = torch.randperm(len(self.shares["train"]["lat"]), generator=seeded(seed, number, rank, 0))
        random = seeded(seed, number, rank, 1)
        self.hide.generator = seeded(seed, number, rank, 2)
        sums = torch.zeros(2, dtype=torch.float64)
        self.parallel.train()
        for step in range(steps):
            factor = schedule(number * steps + step, self.num_epochs * steps, self.settings["warmup_fraction"])
            for group in self.optimizer.param_groups:
                group["lr"] = factor * self.settings["learning_rate"]
            rows = order[step * batch_size : (step + 1) * batch_size]
            losses = self._step(rows, random)
            sums += torch.tensor(losses, dtype=torch.float64)
            if not self.planned and step + 1 == min(MEASURED_STEPS, steps):
                self._plan_epochs(time.monotonic() - started, step + 1, steps)
        cells, captions = (sum_over_workers(sums) / (steps * world)).tolist()
        row = {"epoch": number, "train_loss": cells, "text_loss": captions}
        if self.num_val:
            row.update(self._validate())
        return {**row, "seconds": round(time.monotonic() - started, 4)}

    def _plan_epochs(self, seconds: float, done: int, steps: int) -> None:
        """Fit the number of epochs into this encoder's share of the budget; the slowest worker decides for all."""
        slowest = float(gather(np.array([seconds])).max()) / done
        share = self.settings["time_budget_s"] / len(self.settings["encoders"])
        validation = 0.3 * slowest * self.num_val / self.settings["batch_size"]  # no backward pass
        self.num_epochs = min(self.num_epochs, max(1, int(share / (slowest * steps + validation))))
        self.planned = True

    def _step(self, rows: Tensor, random: torch.Generator) -> tuple[float, float]:
        share, ids = self.shares["train"], self.tokens["train"]
        frames = torch.from_numpy(share["frames"][rows.numpy()])
        frames = augmented(frames, random, self.settings["roll_probability"], self.settings["brightness"])
        frames = frames[:, self.chosen]
        own_ids = ids[rows].to(self.device) if ids is not None else None
        logits, video, text, scale = self.parallel(frames.to(self.device), own_ids)
        cells = haversine_smoothing_loss(logits, self._targets(share, rows))
        captions = torch.zeros((), device=self.device)
        if text is not None:
            captions = video_text_loss(with_others(video), with_others(text), 1 / scale)
        # Every worker differentiates the loss of the whole batch by its own vectors only; the sum of these
        # gradients is the true one, and DDP takes their mean.
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.optimizer.zero_grad()
        torch.autograd.backward(cells + world * self.settings["text_weight"] * captions)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        with torch.no_grad():
            self.objective.log_text_scale.clamp_(max=np.log(100.0))
        return cells.item(), captions.item()

    def _targets(self, share: dict[str, Any], rows: Tensor) -> Tensor:
        lat, lon = (torch.from_numpy(share[name][rows.numpy()]).to(self.device) for name in ("lat", "lon"))
        return haversine_targets(
            self.cell_lat, self.cell_lon, lat, lon, None, tau_km=self.settings["tau_km"], normalised=True
        )

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Loss, and the error of the most probable coarse cell's centre, over the validation rows of all workers."""
        self.objective.eval()
        share = self.shares["val"]
        total = torch.zeros(1, dtype=torch.float64)
        errors: list[NDArray[np.float64]] = [np.zeros(0)]
        for rows in torch.split(torch.arange(len(share["lat"])), EVALUATION_ROWS):
            if not len(rows):
                continue
            frames = torch.from_numpy(share["frames"][rows.numpy()])[:, self.chosen].to(self.device)
            logits = self.objective(frames, None)[0]
            total += haversine_smoothing_loss(logits, self._targets(share, rows)).item() * len(rows)
            guess = logits.argmax(dim=1)
            centres = (self.cell_lat[guess].cpu().numpy(), self.cell_lon[guess].cpu().numpy())
            errors.append(haversine_km(*centres, share["lat"][rows.numpy()], share["lon"][rows.numpy()]))
        return {
            "val_loss": float(sum_over_workers(total)[0]) / self.num_val,
            "val_median_error_km": float(np.median(gather(np.concatenate(errors)))),
        }


def _is_text(key: str) -> bool:
    """Whether a parameter of an encoder belongs to its text tower, by name."""
    vision = ("vision_encoder.", "model.visual.")
    return not key.startswith(vision)


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}
