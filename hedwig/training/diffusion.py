"""Fine-tuning the panorama model on one's own panoramas: LoRA adapters, trained by Ray Train, a checkpoint per epoch.

The rows are a captions table's training split; what a model made is left out, since a model that learns from its own
pictures forgets the world. Pictures are read and decoded anew in every epoch, resized to the model's shape, turned by a
random angle and encoded; text is encoded with the same template that will generate, whose prefix is what the panorama
model was tuned with. Only the adapters and the optimiser are in a checkpoint. What one step does is in
`hedwig.diffusion.lora`.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow.compute as pc
import ray.train
import ray.train.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from hedwig.diffusion.checkpoint import check_checkpoint, library, load_parts, quiet
from hedwig.diffusion.lora import (
    LORA_FILE,
    add_lora,
    denoising_loss,
    lora_state,
    panorama_pixels,
    restore_lora,
    save_lora,
    turned,
)
from hedwig.diffusion.prompts import PromptEncoder, PromptTemplate
from hedwig.panorama import decode_image
from hedwig.schema import check_columns
from hedwig.sources import read_image
from hedwig.sources.synthesised import SYNTHESISED
from hedwig.storage import join, read_table, resolve, write_bytes
from hedwig.training.loop import Reporter, jsonl, payload_of, restore, run, schedule, seeded, sum_over_workers

__all__ = ["train_lora"]

COLUMNS = ("pano_id", "caption", "split", "image_uri", "projection", "source")
MAX_NORM = 1.0
READING_THREADS = 8


def train_lora(
    *,
    panoramas: str,
    model: str,
    output: str,
    scratch: str,
    run_name: str,
    epochs: int = 10,
    batch_size: int = 4,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    warmup_fraction: float = 0.0,
    rank: int = 8,
    alpha: float | None = None,
    height_px: int = 512,
    min_snr_gamma: float | None = 5.0,
    caption_dropout: float = 0.1,
    template: PromptTemplate | None = None,
    dtype: str = "auto",
    gradient_checkpointing: bool = False,
    num_workers: int = 1,
    use_gpu: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Train adapters and write ``pytorch_lora_weights.safetensors`` and metrics.jsonl into `output`.

    For a fixed seed and number of workers the result is the same.

    Args:
        panoramas: folder of a captions table (the panorama columns and `caption`); equirectangular rows with split
            'train', a caption and a camera's image are trained on.
        model: local folder of the checkpoint, the same on every machine.
        output: folder or URI for the result.
        scratch: folder or URI for checkpoints, reachable by all workers.
        run_name: the same name and scratch continue a run that was killed.
        epochs: passes over the rows.
        batch_size: panoramas per step over all workers together.
        learning_rate: AdamW's, at the top of the schedule.
        weight_decay: AdamW's.
        warmup_fraction: share of the steps in which the learning rate rises.
        rank: of the adapters.
        alpha: their scale times rank; None for the rank.
        height_px: H of the training pictures, a multiple of 64; they are (H, 2 H).
        min_snr_gamma: of the loss weights; None for none.
        caption_dropout: share of the captions replaced by the empty prompt, which guidance needs.
        template: words around the captions; None for those of the panorama model.
        dtype: of the frozen weights: 'auto' is float16 on a GPU, else float32.
        gradient_checkpointing: less memory, more time.
        num_workers: Ray Train workers; 0 trains in this process.
        use_gpu: one GPU per worker.
        seed: of adapters, order, angles and noise.

    Returns:
        The last epoch's metrics, the number of rows, and the path of the file.

    Raises:
        ImportError: the extra `synthesis` is not installed.
        FileNotFoundError: the table or a part of the checkpoint is not there.
        ValueError: no rows to train on, a bad setting, or an image that cannot be read; the message names it.
    """
    for name, value, good in (
        ("epochs", epochs, epochs >= 1),
        ("batch_size", batch_size, batch_size >= 1),
        ("learning_rate", learning_rate, learning_rate > 0),
        ("rank", rank, rank >= 1),
        ("height_px", height_px, height_px >= 64 and height_px % 64 == 0),
        ("min_snr_gamma", min_snr_gamma, min_snr_gamma is None or min_snr_gamma > 0),
        ("caption_dropout", caption_dropout, 0 <= caption_dropout <= 1),
        ("dtype", dtype, dtype in ("auto", "float32", "float16", "bfloat16")),
    ):
        if not good:
            raise ValueError(f"{name} is out of range: {value!r}.")
    checkpoint = check_checkpoint(model)
    template = template or PromptTemplate()
    rows = _rows(panoramas)
    if len(rows["pano_id"]) < max(num_workers, 1):
        raise ValueError(f"{len(rows['pano_id'])} training rows in {panoramas!r} for {num_workers} worker(s).")
    data = "\0".join(f"{i}\0{c}" for i, c in zip(rows["pano_id"], rows["caption"], strict=True))
    settings = {
        "data": hashlib.sha256(data.encode()).hexdigest(),
        "model": str(checkpoint.folder),
        "model_digest": checkpoint.digest(),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup_fraction": warmup_fraction,
        "rank": rank,
        "alpha": alpha,
        "height_px": height_px,
        "min_snr_gamma": min_snr_gamma,
        "caption_dropout": caption_dropout,
        "template": [template.prefix, template.suffix, template.negative],
        "dtype": dtype,
        "gradient_checkpointing": gradient_checkpointing,
        "seed": seed,
    }
    state = run(
        _worker,
        settings,
        payload=rows,
        scratch=scratch,
        run_name=run_name,
        num_workers=num_workers,
        use_gpu=use_gpu,
    )
    with tempfile.TemporaryDirectory(prefix="hedwig-") as folder:
        write_bytes(join(resolve(output), LORA_FILE), save_lora(state["lora"], folder).read_bytes())
    history = state["history"]
    write_bytes(join(resolve(output), "metrics.jsonl"), jsonl(history))
    seconds = round(sum(row["seconds"] for row in history), 3)
    return {
        **history[-1],
        "num_train": len(rows["pano_id"]),
        "seconds": seconds,
        "file": join(resolve(output), LORA_FILE),
    }


