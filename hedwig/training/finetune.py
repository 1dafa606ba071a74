"""Fine-tuning of an encoder whose weights are given, on the training split of the experiment itself.

What learns is a part of the vision tower: its last blocks, or adapters on all of them (`hedwig.training.adapters`);
what is minimised is what training from scratch minimises (`hedwig.training.encoder_fit`), at rates so low that the
model keeps what it knew. Captions may hold the videos in their space; the text tower itself rests, so its vectors are
computed once. The epoch with the lowest validation loss is kept, since a large model soon knows a small split by heart.
Checkpoints hold what learns and nothing else; the result is a whole model in the official layout.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from torch import Tensor

from hedwig.models.encoder import VideoTextEncoder, load_encoder, save_encoder
from hedwig.models.viclip import ViCLIP
from hedwig.models.weights import weights_file
from hedwig.storage import join, write_bytes
from hedwig.training.adapters import add_lora, checkpoint_blocks, merge_lora, rest, train_blocks, vision_depth
from hedwig.training.encoder_fit import EncoderFit, make_frames_plan
from hedwig.training.frames import read_frames
from hedwig.training.loop import Reporter, jsonl, payload_of, restore, run

__all__ = ["check_finetuning", "finetune_encoder"]

TEXT_ROWS = 256
BLOCKS_RATE, LORA_RATE = 1e-5, 1e-4
TOKENISER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model")


def finetune_encoder(
    *,
    frames: str,
    output: str,
    scratch: str,
    run_name: str,
    encoder: str,
    weights: str | None = None,
    sha256: str | None = None,
    quick_gelu: bool | None = None,
    random_seed: int = 0,
    fusion: str = "auto",
    temporal: str = "select",
    long_captions: str = "truncate",
    blocks: int | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    epochs: int = 3,
    batch_size: int = 32,
    learning_rate: float | None = None,
    head_learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup_fraction: float = 0.1,
    num_cells: int = 64,
    tau_km: float = 500.0,
    text_weight: float = 0.0,
    hidden_patches: float = 0.0,
    roll_probability: float = 0.5,
    brightness: float = 0.1,
    gradient_checkpointing: bool = False,
    bf16: bool = True,
    num_workers: int = 1,
    min_workers: int | None = None,
    cpus_per_worker: int = 1,
    use_gpu: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Fine-tune an encoder on a frames cache and write it, with metrics.jsonl beside its weights, into `output`.

    For a fixed seed and number of workers the result is the same.

    Args:
        frames: folder written by `hedwig.training.write_frames`, which all workers can read; rows with split 'train'
            are trained on, those with 'val' choose the epoch, the others are ignored.
        output: folder or URI for the result.
        scratch: folder or URI for checkpoints, reachable by all workers.
        run_name: the same name and scratch continue a run that was killed.
        encoder: a name for `load_encoder`: viclip-*, clip-*, or open_clip:ARCH with a ViT.
        weights: see `load_encoder`; the same on every machine. None starts from random weights.
        sha256: see `load_encoder`.
        quick_gelu: see `load_encoder`.
        random_seed: of random weights.
        fusion: see `load_encoder`.
        temporal: see `load_encoder`.
        long_captions: see `load_encoder`.
        blocks: how many of the last blocks of the vision tower learn, with its last normalisation and projection.
        lora_rank: or the rank of adapters on all blocks; exactly one of the two must be given.
        lora_alpha: the adapters' scale times their rank; None for the rank, which is scale 1.
        epochs: passes over the training split.
        batch_size: panoramas per step over all workers together.
        learning_rate: AdamW's at the top of the schedule, for the encoder; None for 1e-5, or 1e-4 with adapters.
        head_learning_rate: of the classifier that is thrown away, and of the scales.
        weight_decay: AdamW's, for matrices.
        warmup_fraction: share of the steps in which the learning rate rises.
        num_cells: coarse k-means cells of the training positions (fewer for a small split).
        tau_km: length over which the smoothed targets fall by e.
        text_weight: factor on the contrastive loss between videos and captions; 0 for none.
        hidden_patches: share of the patches left out of a training step.
        roll_probability: share of the panoramas whose frames are rotated by a random number of places in a step.
        brightness: each panorama is scaled by a factor within 1 ± this in a step.
        gradient_checkpointing: less memory, about a third more time.
        bf16: run the encoder in bfloat16 on a GPU; without effect on a CPU.
        num_workers: Ray Train workers; 0 trains in this process.
        min_workers: begin and go on with as few, where the cluster has no more; None for exactly `num_workers`.
        cpus_per_worker: CPUs and threads of each worker without a GPU.
        use_gpu: one GPU per worker.
        seed: of adapters, head, order and augmentation.

    Returns:
        The metrics of the kept epoch, counts, the note that the weights carry, and their base's model_id.

    Raises:
        FileNotFoundError: there is no frames cache, or no such weights.
        ValueError: no training rows, a bad setting, or an encoder that cannot be fine-tuned.
    """
    check_finetuning(encoder, blocks=blocks, lora_rank=lora_rank)
    for name, value, good in (
        ("lora_alpha", lora_alpha, lora_alpha is None or (lora_rank is not None and lora_alpha > 0)),
        ("epochs", epochs, epochs >= 1),
        ("batch_size", batch_size, batch_size >= 1),
        ("learning_rate", learning_rate, learning_rate is None or learning_rate > 0),
        ("text_weight", text_weight, 0 <= text_weight < np.inf),
        ("hidden_patches", hidden_patches, 0 <= hidden_patches < 1),
        ("brightness", brightness, 0 <= brightness < 1),
    ):
        if not good:
            raise ValueError(f"{name} is out of range: {value}.")
    loading: dict[str, Any] = {
        "name": encoder,
        "weights": weights,
        "quick_gelu": quick_gelu,
        "seed": random_seed,
        "fusion": fusion,
        "temporal": temporal,
        "long_captions": long_captions,
    }
    base = load_encoder(**loading, sha256=sha256, device="cpu")
    if text_weight > 0 and not base.has_text:
        raise ValueError(f"{encoder} reads no text; set text_weight to 0.")
    plan = make_frames_plan(frames, num_cells, seed, num_workers)
    num_train = len(plan["train"])
    settings = {
        "data": hashlib.sha256("\0".join([*plan["train"], "", *plan["val"]]).encode()).hexdigest(),
        "loading": loading,
        "base_digest": base.weights_digest,
        "blocks": blocks,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate or (BLOCKS_RATE if lora_rank is None else LORA_RATE),
        "head_learning_rate": head_learning_rate,
        "weight_decay": weight_decay,
        "warmup_fraction": warmup_fraction,
        "num_cells": len(plan["cell_lat"]),
        "tau_km": tau_km,
        "text_weight": text_weight,
        "hidden_patches": hidden_patches,
        "roll_probability": roll_probability,
        "brightness": brightness,
        "gradient_checkpointing": gradient_checkpointing,
        "bf16": bf16,
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
        min_workers=min_workers,
        cpus_per_worker=cpus_per_worker,
    )
    what = f"last {blocks} block(s)" if blocks is not None else f"LoRA of rank {lora_rank}"
    note = (
        f"fine-tuned ({what}, {state['best_epoch'] + 1} epochs on {num_train} panoramas) from {base.model_id}, "
        f"{base.weights_note}"
    )
    _begin_learning(base, settings)
    base.module.load_state_dict({**base.module.state_dict(), **state["best"]})
    merge_lora(base.module)
    with tempfile.TemporaryDirectory(prefix="hedwig-") as folder:
        save_encoder(base.module, encoder, folder, note, finetuned_from=base.model_id)
        _copy_tokeniser(weights, folder)
        for file in sorted(Path(folder).iterdir()):
            write_bytes(join(output, file.name), file.read_bytes())
    write_bytes(join(output, "metrics.jsonl"), jsonl(state["history"]))
    kept: dict[str, Any] = state["history"][state["best_epoch"]]
    num_learning = sum(value.numel() for value in state["best"].values())
    return {
        **kept,
        "seconds": round(sum(row["seconds"] for row in state["history"]), 3),
        "num_epochs": epochs,
        "num_train": num_train,
        "num_val": len(plan["val"]),
        "num_learning": num_learning,
        "note": note,
        "base": base.model_id,
    }


