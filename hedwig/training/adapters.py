"""What of an encoder is fine-tuned: the last blocks of its vision tower, or low-rank adapters on all of its blocks.

LoRA (Hu et al. 2021) as a parametrization of the weights themselves: the same for `nn.Linear`, for `nn.Linear`s that
`nn.MultiheadAttention` never calls, and for the fused in-projection of both; at the end the sum becomes the weight,
and the model has the keys it had. The price is the gradient of a whole weight matrix in each step, which adapters
beside the layer would avoid; what is saved is the optimiser's memory and what a checkpoint holds. The text tower always
rests (as in LiT, Zhai et al. 2022), so text vectors stay those of the given weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from hedwig.models.spec import CONFIGS, check_name
from hedwig.models.viclip import ViCLIP

__all__ = ["LowRank", "add_lora", "checkpoint_blocks", "merge_lora", "rest", "train_blocks", "vision_depth"]

ADAPTED = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")


class LowRank(nn.Module):
    """W + (alpha / rank) · up · down, which is W until `up`, zeros at first, is trained.

    Args:
        weight: W (O, I).
        rank: of the change.
        alpha: its scale times the rank.
        generator: of `down`.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.down = nn.Parameter(torch.randn(rank, inputs, generator=generator) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """W (O, I) to the changed W, float32 also under autocast: what is merged later is what was trained."""
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def vision_depth(name: str) -> int:
    """How many transformer blocks the vision tower of an encoder has, without building it.

    Raises:
        ValueError: unknown encoder, or one whose tower cannot be fine-tuned here.
    """
    check_name(name)
    if name in CONFIGS:
        return CONFIGS[name].vision_layers
    prefix, _, label = name.partition(":")
    if prefix == "open_clip":
        import open_clip  # seconds to import

        vision = (open_clip.get_model_config(label) or {}).get("vision_cfg", {})
        layers = vision.get("layers", 12)
        if vision and "timm_model_name" not in vision and isinstance(layers, int):
            return layers
    raise ValueError(
        f"{name} cannot be fine-tuned here: only viclip-*, clip-*, and those architectures of open_clip whose vision "
        "tower is its own transformer (ViT-*). Choose one of these, or leave encoder.finetune out."
    )


def rest(module: nn.Module) -> None:
    """Freeze everything; what is trained is said afterwards."""
    module.requires_grad_(False)


def train_blocks(module: nn.Module, num: int) -> None:
    """Let the last `num` blocks of the vision tower, its last normalisation and its projection learn.

    Args:
        module: a ViCLIP or an open_clip tower, changed in place.
        num: 1 to the number of blocks.

    Raises:
        ValueError: the tower has fewer blocks.
    """
    blocks, tower = _blocks(module), _tower(module)
    if not 1 <= num <= len(blocks):
        raise ValueError(f"blocks must be 1 to {len(blocks)}, the depth of this vision tower; got {num}.")
    for block in blocks[-num:]:
        block.requires_grad_(True)
    tower.ln_post.requires_grad_(True)
    for part in ("proj", "attn_pool"):
        if getattr(tower, part, None) is not None:
            getattr(tower, part).requires_grad_(True)


def add_lora(module: nn.Module, rank: int, alpha: float, *, seed: int) -> None:
    """Put adapters on every matrix of every block of the vision tower; they change nothing before they are trained.

    Args:
        module: a ViCLIP or an open_clip tower, changed in place.
        rank: of each adapter.
        alpha: their scale times the rank.
        seed: of their first weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for owner, name in _adapted(module):
        weight = getattr(owner, name)
        parametrize.register_parametrization(owner, name, LowRank(weight, rank, alpha, generator))


def merge_lora(module: nn.Module) -> None:
    """Make what the adapters of `add_lora` give the weights, and take the adapters away."""
    for owner in list(module.modules()):
        for name in list(getattr(owner, "parametrizations", {})):
            parametrize.remove_parametrizations(owner, name, leave_parametrized=True)


def checkpoint_blocks(module: nn.Module) -> None:
    """Compute the activations inside the vision tower's blocks again in the backward pass instead of keeping them."""
    for block in _blocks(module):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _tower(module: nn.Module) -> Any:
    return module.vision_encoder if isinstance(module, ViCLIP) else getattr(module.model, "visual", None)


def _blocks(module: nn.Module) -> Any:
    blocks = getattr(getattr(_tower(module), "transformer", None), "resblocks", None)
    if blocks is None:
        raise ValueError(f"The vision tower of this {type(module).__name__} has no transformer blocks to fine-tune.")
    return blocks


def _adapted(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules that own a matrix to adapt, and its name there."""
    found = []
    for key, _ in list(_blocks(module).named_parameters()):
        if key.endswith(ADAPTED):
            owner, _, name = key.rpartition(".")
            found.append((_blocks(module).get_submodule(owner), name))
    return found
