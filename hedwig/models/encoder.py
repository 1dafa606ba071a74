"""The encoder the pipeline uses: a named model, its weights, and two methods from numpy to numpy.

Five names, each one branch of `load_encoder`; no registry. Without weights the model is random from a seed and says
so in `weights_note`, which is meant to be shown wherever a result is. bfloat16 is had by casting the weights:
autocast on a CPU casts them anew at each call and is three times slower than float32.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hedwig.models.clip import MeanCLIP, load_clip, random_clip, save_clip, tiny_clip
from hedwig.models.viclip import B16, L14, TINY, ViCLIP, ViCLIPConfig, load_viclip, random_viclip, save_viclip
from hedwig.models.weights import read_card, weights_digest, weights_file

__all__ = ["ENCODER_NAMES", "VideoTextEncoder", "encoder_sizes", "load_encoder", "save_encoder"]

ENCODER_NAMES = ("viclip-tiny", "viclip-b16", "viclip-l14", "clip-tiny", "clip-vit-l14")

VIT_L14 = "ViT-L-14-quickgelu"  # OpenAI's weights were trained with QuickGELU

Module = ViCLIP | MeanCLIP
Floats = NDArray[np.float32]


class VideoTextEncoder:
    """Frames and captions to unit vectors, in evaluation mode and without gradients.

    Attributes:
        name: one of `ENCODER_NAMES`.
        model_id: name@ and the first 12 digits of the weights' digest.
        weights_digest: SHA-256 of the float32 weights, whatever file they came from.
        weights_note: where the weights come from, in words for a reader.
        image_dim: dimension of image embeddings.
        text_dim: dimension of text embeddings.
        frame_px: height and width of a frame.
        num_frames: V, the frames of a panorama.
        module: the torch module.
    """

    def __init__(self, name: str, module: Module, *, weights_note: str, device: str, dtype: torch.dtype) -> None:
        self.name = name
        self.weights_digest = weights_digest(_official_state(module))
        self.model_id = f"{name}@{self.weights_digest[:12]}"
        self.weights_note = weights_note
        self.frame_px, self.num_frames, self.image_dim = _sizes(module)
        self.text_dim = self.image_dim
        self.device = torch.device(device)
        self.module = module.to(device=self.device, dtype=dtype).eval()

    def encode_frames(self, frames: NDArray[np.uint8]) -> Floats:
        """(B, V, S, S, 3) uint8 RGB frames to (B, D) of unit norm."""
        expected = (self.num_frames, self.frame_px, self.frame_px, 3)
        if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[1:] != expected:
            raise ValueError(
                f"{self.name} takes uint8 frames (B, V, S, S, 3) = (B, {', '.join(map(str, expected))}), got "
                f"{frames.dtype} {frames.shape}."
            )
        if len(frames) == 0:
            return np.zeros((0, self.image_dim), dtype=np.float32)
        # Arrow hands over read-only memory, which torch does not take without a warning.
        batch = torch.from_numpy(np.require(frames, requirements=["C", "W"])).to(self.device)
        with torch.inference_mode():
            return _unit(self.module.video_features_uint8(batch))

    def encode_text(self, texts: Sequence[str]) -> Floats:
        """B captions to (B, D) of unit norm; what does not fit into the context is cut."""
        if len(texts) == 0:
            return np.zeros((0, self.text_dim), dtype=np.float32)
        ids, _ = self.module.tokenise(texts)
        with torch.inference_mode():
            return _unit(self.module.text_features(ids))


def _unit(features: Tensor) -> Floats:
    out: Floats = F.normalize(features.float(), dim=-1).cpu().numpy()
    return out


def _official_state(module: Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = module.state_dict() if isinstance(module, ViCLIP) else module.model.state_dict()
    return state


def _sizes(module: Module) -> tuple[int, int, int]:
    if isinstance(module, ViCLIP):
        return module.config.frame_px, module.config.num_frames, module.config.embed_dim
    return module.frame_px, module.num_frames or TINY.num_frames, module.image_dim


def load_encoder(
    name: str,
    *,
    weights: str | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> VideoTextEncoder:
    """The encoder called `name`.

    Args:
        name: one of `ENCODER_NAMES`.
        weights: a file, or a folder holding model.safetensors; None for random weights.
        seed: decides the random weights; unused with `weights`.
        device: "auto" takes CUDA where there is one.
        dtype: what the weights are cast to; results are float32 in any case.

    Raises:
        FileNotFoundError: there is no such weights file.
        ValueError: unknown name, device or dtype, or weights of another model.
    """
    _check_name(name)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}.")
    if weights is None:
        module, note = _random(name, seed), f"random weights (seed {seed})"
    else:
        module, note = _read(name, weights), ""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    encoder = VideoTextEncoder(name, module, weights_note=note, device=device, dtype=getattr(torch, dtype))
    if weights is not None:
        file = weights_file(weights)
        written = f"weights from {file.name}, sha256 {encoder.weights_digest[:12]}"
        encoder.weights_note = str(read_card(file).get("note") or written)
    return encoder


def encoder_sizes(name: str) -> tuple[int, int, int]:
    """(frame side in px, frames, embedding dimension of images and texts) of a named encoder, without building it."""
    _check_name(name)
    config = _viclip_config({"clip-tiny": "viclip-tiny", "clip-vit-l14": "viclip-l14"}.get(name, name))
    return config.frame_px, config.num_frames, config.embed_dim


def _check_name(name: str) -> None:
    if name not in ENCODER_NAMES:
        near = difflib.get_close_matches(name, ENCODER_NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"Unknown encoder {name!r}; {hint}There are {', '.join(ENCODER_NAMES)}.")


def _viclip_config(name: str) -> ViCLIPConfig:
    return {"viclip-tiny": TINY, "viclip-b16": B16, "viclip-l14": L14}[name]


def _random(name: str, seed: int) -> Module:
    if name == "clip-tiny":
        return tiny_clip(seed)
    if name == "clip-vit-l14":
        return random_clip(VIT_L14, seed, num_frames=L14.num_frames)
    return random_viclip(_viclip_config(name), seed)


def _read(name: str, weights: str) -> Module:
    recorded = read_card(weights_file(weights)).get("name")
    if recorded in ENCODER_NAMES and recorded != name:
        raise ValueError(f"{weights!r} holds {recorded!r}, not {name!r}; name that encoder instead.")
    if name == "clip-tiny":
        return load_clip("tiny", weights=weights, num_frames=TINY.num_frames)
    if name == "clip-vit-l14":
        return load_clip(VIT_L14, weights=weights, num_frames=L14.num_frames)
    module, wanted = load_viclip(weights), asdict(_viclip_config(name))
    other = {key: value for key, value in asdict(module.config).items() if value != wanted[key]}
    if other:
        found = ", ".join(f"{key}={value} instead of {wanted[key]}" for key, value in other.items())
        raise ValueError(f"{weights!r} holds a ViCLIP of another size than {name!r}: {found}.")
    return module


def save_encoder(module: Module, name: str, folder: str | Path, note: str) -> None:
    """Write model.safetensors (official layout, float32) and model.json into `folder`, made if need be.

    Args:
        module: the ViCLIP or MeanCLIP, for instance after training.
        name: the encoder it is to be loaded as.
        folder: where to.
        note: what a reader of any result must know of these weights; becomes `weights_note`.
    """
    if name not in ENCODER_NAMES:
        raise ValueError(f"Unknown encoder {name!r}; there are {', '.join(ENCODER_NAMES)}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.safetensors"
    card: dict[str, Any] = {"kind": "encoder", "name": name, "note": note}
    if isinstance(module, ViCLIP):
        save_viclip(module, file)
        card["config"] = asdict(module.config)
    else:
        save_clip(module, file)
    card["weights_sha256"] = weights_digest(file)
    (folder / "model.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
