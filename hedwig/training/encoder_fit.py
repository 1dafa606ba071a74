"""One encoder in training: its epochs over frames, the steps in them, and the validation after each.

Shared by training from scratch and by fine-tuning, which differ in what they let learn and how fast. Objective:
haversine-smoothed classification over coarse cells, read off the normalised video vector by a head that is thrown
away, plus a contrastive loss between videos and captions. An encoder is trained as it will be asked: on its fused
frames, or, where its fusion looks at every frame alone, on the mean of their vectors.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray.train.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from hedwig.geo import haversine_km, spherical_mean, unit_vectors
from hedwig.losses import haversine_smoothing_loss, haversine_targets, video_text_loss
from hedwig.models.encoder import VideoTextEncoder, evenly
from hedwig.models.viclip import ViCLIP
from hedwig.training.frames import read_positions
from hedwig.training.loop import gather, schedule, seeded, sum_over_workers
from hedwig.training.objective import HidePatches, Objective, augmented, with_others

__all__ = ["EncoderFit", "make_frames_plan"]

EVALUATION_ROWS = 64
MEASURED_STEPS = 20
MAX_NORM = 1.0


def make_frames_plan(frames: str, num_cells: int, seed: int, num_workers: int) -> dict[str, Any]:
    """What a frames cache offers: ids of both splits in sorted order, and centres of coarse cells.

    Args:
        frames: folder of the cache.
        num_cells: of the k-means over the training positions; fewer for a small split.
        seed: of the k-means.
        num_workers: who share the training rows.

    Returns:
        frames; train, val (lists of pano_id); cell_lat, cell_lon (C,) degrees.

    Raises:
        FileNotFoundError: there is no frames cache.
        ValueError: fewer training rows than workers.
    """
    from hedwig.geocells.kmeans import spherical_kmeans

    rows = read_positions(frames).to_pandas()
    rows = rows[rows["lat"].notna() & rows["lon"].notna()]
    train = rows[rows["split"] == "train"]
    if train.empty:
        raise ValueError(f"{frames!r} has no training rows: none has split 'train' and a position.")
    if len(train) < num_workers:
        raise ValueError(f"{len(train)} training rows with a position in {frames!r} for {num_workers} worker(s).")
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


class EncoderFit:
    """One encoder in training, with what a checkpoint holds of it.

    Args:
        encoder: whose parameters that take gradients are trained.
        settings: epochs, batch_size, learning_rate, weight_decay, warmup_fraction, num_cells, tau_km, text_weight,
            hidden_patches, roll_probability, brightness and seed.
        plan: of `make_frames_plan`.
        shares: by split, this worker's rows as `hedwig.training.frames.read_frames` gives them.
        captions: of the training share: ids (N, L) if the text tower learns, vectors (N, D) if it rests, where zeros
            are no caption; None for none.
        head_rate: learning rate of the classifier and the scales.
        text_scale: see `Objective`.
        budget_s: time for the steps; None for as many epochs as the settings say.
        half: bfloat16 in the encoder, on a GPU.
    """

    def __init__(
        self,
        encoder: VideoTextEncoder,
        settings: Mapping[str, Any],
        plan: Mapping[str, Any],
        shares: Mapping[str, Any],
        *,
        captions: Tensor | None,
        head_rate: float,
        text_scale: float = 1 / 0.07,
        budget_s: float | None = None,
        half: bool = False,
    ) -> None:
        self.settings, self.shares, self.captions = settings, shares, captions
        self.num_train, self.num_val = len(plan["train"]), len(plan["val"])
        self.num_epochs = int(settings["epochs"])
        self.budget_s, self.planned = budget_s, budget_s is None
        self.device = ray.train.torch.get_device()
        torch.manual_seed(settings["seed"])
        self.objective = Objective(
            encoder.module,
            encoder.image_dim,
            settings["num_cells"],
            with_text=captions is not None,
            joint=encoder.fusion == "viclip",
            interpolate=encoder.temporal == "interpolate",
            text_scale=text_scale,
            half=half and self.device.type == "cuda",
        )
        num_frames, own = shares["train"]["frames"].shape[1], encoder.num_frames
        chooses = encoder.fusion == "viclip" and encoder.temporal == "select" and num_frames not in (1, own)
        self.chosen = torch.from_numpy(evenly(num_frames, own) if chooses else np.arange(num_frames))
        self.hide = HidePatches(settings["hidden_patches"])
        tower = encoder.module.vision_encoder if isinstance(encoder.module, ViCLIP) else encoder.module.model.visual
        tower.ln_pre.register_forward_pre_hook(self.hide)
        self.objective.to(self.device)
        self.learning = {key: p for key, p in self.objective.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self._groups(head_rate), betas=(0.9, 0.98), fused=True)
        self.parallel: nn.Module = ray.train.torch.prepare_model(self.objective)
        self.cell_lat = torch.from_numpy(plan["cell_lat"]).to(self.device)
        self.cell_lon = torch.from_numpy(plan["cell_lon"]).to(self.device)

    def _groups(self, head_rate: float) -> list[dict[str, Any]]:
        """What learns, by learning rate and by whether it decays, which only matrices do."""
        groups = []
        for prefixed, rate in ((True, float(self.settings["learning_rate"])), (False, head_rate)):
            own = [p for key, p in self.learning.items() if key.startswith("encoder.") == prefixed]
            for matrices, decay in ((True, self.settings["weight_decay"]), (False, 0.0)):
                some = [p for p in own if (p.ndim > 1) == matrices]
                if some:
                    groups.append({"params": some, "lr": rate, "top_rate": rate, "weight_decay": decay})
        return groups

    def trained(self) -> dict[str, Tensor]:
        """What learns, by its name in the encoder, on the CPU."""
        state = self._learned()
        return {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}

    def _learned(self) -> dict[str, Tensor]:
        return {key: value.detach().cpu().clone() for key, value in self.learning.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of an unfinished encoder: what learns, not what rests."""
        return {
            "model": self._learned(),
            "optimizer": self.optimizer.state_dict(),
            "num_epochs": self.num_epochs,
            "planned": self.planned,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.objective.load_state_dict({**self.objective.state_dict(), **state["model"]})
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
                group["lr"] = factor * group["top_rate"]
            rows = order[step * batch_size : (step + 1) * batch_size]
            losses = self._step(rows, random)
            sums += torch.tensor(losses, dtype=torch.float64)
            if not self.planned and step + 1 == min(MEASURED_STEPS, steps):
                self._plan_epochs(time.monotonic() - started, step + 1, steps)
        cells, texts = (sum_over_workers(sums) / (steps * world)).tolist()
        row = {"epoch": number, "train_loss": cells, "text_loss": texts}
        if self.num_val:
            row.update(self._validate())
        return {**row, "seconds": round(time.monotonic() - started, 4)}

    def _plan_epochs(self, seconds: float, done: int, steps: int) -> None:
        """Fit the number of epochs into the budget; the slowest worker decides for all."""
        slowest = float(gather(np.array([seconds])).max()) / done
        validation = 0.3 * slowest * self.num_val / self.settings["batch_size"]  # no backward pass
        wanted = int((self.budget_s or 0) / (slowest * steps + validation))
        self.num_epochs, self.planned = min(self.num_epochs, max(1, wanted)), True

    def _step(self, rows: Tensor, random: torch.Generator) -> tuple[float, float]:
        share = self.shares["train"]
        frames = torch.from_numpy(share["frames"][rows.numpy()])
        frames = augmented(frames, random, self.settings["roll_probability"], self.settings["brightness"])
        frames = frames[:, self.chosen]
        captions = None if self.captions is None else self.captions[rows].to(self.device)
        logits, video, text, scale = self.parallel(frames.to(self.device), captions)
        cells = haversine_smoothing_loss(logits, self._targets(share, rows))
        texts = torch.zeros((), device=self.device)
        if text is not None:
            video, text = with_others(video), with_others(text)
            there = text.detach().any(dim=1)
            texts = video_text_loss(video[there], text[there], 1 / scale) if there.any() else 0 * scale
        # Every worker differentiates the loss of the whole batch by its own vectors only; the sum of these
        # gradients is the true one, and DDP takes their mean.
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.optimizer.zero_grad()
        torch.autograd.backward(cells + world * self.settings["text_weight"] * texts)
        torch.nn.utils.clip_grad_norm_(self.learning.values(), MAX_NORM)
        self.optimizer.step()
        with torch.no_grad():
            self.objective.log_text_scale.clamp_(max=np.log(100.0))
        return cells.item(), texts.item()

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
