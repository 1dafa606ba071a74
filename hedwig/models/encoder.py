"""The encoder the pipeline uses: a named model, its weights, and a few methods from numpy to numpy.

Each name is one branch of `load_encoder`; no registry. Without weights the model is random from a seed and says so in
`weights_note`, which is meant to be shown wherever a result is. How frames become one vector is the fusion: ViCLIP's
joint attention over space and time, or a mean over frames that were looked at one by one. max_sim and attention do
not fuse here: they store every frame's vector and leave it to retrieval or to the head, so that here they give the
mean. Half precision is had by casting the weights: autocast on a CPU casts them anew at each call and is three times
slower than float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hedwig.models.clip import load_clip, random_clip, save_clip, tiny_clip, write_open_clip_card
from hedwig.models.spec import (
    CONFIGS,
    DEFAULT_NUM_FRAMES,
    ENCODER_NAMES,
    EncoderSpec,
    check_name,
    encoder_spec,
    folder_of,
)
from hedwig.models.text import chunk_caption
from hedwig.models.towers import ImageTower, load_timm, random_timm
from hedwig.models.transformers_tower import load_transformers
from hedwig.models.viclip import ViCLIP, load_viclip, random_viclip, save_viclip
from hedwig.models.weights import read_card, weights_digest, weights_file

__all__ = [
    "ENCODER_NAMES",
    "EncoderSpec",
    "VideoTextEncoder",
    "encoder_spec",
    "evenly",
    "load_encoder",
    "save_encoder",
]

MAX_FRAMES = 64
VIT_L14 = "ViT-L-14-quickgelu"  # OpenAI's weights were trained with QuickGELU

Module = ViCLIP | ImageTower
Floats = NDArray[np.float32]
Dtype = Literal["float32", "bfloat16", "float16"]
Fusion = Literal["auto", "viclip", "mean", "max_sim", "attention"]
Temporal = Literal["select", "interpolate"]
LongCaptions = Literal["truncate", "chunks"]


class VideoTextEncoder:
    """Frames and captions to unit vectors, in evaluation mode and without gradients.

    Attributes:
        name: what `load_encoder` was given.
        model_id: name@ and the first 12 digits of a digest, then whatever else changes the numbers. The digest is the
            weights' for a ViCLIP; for a tower it covers its mean, standard deviation and frame side, too.
        weights_digest: SHA-256 of the float32 weights, whatever file they came from.
        weights_note: where the weights come from, in words for a reader.
        image_dim: dimension of image embeddings.
        text_dim: dimension of text embeddings; 1 if `has_text` is False.
        has_text: whether the model reads text.
        frame_px: height and width of a frame.
        num_frames: V, the frames a panorama is best given in; from 1 to 64 are taken.
        fusion: "viclip", "mean", "max_sim" or "attention".
        module: the torch module.
    """

    def __init__(
        self,
        name: str,
        module: Module,
        *,
        weights_note: str,
        device: str,
        dtype: torch.dtype,
        fusion: Fusion = "auto",
        temporal: Temporal = "select",
        long_captions: LongCaptions = "truncate",
        num_frames: int | None = None,
        compile: bool = False,
    ) -> None:
        video = isinstance(module, ViCLIP)
        usual = "viclip" if video else "mean"
        self.fusion = usual if fusion == "auto" else fusion
        self.temporal, self.long_captions = temporal, long_captions
        if self.fusion == "viclip" and not video:
            raise ValueError(f"{name} sees one frame at a time: fusion 'viclip' needs a ViCLIP; choose 'mean'.")
        if temporal == "interpolate" and self.fusion != "viclip":
            raise ValueError(f"{name} with fusion {self.fusion!r} has no temporal embedding to interpolate.")
        if num_frames is not None and not 1 <= num_frames <= MAX_FRAMES:
            raise ValueError(f"num_frames must be from 1 to {MAX_FRAMES}, got {num_frames}.")
        self.name, self.weights_note = name, weights_note
        self.weights_digest = weights_digest(_official_state(module))
        self.frame_px, self.image_dim, self.text_dim = module.frame_px, module.image_dim, module.text_dim
        self.has_text = module.has_text
        self._trained_frames = module.config.num_frames if isinstance(module, ViCLIP) else DEFAULT_NUM_FRAMES
        self._only_frames = num_frames if temporal == "interpolate" else None
        self.num_frames = num_frames or self._trained_frames
        self.model_id = "+".join([f"{name}@{_model_digest(module, self.weights_digest)[:12]}", *self._changes(usual)])
        self.device = torch.device(device)
        self.module = module.to(device=self.device, dtype=dtype).eval()
        self._vision = torch.compile(self._forward, dynamic=False) if compile else self._forward
        self._pinned: Tensor | None = None

    def _changes(self, usual: str) -> list[str]:
        """What `model_id` tells besides the weights."""
        changes = [] if self.fusion == usual else [self.fusion]
        if self.temporal == "interpolate" and self._only_frames != self._trained_frames:
            changes.append(f"t{self._only_frames or 'V'}")
        return [*changes, "chunks"] if self.long_captions == "chunks" and self.has_text else changes

    @property
    def stores_frames(self) -> bool:
        """Whether retrieval needs the vector of every frame (`encode_each_frame`), not only that of the panorama."""
        return self.fusion in ("max_sim", "attention")

    def encode_frames(self, frames: NDArray[np.uint8]) -> Floats:
        """(B, V, S, S, 3) uint8 RGB frames, V from 1 to 64, to (B, D) of unit norm.

        Fusion "viclip" takes 8 frames as they are and 1 as the official code does, with the mean temporal embedding.
        Other numbers are brought to 8 by `evenly`, or, with temporal "interpolate", the temporal embedding is
        interpolated to V. The other fusions give the renormalised mean of the vectors of `encode_each_frame`.
        """
        self._check(frames)
        if len(frames) == 0:
            return np.zeros((0, self.image_dim), dtype=np.float32)
        num_frames = frames.shape[1]
        if self.fusion == "viclip" and self.temporal == "select" and num_frames not in (1, self._trained_frames):
            frames = frames[:, evenly(num_frames, self._trained_frames)]
        with torch.inference_mode():
            features = self._vision(self._uploaded(frames))
            return _unit(features if self.fusion == "viclip" else features.mean(dim=1))

    def encode_each_frame(self, frames: NDArray[np.uint8]) -> Floats:
        """(B, V, S, S, 3) uint8 RGB frames, V from 1 to 64, to (B, V, D) of unit norm: every frame on its own."""
        self._check(frames)
        if len(frames) == 0:
            return np.zeros((0, frames.shape[1], self.image_dim), dtype=np.float32)
        look = self.module.each_frame_uint8 if self.fusion == "viclip" else self._vision
        with torch.inference_mode():
            return _unit(look(self._uploaded(frames)))

    def encode_text(self, texts: Sequence[str]) -> Floats:
        """B captions to (B, D) of unit norm.

        What does not fit into the context is cut; with `long_captions` "chunks" such a caption is the renormalised
        mean of the unit vectors of its chunks. A model without a text tower gives zeros (B, 1), for nobody to read.
        """
        if len(texts) == 0 or not self.has_text:
            return np.zeros((len(texts), self.text_dim), dtype=np.float32)
        if self.long_captions == "truncate":
            return self._encode_whole(texts)
        chunks = [chunk_caption(text, self._fits) for text in texts]
        flat = [chunk for some in chunks for chunk in some]
        # Always as many at once as captions were given, so that a vector does not depend on how long others are.
        flat += flat[-1:] * (-len(flat) % len(texts))
        size = len(texts)
        vectors = np.concatenate([self._encode_whole(flat[i : i + size]) for i in range(0, len(flat), size)])
        starts = np.cumsum([0, *map(len, chunks)])
        return np.stack([vectors[a] if b - a == 1 else _unit_mean(vectors[a:b]) for a, b in pairwise(starts)])

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Whether each of B captions is too long for the context, (B,) bool, whatever is then done about it."""
        if len(texts) == 0 or not self.has_text:
            return np.zeros(len(texts), dtype=np.bool_)
        return self.module.tokenise(texts)[1].numpy()

    def _encode_whole(self, texts: Sequence[str]) -> Floats:
        ids, _ = self.module.tokenise(texts)
        with torch.inference_mode():
            return _unit(self.module.text_features(ids))

    def _fits(self, text: str) -> bool:
        return not self.module.tokenise([text])[1].item()

    def _forward(self, frames: Tensor) -> Tensor:
        """(B, V, S, S, 3) uint8 frames to (B, D) by fusion "viclip", else to (B, V, D)."""
        if self.fusion == "viclip" and isinstance(self.module, ViCLIP):
            return self.module.video_features_uint8(frames, interpolate=self.temporal == "interpolate")
        return self.module.each_frame_uint8(frames)

    def _check(self, frames: NDArray[Any]) -> None:
        side, known = (self.frame_px, self.frame_px, 3), frames.ndim == 5 and 1 <= frames.shape[1] <= MAX_FRAMES
        if frames.dtype != np.uint8 or not known or frames.shape[2:] != side:
            raise ValueError(
                f"{self.name} takes uint8 frames (B, V, S, S, 3) = (B, 1..{MAX_FRAMES}, {', '.join(map(str, side))}), "
                f"got {frames.dtype} {frames.shape}."
            )
        if self._only_frames not in (None, frames.shape[1]):
            raise ValueError(f"{self.model_id} was loaded for {self._only_frames} frames, got {frames.shape[1]}.")

    def _uploaded(self, frames: NDArray[np.uint8]) -> Tensor:
        if self.device.type != "cuda":
            # Arrow hands over read-only memory, which torch does not take without a warning.
            return torch.from_numpy(np.require(frames, requirements=["C", "W"])).to(self.device)
        # From pinned memory the copy runs beside the host. The last one is over: every result was brought back.
        if self._pinned is None or self._pinned.shape != frames.shape:
            self._pinned = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=True)
        np.copyto(self._pinned.numpy(), frames)
        return self._pinned.to(self.device, non_blocking=True)


