"""Mean-pooled CLIP: every frame on its own through an open_clip model, then the mean. The baseline to beat.

Each frame's vector is brought to unit norm before averaging, so that no frame counts more for being long. It has
the interface of `ViCLIP`, so nothing downstream knows which one it holds, but it cannot see the order of frames.
Weights come from a local file, strictly; open_clip's own downloading is never reached. QuickGELU leaves no trace in
a state dict and plain GELU merely gives wrong numbers, so a mismatch is an error here and not a warning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hedwig.models.viclip import TINY, tokenise
from hedwig.models.weights import load_strict, read_state_dict, weights_file

__all__ = ["MeanCLIP", "load_clip", "random_clip", "save_clip", "tiny_clip"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# As wide, deep and patched as ViCLIP's TINY; 32 tokens, so that both read the same captions.
TINY_CLIP: dict[str, Any] = {
    "embed_dim": TINY.embed_dim,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": TINY.frame_px,
        "patch_size": TINY.patch_px,
        "width": TINY.vision_width,
        "layers": TINY.vision_layers,
        "head_width": TINY.vision_width // TINY.vision_heads,
    },
    "text_cfg": {
        "context_length": TINY.context_length,
        "vocab_size": TINY.vocab_size,
        "width": TINY.text_width,
        "heads": TINY.text_heads,
        "layers": TINY.text_layers,
    },
}

# What OpenAI's scripted archive stores beside the weights.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


class MeanCLIP(nn.Module):
    """An open_clip model applied to each frame.

    Args:
        model: an `open_clip.CLIP` with square images and the byte-pair text tower.
        num_frames: T; the frames a clip must have, None for any number.
    """

    def __init__(self, model: nn.Module, *, num_frames: int | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.num_frames = num_frames
        clip: Any = model
        self.frame_px = int(clip.visual.image_size[0])
        self.context_length = int(clip.context_length)
        self.image_dim = int(clip.visual.output_dim)

    def video_features(self, frames: Tensor) -> Tensor:
        """(B, T, 3, H, W) CLIP-normalised frames to (B, D): the mean of unit vectors, so of norm at most 1."""
        px = self.frame_px
        if frames.ndim != 5 or frames.shape[2:] != (3, px, px) or self.num_frames not in (None, frames.shape[1]):
            raise ValueError(
                f"Expected (B, T, 3, H, W) = (B, {self.num_frames or 'T'}, 3, {px}, {px}), got {tuple(frames.shape)}."
            )
        each: Tensor = self.model.encode_image(frames.flatten(0, 1).to(self.model.visual.proj.dtype))
        return F.normalize(each, dim=-1).reshape(len(frames), -1, self.image_dim).mean(dim=1)

    def video_features_uint8(self, frames: Tensor) -> Tensor:
        """(B, T, H, W, 3) uint8 RGB frames to (B, D)."""
        if frames.dtype != torch.uint8:
            raise ValueError(f"Frames must be uint8 RGB, got {frames.dtype}; video_features takes normalised floats.")
        mean = 255 * torch.tensor(CLIP_MEAN, device=frames.device)
        std = 255 * torch.tensor(CLIP_STD, device=frames.device)
        return self.video_features(((frames.float() - mean) / std).movedim(-1, 2) if frames.ndim == 5 else frames)

    def text_features(self, ids: Tensor) -> Tensor:
        """(B, L) token ids to (B, D), not normalised, with gradients."""
        if ids.ndim != 2 or ids.shape[1] != self.context_length:
            raise ValueError(f"Expected (B, L) = (B, {self.context_length}), got {tuple(ids.shape)}.")
        features: Tensor = self.model.encode_text(ids.to(self.model.logit_scale.device))
        return features

    def encode_video(self, frames: Tensor) -> Tensor:
        """(B, T, 3, H, W) CLIP-normalised frames to (B, D) of unit norm, float32."""
        return F.normalize(self.video_features(frames).float(), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Captions to (B, D) of unit norm, float32; what does not fit into the context is cut."""
        return F.normalize(self.text_features(self.tokenise(texts)[0]).float(), dim=-1)

    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`hedwig.models.viclip.tokenise` at this model's context length: ids (B, L) int64, truncated (B,) bool."""
        return tokenise(texts, self.context_length)