def check_finetuning(encoder: str, *, blocks: int | None, lora_rank: int | None) -> None:
    """Refuse what cannot be fine-tuned, without loading anything.

    Raises:
        ValueError: not exactly one of `blocks` and `lora_rank`, more blocks than there are, or an encoder whose
            tower is unknown here.
    """
    if (blocks is None) == (lora_rank is None):
        raise ValueError(
            f"encoder.finetune needs either blocks or lora_rank; got blocks={blocks} and lora_rank={lora_rank}."
        )
    depth = vision_depth(encoder)
    if blocks is not None and not 1 <= blocks <= depth:
        raise ValueError(f"encoder.finetune.blocks must be 1 to {depth}, the depth of {encoder}; got {blocks}.")
    if lora_rank is not None and lora_rank < 1:
        raise ValueError(f"encoder.finetune.lora_rank must be at least 1, got {lora_rank}.")


def _begin_learning(encoder: VideoTextEncoder, settings: Mapping[str, Any]) -> None:
    """Freeze all but what is to learn."""
    rest(encoder.module)
    if settings["blocks"] is not None:
        train_blocks(encoder.module, settings["blocks"])
    else:
        rank = settings["lora_rank"]
        add_lora(encoder.module, rank, settings["lora_alpha"] or rank, seed=settings["seed"])


