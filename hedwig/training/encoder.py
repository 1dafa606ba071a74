"""Training a tiny encoder from scratch, on the training split of the experiment itself.

For demonstrations without pretrained weights: a ViCLIP of 1 M weights besides its vocabulary, and by the same function
and budget a mean-pooled CLIP, the honest baseline. What is minimised is in `hedwig.training.encoder_fit`.
Three quarters of the patches are hidden from each training step, as in FLIP and ViCLIP's own training, which makes
a step cheaper. float32 throughout: under bfloat16 autocast a step measured 3 % (ViCLIP) and 34 % (CLIP) slower on a CPU
with AVX-512 BF16. Frames stay in memory as uint8, a share per worker; several encoders are trained one after another
in one fit, because starting Ray Train costs as much as several epochs. An encoder whose weights are given is fine-tuned
instead, in `hedwig.training.finetune`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.train
from torch import Tensor, nn

from hedwig.models.encoder import load_encoder, save_encoder
from hedwig.storage import join, write_bytes
from hedwig.training.encoder_fit import EncoderFit, make_frames_plan
from hedwig.training.frames import read_frames
from hedwig.training.loop import Reporter, jsonl, payload_of, restore, run

__all__ = ["train_encoder"]


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
    plan = make_frames_plan(frames, num_cells, seed, num_workers)
    num_train = len(plan["train"])
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
        module, fit = _begin(name, settings, plan, shares)
        if state["model"] is not None:
            fit.restore(state)
        history = state["histories"][name]
        while len(history) < fit.num_epochs:
            history.append(fit.epoch(len(history), rank, world))
            last = len(history) >= fit.num_epochs
            if last:
                state["trained"][name] = _on_cpu(module)
            state.update({"model": None} if last else fit.state())
            finished = last and place == len(settings["encoders"]) - 1
            report(lambda: state, {"encoder": name, "epoch": len(history)}, finished=finished)


def _begin(
    name: str, settings: Mapping[str, Any], plan: Mapping[str, Any], shares: Mapping[str, Any]
) -> tuple[nn.Module, EncoderFit]:
    """A random encoder of which all learns but what the losses do not reach."""
    encoder = load_encoder(name, seed=settings["seed"], device="cpu", **settings["fusions"].get(name, {}))
    with_text = settings["text_weight"] > 0
    for key, parameter in encoder.module.named_parameters():
        unused = key in ("temp", "model.logit_scale")
        parameter.requires_grad_(not unused and (with_text or not _is_text(key)))
    texts = [text or "" for text in shares["train"]["caption"]]
    budget_s = settings["time_budget_s"]
    return encoder.module, EncoderFit(
        encoder,
        settings,
        plan,
        shares,
        captions=encoder.module.tokenise(texts)[0] if with_text else None,
        head_rate=settings["learning_rate"],
        budget_s=None if budget_s is None else budget_s / len(settings["encoders"]),
    )


def _is_text(key: str) -> bool:
    """Whether a parameter of an encoder belongs to its text tower, by name."""
    vision = ("vision_encoder.", "model.visual.")
    return not key.startswith(vision)


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}