def _rows(panoramas: str) -> dict[str, NDArray[Any]]:
    """The rows to train on, by column, sorted by pano_id."""
    table = read_table(resolve(panoramas))
    check_columns(table.column_names, COLUMNS, where=f"The captions table {panoramas}")
    made = pc.fill_null(pc.starts_with(table["source"], SYNTHESISED), False)
    empty = pc.equal(pc.utf8_trim_whitespace(pc.fill_null(table["caption"], "")), "")
    keep = pc.and_(pc.equal(table["split"], "train"), pc.equal(table["projection"], "equirectangular"))
    kept = table.filter(pc.and_(keep, pc.invert(pc.or_(made, empty))))
    if kept.num_rows == 0:
        raise ValueError(
            f"None of the {table.num_rows} rows in {panoramas!r} can be trained on: needed are split 'train', "
            f"projection 'equirectangular', a caption, and a source that does not begin with {SYNTHESISED!r}."
        )
    return {name: np.array(kept[name].to_pylist(), dtype=object) for name in ("pano_id", "caption", "image_uri")}


def _worker(settings: dict[str, Any]) -> None:
    """One worker: its share of the rows, a checkpoint per epoch."""
    rows = payload_of(settings)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    fit = _Fit(settings, {name: values[rank::world] for name, values in rows.items()}, len(rows["pano_id"]))
    history: list[dict[str, Any]] = []
    state = restore()
    if state is not None:
        history = state["history"]
        fit.restore(state)
    report = Reporter(settings, 0.0)
    while len(history) < settings["epochs"]:
        history.append(fit.epoch(len(history), rank, world))
        finished = len(history) == settings["epochs"]
        report(lambda: {**fit.state(), "history": history}, {"epoch": len(history)}, finished=finished)


