"""Image towers: a network that sees one frame at a time, applied to every frame of a panorama.

`ImageTower` has the interface of `ViCLIP`, so nothing downstream knows which one it holds, but no tower can see the
order of frames. It holds what all share: the normalisation with the network's own mean and standard deviation, unit
vectors per frame, their mean. What differs (how to call the network, and its text tower if it has one) is in its
subclasses: here `TimmTower` for any architecture of timm, which reads no text; open_clip's is in `hedwig.models.clip`,
that of transformers in `hedwig.models.transformers_tower`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hedwig.models.shapes import shapes_only
from hedwig.models.weights import build_loaded, read_state_dict, weights_file

__all__ = ["ImageTower", "TimmTower", "load_timm", "random_timm", "timm_sizes"]


class ImageTower(nn.Module):
    """A network applied to each frame; what it gives for a panorama is the mean of unit vectors.

    Each frame's vector is brought to unit norm before averaging, so that no frame counts more for being long.

    Args:
        model: the network.
        frame_px: S; height and width of its images.
        image_dim: D; dimension of its image features.
        mean: of red, green and blue, in 0..1; subtracted.
        std: likewise; divided by.
        text_dim: dimension of its text features; None if it reads no text.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        frame_px: int,
        image_dim: int,
        mean: Sequence[float],
        std: Sequence[float],
        text_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.frame_px, self.image_dim = frame_px, image_dim
        self.mean, self.std = tuple(mean), tuple(std)
        self.has_text = text_dim is not None
        self.text_dim = text_dim or 1

    def image_features(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) normalised images to (N, D)."""
        raise NotImplementedError

    def text_features(self, ids: Tensor) -> Tensor:
        """(B, L) token ids to (B, text_dim), not normalised, with gradients."""
        raise ValueError(f"{type(self).__name__} reads no text.")

    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, L) int64 of captions, and whether each was cut, (B,) bool."""
        raise ValueError(f"{type(self).__name__} reads no text.")

    def each_frame(self, frames: Tensor) -> Tensor:
        """(B, T, 3, S, S) normalised frames to (B, T, D) of unit norm, float32."""
        px = self.frame_px
        if frames.ndim != 5 or frames.shape[2:] != (3, px, px):
            raise ValueError(f"Expected (B, T, 3, H, W) = (B, T, 3, {px}, {px}), got {tuple(frames.shape)}.")
        each = self.image_features(frames.flatten(0, 1).to(next(self.model.parameters()).dtype))
        return F.normalize(each.float(), dim=-1).reshape(*frames.shape[:2], self.image_dim)

    def each_frame_uint8(self, frames: Tensor) -> Tensor:
        """(B, T, S, S, 3) uint8 RGB frames to (B, T, D) of unit norm, float32."""
        if frames.dtype != torch.uint8:
            raise ValueError(f"Frames must be uint8 RGB, got {frames.dtype}; video_features takes normalised floats.")
        mean = 255 * torch.tensor(self.mean, device=frames.device)
        std = 255 * torch.tensor(self.std, device=frames.device)
        return self.each_frame(((frames.float() - mean) / std).movedim(-1, 2) if frames.ndim == 5 else frames)

    def video_features(self, frames: Tensor) -> Tensor:
        """(B, T, 3, S, S) normalised frames to (B, D): the mean of unit vectors, so of norm at most 1."""
        return self.each_frame(frames).mean(dim=1)

    def video_features_uint8(self, frames: Tensor) -> Tensor:
        """(B, T, S, S, 3) uint8 RGB frames to (B, D)."""
        return self.each_frame_uint8(frames).mean(dim=1)

    def encode_video(self, frames: Tensor) -> Tensor:
        """(B, T, 3, S, S) normalised frames to (B, D) of unit norm, float32."""
        return F.normalize(self.video_features(frames), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Captions to (B, text_dim) of unit norm, float32; what does not fit into the context is cut."""
        return F.normalize(self.text_features(self.tokenise(texts)[0]).float(), dim=-1)


class TimmTower(ImageTower):
    """A network of timm without its classifier."""

    def image_features(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) normalised images to (N, D), as pooled for the classifier."""
        features: Tensor = self.model(images)
        return features


def load_timm(name: str, *, weights: str | Path, sha256: str | None = None) -> TimmTower:
    """A timm network in evaluation mode with the weights of a local file, loaded strictly.

    The classifier that published files hold is left out; every other key must fit.

    Args:
        name: an architecture of timm, with or without a tag (the tag decides size and normalisation).
        weights: a .safetensors or PyTorch file in timm's layout, or a folder holding model.safetensors.
        sha256: what the file's SHA-256 must be; None checks nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown name, or keys and shapes that do not fit.
    """
    file = weights_file(weights)
    name = _tagged(name, file)
    classifier = _timm_config(name)["classifier"] or ()
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    state = {key: value for key, value in read_state_dict(file, sha256).items() if not key.startswith(heads)}
    return _timm_tower(name, build_loaded(lambda: _build_timm(name), state, origin=str(file)))


def random_timm(name: str, seed: int) -> TimmTower:
    """A timm network in evaluation mode with timm's initialisation, decided by `seed`.

    Args:
        name: an architecture of timm.
        seed: decides the weights; the global generator is put back.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _timm_tower(name, _build_timm(name))


def timm_sizes(name: str, weights: str | Path | None = None) -> tuple[int, int]:
    """(frame side in px, dimension of the features) of a timm network, without its weights."""
    if weights is not None:
        name = _tagged(name, weights_file(weights))
    with shapes_only():
        tower = _timm_tower(name, _build_timm(name))
    return tower.frame_px, tower.image_dim


def _timm_config(name: str) -> dict[str, Any]:
    import timm  # seconds to import

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):  # also keeps names with a scheme, which would download, out
        near = difflib.get_close_matches(architecture, timm.list_models(), n=4)
        raise ValueError(f"timm knows no {name!r}; did you mean one of {near or ['vit_base_patch16_224']}?")
    try:
        return dict(timm.get_pretrained_cfg(name, allow_unregistered=False).to_dict())
    except RuntimeError as error:
        known = timm.list_pretrained(architecture)
        raise ValueError(f"timm knows no weights {name!r}, only {', '.join(known)}.") from error


def _tagged(name: str, file: Path) -> str:
    """The name with the tag that the config.json beside the weights tells: the tag decides size and normalisation."""
    card = file.with_name("config.json")
    if "." in name or not card.is_file():
        return name
    content = json.loads(card.read_text(encoding="utf-8"))
    recorded, tag = content.get("architecture", name), content.get("pretrained_cfg", {}).get("tag")
    if recorded != name:
        raise ValueError(f"{str(card)!r} says timm:{recorded}, not timm:{name}; name that network instead.")
    return f"{name}.{tag}" if tag else name


def _build_timm(name: str) -> Any:
    _timm_config(name)
    import timm

    return timm.create_model(name, pretrained=False, num_classes=0)


def _timm_tower(name: str, model: Any) -> TimmTower:
    config = model.pretrained_cfg
    height, width = config["input_size"][1:]
    if height != width or config["input_size"][0] != 3:
        raise ValueError(f"timm:{name} takes images of {config['input_size']}, and frames are square and RGB.")
    return TimmTower(
        model,
        frame_px=int(height),
        image_dim=int(getattr(model, "head_hidden_size", model.num_features)),
        mean=config["mean"],
        std=config["std"],
    ).eval()