def _worker(settings: dict[str, Any]) -> None:
    """One worker: all epochs, a checkpoint after each."""
    plan = payload_of(settings)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if settings["num_threads"]:
        torch.set_num_threads(settings["num_threads"])
    encoder = load_encoder(**settings["loading"], device="cpu")
    if encoder.weights_digest != settings["base_digest"]:
        raise ValueError(
            f"The weights {settings['loading']['weights']!r} are not the same on every machine: "
            f"{encoder.weights_digest[:12]} instead of {settings['base_digest'][:12]}. Copy them again."
        )
    shares = {split: read_frames(plan["frames"], plan[split][rank::world], mapped=True) for split in ("train", "val")}
    captions = _caption_vectors(encoder, shares["train"]["caption"]) if settings["text_weight"] > 0 else None
    _begin_learning(encoder, settings)
    if settings["gradient_checkpointing"]:
        checkpoint_blocks(encoder.module)
    fit = EncoderFit(
        encoder,
        settings,
        plan,
        shares,
        captions=captions,
        head_rate=settings["head_learning_rate"],
        text_scale=_text_scale(encoder),
        half=settings["bf16"],
    )
    state = restore() or {"history": [], "best": {}, "best_epoch": 0}
    if state["history"]:
        fit.restore(state)
    history, report = state["history"], Reporter(settings, 0.0)
    while len(history) < fit.num_epochs:
        history.append(fit.epoch(len(history), rank, world))
        losses = [row.get("val_loss", -row["epoch"]) for row in history]  # without validation rows the last is best
        if not np.isfinite(losses[-1]) or not np.isfinite(history[-1]["train_loss"]):
            raise ValueError(f"The loss is not finite in epoch {len(history)}; lower learning_rate.")
        if losses[-1] <= min(losses):
            state["best"], state["best_epoch"] = fit.trained(), len(history) - 1
        state.update(fit.state())
        report(lambda: state, {"epoch": len(history)}, finished=len(history) >= fit.num_epochs)


def _caption_vectors(encoder: VideoTextEncoder, captions: Any) -> Tensor:
    """(N, D) unit vectors of the captions, zeros where there is none."""
    out = np.zeros((len(captions), encoder.text_dim), dtype=np.float32)
    there = np.flatnonzero([bool(text) for text in captions])
    for rows in np.split(there, range(TEXT_ROWS, len(there), TEXT_ROWS)):
        out[rows] = encoder.encode_text([captions[row] for row in rows])
    return torch.from_numpy(out)


def _text_scale(encoder: VideoTextEncoder) -> float:
    """What the given weights multiply cosines with captions by."""
    module = encoder.module
    if isinstance(module, ViCLIP):
        return min(100.0, 1 / max(float(module.temp), 1e-2))
    return float(module.model.logit_scale.exp())


def _copy_tokeniser(weights: str | None, folder: str) -> None:
    """What lies beside the given weights and decides how texts are read belongs beside the new ones too."""
    if weights is not None:
        beside = weights_file(weights).parent
        for file in sorted({file for pattern in TOKENISER_FILES for file in beside.glob(pattern) if file.is_file()}):
            shutil.copy(file, folder)