def evenly(num_in: int, num_out: int) -> NDArray[np.intp]:
    """Which of `num_in` frames around a circle stand for `num_out`: round(i · num_in / num_out), halves rounded up.

    The first frame stays the first and the gap across the seam is like the others. Where there are fewer frames than
    wanted, each is repeated, in order: floor(i · num_in / num_out).
    """
    steps = np.arange(num_out)
    return (2 * steps * num_in + (num_out if num_in > num_out else 0)) // (2 * num_out)


def _unit(features: Tensor) -> Floats:
    out: Floats = F.normalize(features.float(), dim=-1).cpu().numpy()
    return out


def _unit_mean(vectors: Floats) -> Floats:
    return _unit(torch.from_numpy(vectors).mean(dim=0))


def _official_state(module: Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = module.state_dict() if isinstance(module, ViCLIP) else module.model.state_dict()
    return state


def _model_digest(module: Module, of_weights: str) -> str:
    """The digest of the weights, and of what a tower learns from the files beside them."""
    if isinstance(module, ViCLIP):
        return of_weights
    settings = [of_weights, [float(v) for v in module.mean], [float(v) for v in module.std], module.frame_px]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def load_encoder(
    name: str,
    *,
    weights: str | None = None,
    sha256: str | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: Dtype = "float32",
    fusion: Fusion = "auto",
    temporal: Temporal = "select",
    long_captions: LongCaptions = "truncate",
    num_frames: int | None = None,
    quick_gelu: bool | None = None,
    compile: bool = False,
) -> VideoTextEncoder:
    """The encoder called `name`.

    Args:
        name: one of `ENCODER_NAMES`, ``open_clip:ARCH``, ``timm:ARCH`` (images only), or ``transformers:LABEL`` for
            the model in the folder `weights`; LABEL is free and appears in `model_id`.
        weights: a file, or a folder holding model.safetensors; None for random weights.
        sha256: what the SHA-256 of that file must be, compared before it is opened; None checks nothing.
        seed: decides the random weights; unused with `weights`.
        device: "auto" takes CUDA where there is one.
        dtype: what the weights are cast to; results are float32 in any case.
        fusion: how frames become one vector; "auto" is "viclip" for a ViCLIP and "mean" for any other.
        temporal: what fusion "viclip" does with a number of frames it was not trained for: "select" (or repeat)
            frames evenly, or "interpolate" the temporal embedding, which changes the model and its `model_id`.
        long_captions: "truncate" as in the paper, or the mean over "chunks".
        num_frames: V that will be given; None for the model's own, and for any. With "interpolate" it is named in
            `model_id` and no other is taken.
        quick_gelu: whether the weights of an open_clip architecture were trained with QuickGELU, where neither they
            nor a file beside them tell; see `hedwig.models.clip.load_clip`.
        compile: run the vision model through `torch.compile`, once per shape of a batch.

    Raises:
        FileNotFoundError: there is no such weights file.
        ValueError: unknown name or setting, another SHA-256, or weights of another model.
    """
    check_name(name)
    for setting, value, choices in (
        ("dtype", dtype, Dtype),
        ("fusion", fusion, Fusion),
        ("temporal", temporal, Temporal),
        ("long_captions", long_captions, LongCaptions),
    ):
        if value not in get_args(choices):
            raise ValueError(f"{setting} must be one of {', '.join(get_args(choices))}; got {value!r}.")
    if weights is None and sha256 is not None:
        raise ValueError(f"sha256 is that of a weights file, and {name!r} was given none.")
    if quick_gelu is not None and (weights is None or not name.startswith(("clip-", "open_clip:"))):
        raise ValueError(
            f"quick_gelu says how weights of open_clip were trained, and {name!r} "
            f"{'was given none' if weights is None else 'is no architecture of it'}; leave it out."
        )
    module = _random(name, seed) if weights is None else _read(name, weights, sha256, quick_gelu)
    encoder = VideoTextEncoder(
        name,
        module,
        weights_note=f"random weights (seed {seed})",
        device=("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device,
        dtype=getattr(torch, dtype),
        fusion=fusion,
        temporal=temporal,
        long_captions=long_captions,
        num_frames=num_frames,
        compile=compile,
    )
    if weights is not None:
        file = weights_file(weights)
        written = f"weights from {file.name}, sha256 {encoder.weights_digest[:12]}"
        card = read_card(file)
        encoder.weights_note = str(card.get("note") or written)
        encoder.model_id += "+finetuned" if card.get("finetuned_from") else ""
    return encoder


def _random(name: str, seed: int) -> Module:
    prefix, _, label = name.partition(":")
    towers: dict[str, Callable[[], Module]] = {
        "clip-tiny": lambda: tiny_clip(seed),
        "clip-vit-l14": lambda: random_clip(VIT_L14, seed),
        "open_clip": lambda: random_clip(label, seed),
        "timm": lambda: random_timm(label, seed),
        "transformers": lambda: load_transformers(folder_of(name, None)),
    }
    return towers[prefix]() if prefix in towers else random_viclip(CONFIGS[name], seed)


def _read(name: str, weights: str, sha256: str | None, quick_gelu: bool | None) -> Module:
    prefix, _, label = name.partition(":")
    if prefix == "transformers":
        return load_transformers(weights, sha256=sha256)
    recorded = read_card(weights_file(weights)).get("name")
    if recorded in ENCODER_NAMES and recorded != name:
        raise ValueError(f"{weights!r} holds {recorded!r}, not {name!r}; name that encoder instead.")
    if prefix == "timm":
        return load_timm(label, weights=weights, sha256=sha256)
    if prefix == "open_clip":
        return load_clip(label, weights=weights, sha256=sha256, quick_gelu=quick_gelu)
    if prefix.startswith("clip-"):
        architecture = "tiny" if name == "clip-tiny" else VIT_L14
        return load_clip(architecture, weights=weights, sha256=sha256, quick_gelu=quick_gelu in (None, True))
    module, wanted = load_viclip(weights, sha256=sha256), asdict(CONFIGS[name])
    other = {key: value for key, value in asdict(module.config).items() if value != wanted[key]}
    if other:
        found = ", ".join(f"{key}={value} instead of {wanted[key]}" for key, value in other.items())
        raise ValueError(f"{weights!r} holds a ViCLIP of another size than {name!r}: {found}.")
    return module


def save_encoder(
    module: Module, name: str, folder: str | Path, note: str, *, finetuned_from: str | None = None
) -> None:
    """Write model.safetensors (official layout, float32) and model.json into `folder`, made if need be.

    Beside the weights of a published open_clip architecture also its open_clip_config.json, which holds what weights
    do not tell: activation and normalisation.

    Args:
        module: the ViCLIP or MeanCLIP, for instance after training.
        name: the encoder it is to be loaded as, one of `ENCODER_NAMES` or ``open_clip:ARCH``.
        folder: where to.
        note: what a reader of any result must know of these weights; becomes `weights_note`.
        finetuned_from: the `model_id` of the encoder that these weights began as; `model_id` then ends in +finetuned.
    """
    if name not in ENCODER_NAMES and not name.startswith("open_clip:"):
        raise ValueError(f"Unknown encoder {name!r}; there are {', '.join(ENCODER_NAMES)} and open_clip:ARCH.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.safetensors"
    card: dict[str, Any] = {"kind": "encoder", "name": name, "note": note}
    if finetuned_from is not None:
        card["finetuned_from"] = finetuned_from
    if isinstance(module, ViCLIP):
        save_viclip(module, file)
        card["config"] = asdict(module.config)
    else:
        save_clip(module, file)
        if name != "clip-tiny":
            label = name.removeprefix("open_clip:") if name.startswith("open_clip:") else VIT_L14
            write_open_clip_card(module, label, folder)
    card["weights_sha256"] = weights_digest(file)
    (folder / "model.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
