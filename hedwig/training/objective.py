"""What an encoder is trained against, and what is done to its input: classifier, hidden patches, augmentation.

Nothing of this survives training but the encoder inside `Objective`. The encoder's own code knows none of it: patches
are hidden by a hook before the first block, the same for ViCLIP and for CLIP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HidePatches", "Objective", "augmented", "with_others"]


class Objective(nn.Module):
    """The encoder with what only training needs: the coarse classifier and two temperatures.

    Args:
        module: the encoder's module.
        dim: D.
        num_cells: C.
        with_text: whether captions are read.
        joint: frames are fused by the module; else the mean of their vectors counts.
        interpolate: a module that fuses frames may stretch its temporal embedding to their number.
        text_scale: what cosines between videos and captions are multiplied by at first.
        half: run the encoder in bfloat16 by autocast; the rest, and what comes out, is float32.
    """

    def __init__(
        self,
        module: nn.Module,
        dim: int,
        num_cells: int,
        *,
        with_text: bool,
        joint: bool = True,
        interpolate: bool = False,
        text_scale: float = 1 / 0.07,
        half: bool = False,
    ) -> None:
        super().__init__()
        self.encoder: Any = module
        self.classifier = nn.Linear(dim, num_cells)
        nn.init.normal_(self.classifier.weight, std=dim**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.log_text_scale = nn.Parameter(torch.tensor(text_scale).log(), requires_grad=with_text)
        self.with_text, self.joint, self.interpolate, self.in_bf16 = with_text, joint, interpolate, half

    def forward(self, frames: Tensor, captions: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Frames (B, V, S, S, 3) uint8 and captions to logits (B, C), both unit vectors (B, D), a scale.

        Captions are token ids (B, L), or their vectors (B, D) where the text tower is not trained.
        """
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.in_bf16):
            if self.joint:
                video = self.encoder.video_features_uint8(frames, interpolate=self.interpolate)
            else:
                video = self.encoder.each_frame_uint8(frames).mean(dim=1)
        video = F.normalize(video.float(), dim=-1)
        logits = self.log_scale.exp() * F.linear(video, self.classifier.weight) + self.classifier.bias
        text = None
        if self.with_text and captions is not None:
            text = captions if captions.is_floating_point() else self.encoder.text_features(captions)
            text = F.normalize(text, dim=-1)
        return logits, video, text, self.log_text_scale.exp()


class HidePatches:
    """Leaves a random share of the patch tokens out before the first block; another choice for every clip and step."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.generator = torch.Generator()

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Tokens (B, 1 + N, W) to (B, 1 + kept, W) while training; the class token, the first, always stays."""
        (tokens,) = inputs
        if not module.training or self.share == 0:
            return None
        batch, num_patches = len(tokens), tokens.shape[1] - 1
        kept = max(1, round(num_patches * (1 - self.share)))
        order = torch.rand(batch, num_patches, generator=self.generator).argsort(dim=1)[:, :kept] + 1
        index = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), order], dim=1).to(tokens.device)
        return (tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2])),)


def augmented(frames: Tensor, random: torch.Generator, roll_probability: float, brightness: float) -> Tensor:
    """Rotate the frames of some clips (a panorama is a circle) and scale the brightness of all.

    (B, V, S, S, 3) uint8 in and out. Never mirrored: traffic would change sides.
    """
    batch, num_frames = frames.shape[:2]
    shift = torch.randint(num_frames, (batch, 1), generator=random)
    shift = shift * (torch.rand(batch, 1, generator=random) < roll_probability)
    index = (torch.arange(num_frames) + shift) % num_frames
    rolled = frames[torch.arange(batch)[:, None], index]
    if brightness == 0:
        return rolled
    factor = 1 + brightness * (2 * torch.rand(batch, 1, 1, 1, 1, generator=random) - 1)
    return (rolled * factor).clamp_(0, 255).to(torch.uint8)


def with_others(vectors: Tensor) -> Tensor:
    """(B, D) of this worker with those of the others around it, (world·B, D); gradients flow into its own only."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return vectors
    parts = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, vectors.detach())
    parts[dist.get_rank()] = vectors
    return torch.cat(parts)