def load_clip(
    name: str = "ViT-L-14-quickgelu",
    *,
    weights: str | Path,
    quick_gelu: bool = True,
    num_frames: int | None = None,
    device: str | torch.device = "cpu",
) -> MeanCLIP:
    """A CLIP in evaluation mode with the weights of a local file, loaded strictly.

    Args:
        name: an architecture of open_clip, or "tiny" for the one `tiny_clip` makes.
        weights: a .safetensors or PyTorch file in open_clip's layout, or a folder holding model.safetensors.
        quick_gelu: whether these weights were trained with QuickGELU (OpenAI's were); an open_clip_config.json
            beside the file overrules it.
        num_frames: the frames a clip must have, None for any number.
        device: where to put the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown name, an activation that is not the one the weights were trained with, or keys and
            shapes that do not fit.
    """
    file = weights_file(weights)
    architecture = _architecture(name)
    trained = _recorded_quick_gelu(file)
    trained = quick_gelu if trained is None else trained
    if bool(architecture.get("quick_gelu", False)) != trained:
        other = f"{name}-quickgelu" if trained else name.removesuffix("-quickgelu")
        raise ValueError(
            f"{name!r} computes {'GELU' if trained else 'QuickGELU'}, but the weights {str(file)!r} were trained with "
            f"{'QuickGELU' if trained else 'GELU'}; use {other!r}, or pass quick_gelu={not trained} if that is wrong."
        )
    with torch.device("meta"):
        model = _build(architecture)
    state = {key: value for key, value in read_state_dict(file).items() if key not in NOT_WEIGHTS}
    load_strict(model, state, origin=str(file))
    length = model.context_length
    model.attn_mask = torch.full((length, length), float("-inf")).triu_(1)  # not in the state dict, so still on meta
    return MeanCLIP(model, num_frames=num_frames).to(device).eval()


def random_clip(name: str, seed: int, *, num_frames: int | None = None) -> MeanCLIP:
    """A CLIP in evaluation mode with open_clip's initialisation, decided by `seed`; the global generator is put back.

    Args:
        name: an architecture of open_clip, or "tiny".
        seed: decides the weights.
        num_frames: the frames a clip must have, None for any number.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(_architecture(name))
    return MeanCLIP(model, num_frames=num_frames).eval()


def tiny_clip(seed: int) -> MeanCLIP:
    """A random small CLIP as costly as ViCLIP's TINY."""
    return random_clip("tiny", seed, num_frames=TINY.num_frames)


def save_clip(clip: MeanCLIP, path: str | Path) -> None:
    """Write safetensors in open_clip's layout, float32."""
    state = {
        key: value.detach().to("cpu", torch.float32).contiguous() for key, value in clip.model.state_dict().items()
    }
    save_file(state, path, metadata={"format": "pt"})


def _architecture(name: str) -> dict[str, Any]:
    import open_clip  # seconds to import; who runs ViCLIP need not pay them

    known = open_clip.list_models()
    if name != "tiny" and name not in known:  # also keeps names with a scheme, which would download, out
        near = [n for n in known if n.lower().startswith(name.lower()[:8])]
        raise ValueError(f"open_clip knows no {name!r}; did you mean one of {near[:6] or ['ViT-L-14-quickgelu']}?")
    architecture: dict[str, Any] = dict(TINY_CLIP if name == "tiny" else open_clip.get_model_config(name))
    custom = architecture.pop("custom_text", False) or "timm_model_name" in architecture["vision_cfg"]
    if custom or "hf_model_name" in architecture["text_cfg"]:
        raise ValueError(f"{name!r} is not a plain CLIP vision transformer with CLIP's text tower.")
    return architecture


def _build(architecture: dict[str, Any]) -> Any:
    import open_clip

    return open_clip.CLIP(**architecture)


def _recorded_quick_gelu(file: Path) -> bool | None:
    card = file.with_name("open_clip_config.json")
    if not card.is_file():
        return None
    return bool(json.loads(card.read_text(encoding="utf-8")).get("model_cfg", {}).get("quick_gelu", False))