class _Fit:
    """The adapters in training, with what a checkpoint holds of them."""

    def __init__(self, settings: dict[str, Any], share: dict[str, NDArray[Any]], num_rows: int) -> None:
        self.settings, self.share, self.num_rows = settings, share, num_rows
        self.device = ray.train.torch.get_device()
        fast = torch.float16 if self.device.type == "cuda" else torch.float32
        self.dtype = fast if settings["dtype"] == "auto" else getattr(torch, settings["dtype"])
        parts = load_parts(check_checkpoint(settings["model"]), dtype=self.dtype, device=self.device)
        self.vae, self.unet = parts.vae, parts.unet
        self.prompts = PromptEncoder(parts.tokenizer, parts.text_encoder, PromptTemplate(*settings["template"]))
        with quiet():
            self.scheduler = library("diffusers").DDPMScheduler.from_config(dict(parts.scheduler_config))
        with torch.no_grad():
            self.nothing = self.prompts.encode_text("")
        torch.manual_seed(settings["seed"])
        self.parameters = add_lora(self.unet, rank=settings["rank"], alpha=settings["alpha"])
        if settings["gradient_checkpointing"]:
            self.unet.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
        )
        self.scaler = torch.amp.GradScaler(enabled=self.dtype == torch.float16 and self.device.type == "cuda")
        self.parallel = ray.train.torch.prepare_model(self.unet)
        self.reader = ThreadPoolExecutor(READING_THREADS, thread_name_prefix="read")

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "lora": lora_state(self.unet),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        restore_lora(self.unet, state["lora"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def epoch(self, number: int, rank: int, world: int) -> dict[str, Any]:
        """One pass over this worker's rows."""
        started, seed = time.monotonic(), self.settings["seed"]
        size = -(-self.settings["batch_size"] // world)
        # The same number of steps in all workers, or the last would wait for ever; rows left over have another
        # place in the next epoch's order.
        steps = max(1, self.num_rows // world // size)
        order = torch.randperm(len(self.share["pano_id"]), generator=seeded(seed, number, rank, 0)).tolist()
        random = seeded(seed, number, rank, 1)
        total = torch.zeros(1, dtype=torch.float64)
        self.parallel.train()
        for step in range(steps):
            factor = schedule(number * steps + step, self.settings["epochs"] * steps, self.settings["warmup_fraction"])
            for group in self.optimizer.param_groups:
                group["lr"] = factor * self.settings["learning_rate"]
            total += self._step(order[step * size : (step + 1) * size], random)
        loss = float(sum_over_workers(total)[0]) / (steps * world)
        return {"epoch": number, "train_loss": loss, "steps": steps, "seconds": round(time.monotonic() - started, 4)}

    def _step(self, rows: list[int], random: torch.Generator) -> float:
        latents, states = self._inputs(rows, random)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = denoising_loss(
                self.parallel, self.scheduler, latents, states, random, min_snr_gamma=self.settings["min_snr_gamma"]
            )
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(loss.item())

    @torch.no_grad()
    def _inputs(self, rows: list[int], random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) of the turned panoramas, and text states (B, L, D)."""
        pictures = list(self.reader.map(self._pixels, rows))
        pixels = torch.stack([turned(picture, random) for picture in pictures]).to(self.device, self.vae.dtype)
        drawn = self.vae.encode(pixels).latent_dist
        noise = torch.randn(drawn.mean.shape, generator=random).to(self.device, drawn.mean.dtype)
        latents = (drawn.mean + drawn.std * noise) * self.vae.config.scaling_factor
        states = self.prompts.encode([self.prompts.fit(str(self.share["caption"][row])) for row in rows])
        dropped = torch.rand(len(rows), generator=random) < self.settings["caption_dropout"]
        states = torch.where(dropped.to(self.device)[:, None, None], self.nothing, states)
        return latents, states

    def _pixels(self, row: int) -> Tensor:
        try:
            image = decode_image(read_image(str(self.share["image_uri"][row])))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The image of {self.share['pano_id'][row]!r} cannot be trained on ({error}); mend it, or remove the "
                "row from the captions table."
            ) from error
        return panorama_pixels(image, self.settings["height_px"])
