"""ViCLIP: eight frames and a caption to two vectors in one space, by joint attention over space and time.

The architecture of OpenGVLab/InternVideo (``Data/InternVid/viclip``, Apache-2.0), written anew with exactly its
state-dict keys, so that the released weights load strictly. Choices: attention through
`scaled_dot_product_attention`, batch first, and the last block computes the class token only, since nothing else of
it is read. It never masks patches. Like the official code it takes as many frames as it has temporal embeddings, or
one; any other number only where interpolation is asked for, which nobody trained. The text tower reads 32 tokens, not
CLIP's 77. Loading, saving and random weights are at the end of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hedwig.models.shapes import shapes_only
from hedwig.models.text import count_tokens, tokenise
from hedwig.models.transformer import Transformer
from hedwig.models.weights import load_strict, read_card, read_metadata, read_state_dict, unwrap, weights_file

__all__ = [
    "B16",
    "L14",
    "TINY",
    "ViCLIP",
    "ViCLIPConfig",
    "count_tokens",
    "load_viclip",
    "random_viclip",
    "save_viclip",
    "tokenise",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
METADATA_KEY = "hedwig_config"


@dataclass(frozen=True)
class ViCLIPConfig:
    """The sizes of a ViCLIP: frames are (num_frames, frame_px, frame_px), both towers end in embed_dim."""

    frame_px: int
    patch_px: int
    num_frames: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    embed_dim: int
    context_length: int = 32
    vocab_size: int = 49408

    def __post_init__(self) -> None:
        bad = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if not _is_count(getattr(self, f.name))]
        if bad:
            raise ValueError(f"ViCLIP sizes must be whole numbers of at least 1; got {', '.join(bad)}.")
        for whole, part in (
            ("frame_px", "patch_px"),
            ("vision_width", "vision_heads"),
            ("text_width", "text_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole}={getattr(self, whole)} must be a multiple of {part}={getattr(self, part)}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


TINY = ViCLIPConfig(64, 16, 8, 128, 4, 4, 64, 2, 2, 128)
B16 = ViCLIPConfig(224, 16, 8, 768, 12, 12, 512, 12, 8, 512)
L14 = ViCLIPConfig(224, 14, 8, 1024, 24, 16, 768, 12, 12, 768)


class VisionTransformer(nn.Module):
    """Frames to one vector: a class token attends to every patch of every frame."""

    def __init__(self, config: ViCLIPConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.patch_px
        self.patch_px = patch
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + (config.frame_px // patch) ** 2, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, config.num_frames, width))
        self.proj = nn.Parameter(torch.zeros(width, config.embed_dim))
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.vision_heads)
        self.ln_post = nn.LayerNorm(width)

    def temporal(self, num_frames: int) -> Tensor:
        """The temporal embeddings of T frames, (T, W).

        One frame gets their mean, as in the official code. Other numbers are interpolated linearly over time with
        ``align_corners=False``, as InternVideo2 does when it changes the number of frames.
        """
        known = self.temporal_positional_embedding[0]
        if num_frames == len(known):
            return known
        if num_frames == 1:
            return known.mean(dim=0, keepdim=True)
        return F.interpolate(known.float().T[None], size=num_frames, mode="linear")[0].T.to(known.dtype)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, 3, H, W) normalised frames to (B, D)."""
        patches = _patches(frames.to(self.proj.dtype), self.patch_px)
        # A stride as long as the kernel makes the convolution one matrix product over flattened patches.
        return self._pool(F.linear(patches.flatten(3), self.conv1.weight.flatten(1)))

    def forward_uint8(self, frames: Tensor) -> Tensor:
        """(B, T, H, W, 3) uint8 frames to (B, D), with the ImageNet normalisation folded into `conv1`.

        w·((u/255 - m)/s) = (w/(255 s))·(u - 128) + Σ (w/(255 s))·(128 - 255 m). Centring at 128 keeps the sums
        short of cancellation, and whole numbers up to 128 are exact in bfloat16.
        """
        weight = self.conv1.weight
        mean = torch.tensor(IMAGENET_MEAN, device=weight.device)
        std = torch.tensor(IMAGENET_STD, device=weight.device)
        folded = (weight.float() / (255 * std)[:, None, None, None]).to(weight.dtype)
        bias = torch.einsum("octhw,c->o", folded.float(), 128 - 255 * mean).to(weight.dtype)
        patches = _patches(frames.movedim(-1, 2), self.patch_px).to(weight.dtype).sub_(128)
        return self._pool(F.linear(patches.flatten(3), folded.flatten(1), bias))

    def _pool(self, patches: Tensor) -> Tensor:
        """(B, T, N, W) embedded patches to (B, D)."""
        spatial = self.positional_embedding
        x = patches + spatial[1:] + self.temporal(patches.shape[1])[:, None]
        first = (self.class_embedding + spatial[0]).expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first, x.flatten(1, 2)], dim=1))
        out: Tensor = self.ln_post(self.transformer(x, first_only=True)[:, 0]) @ self.proj
        return out


def _patches(frames: Tensor, patch: int) -> Tensor:
    """(B, T, 3, H, W) to (B, T, N, 3, p, p), patches in row order."""
    batch, num_frames, channels, height, width = frames.shape
    grid = frames.reshape(batch, num_frames, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 1, 3, 5, 2, 4, 6).flatten(2, 3)


class TextTransformer(nn.Module):
    """Token ids to one vector: CLIP's causal text tower, read at the end-of-text token."""

    def __init__(self, config: ViCLIPConfig) -> None:
        super().__init__()
        width = config.text_width
        self.positional_embedding = nn.Parameter(torch.zeros(config.context_length, width))
        self.text_projection = nn.Parameter(torch.zeros(width, config.embed_dim))
        self.transformer = Transformer(width, config.text_layers, config.text_heads)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.ln_final = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) token ids to (B, D)."""
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, causal=True)
        end = x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]  # end of text is the largest id
        out: Tensor = self.ln_final(end) @ self.text_projection
        return out


class ViCLIP(nn.Module):
    """A video tower and a text tower in one space.

    The constructor leaves the weights without meaning; use `load_viclip` or `random_viclip`.
    """

    def __init__(self, config: ViCLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.frame_px = config.frame_px
        self.image_dim = self.text_dim = config.embed_dim
        self.has_text = True
        self.temp = nn.Parameter(torch.zeros(()))
        self.vision_encoder = VisionTransformer(config)
        self.text_encoder = TextTransformer(config)

    def video_features(self, frames: Tensor, *, interpolate: bool = False) -> Tensor:
        """(B, T, 3, H, W) ImageNet-normalised frames to (B, D), not normalised, with gradients.

        Args:
            frames: T is the configured number, or 1.
            interpolate: allow any T, see `VisionTransformer.temporal`.
        """
        px = self.frame_px
        self._check_frames(frames, (3, px, px), "(B, T, 3, H, W)", interpolate)
        features: Tensor = self.vision_encoder(frames)
        return features

    def video_features_uint8(self, frames: Tensor, *, interpolate: bool = False) -> Tensor:
        """(B, T, H, W, 3) uint8 RGB frames to (B, D): the same as normalising first, within 1e-5."""
        px = self.frame_px
        if frames.dtype != torch.uint8:
            raise ValueError(f"Frames must be uint8 RGB, got {frames.dtype}; video_features takes normalised floats.")
        self._check_frames(frames, (px, px, 3), "(B, T, H, W, 3)", interpolate)
        return self.vision_encoder.forward_uint8(frames)

    def each_frame_uint8(self, frames: Tensor) -> Tensor:
        """(B, T, H, W, 3) uint8 RGB frames, any T, to (B, T, D) of unit norm, float32: each is a clip of one frame."""
        each = self.video_features_uint8(frames.flatten(0, 1)[:, None])
        return F.normalize(each.float(), dim=-1).reshape(*frames.shape[:2], self.image_dim)

    def _check_frames(self, frames: Tensor, tail: tuple[int, ...], layout: str, interpolate: bool) -> None:
        known = self.config.num_frames
        found = frames.shape[1] if frames.ndim == 5 else 0
        _check_shape(frames, (found if found == 1 or (interpolate and found) else known, *tail), layout)

    def text_features(self, ids: Tensor) -> Tensor:
        """(B, L) token ids to (B, D), not normalised, with gradients."""
        _check_shape(ids, (self.config.context_length,), "(B, L)")
        features: Tensor = self.text_encoder(ids.to(self.temp.device))
        return features

    def encode_video(self, frames: Tensor) -> Tensor:
        """(B, T, 3, H, W) ImageNet-normalised frames to (B, D) of unit norm, float32."""
        return F.normalize(self.video_features(frames).float(), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Captions to (B, D) of unit norm, float32; what does not fit into the context is cut."""
        return F.normalize(self.text_features(self.tokenise(texts)[0]).float(), dim=-1)

    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`tokenise` at this model's context length."""
        return tokenise(texts, self.config.context_length)


def _check_shape(value: Tensor, tail: tuple[int, ...], layout: str) -> None:
    if value.ndim != len(tail) + 1 or tuple(value.shape[1:]) != tail:
        hint = " Add the batch dimension: x[None]." if tuple(value.shape) == tail else ""
        raise ValueError(f"Expected {layout} = (B, {', '.join(map(str, tail))}), got {tuple(value.shape)}.{hint}")


def load_viclip(
    source: Mapping[str, Any] | str | Path, *, sha256: str | None = None, device: str | torch.device = "cpu"
) -> ViCLIP:
    """A ViCLIP in evaluation mode with the weights of a file, of a folder holding model.safetensors, or of a dict.

    Sizes are read off the shapes. The number of heads does not show there: it comes from the header that
    `save_viclip` wrote, else from ``config`` in a model.json beside the file, else it is width / 64, the rule of
    the official sizes, or width / 32 for a width below 512.

    Args:
        source: file, folder or state dict.
        sha256: what the file's SHA-256 must be, see `hedwig.models.weights.check_sha256`.
        device: where to put the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another SHA-256, unreadable file, or keys and shapes that are not a ViCLIP's; the message names
            them.
    """
    if isinstance(source, Mapping):
        origin = "state dict"
        state = {key: value.clone() for key, value in unwrap(source, origin).items()}
        recorded = None
    else:
        file = weights_file(source)
        origin, state = str(file), read_state_dict(file, sha256)
        recorded = _recorded_config(file)
    config = recorded or _config_of_shapes(state, origin)
    with shapes_only():
        model = ViCLIP(config)
    load_strict(model, state, origin=origin)
    return model.to(device).eval()


def _recorded_config(file: Path) -> ViCLIPConfig | None:
    text = read_metadata(file).get(METADATA_KEY)
    sizes = json.loads(text) if text else read_card(file).get("config")
    if sizes is None:
        return None
    try:
        return ViCLIPConfig(**sizes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The sizes recorded with {str(file)!r} are not a ViCLIP's: {error}") from error


def _config_of_shapes(state: Mapping[str, Tensor], origin: str) -> ViCLIPConfig:
    def shape(key: str, ndim: int) -> torch.Size:
        if key not in state or state[key].ndim != ndim:
            found = f"of shape {tuple(state[key].shape)}" if key in state else "missing"
            raise ValueError(f"{origin!r} is not a ViCLIP: {key} is {found}.")
        return state[key].shape

    def layers(tower: str) -> int:
        start = f"{tower}.transformer.resblocks."
        return len({key.removeprefix(start).split(".")[0] for key in state if key.startswith(start)})

    vision_width, embed_dim = shape("vision_encoder.proj", 2)
    context_length, text_width = shape("text_encoder.positional_embedding", 2)
    patch = shape("vision_encoder.conv1.weight", 5)[-1]
    return ViCLIPConfig(
        frame_px=isqrt(shape("vision_encoder.positional_embedding", 2)[0] - 1) * patch,
        patch_px=patch,
        num_frames=shape("vision_encoder.temporal_positional_embedding", 3)[1],
        vision_width=vision_width,
        vision_layers=layers("vision_encoder"),
        vision_heads=_heads(vision_width),
        text_width=text_width,
        text_layers=layers("text_encoder"),
        text_heads=_heads(text_width),
        embed_dim=embed_dim,
        context_length=context_length,
        vocab_size=shape("text_encoder.token_embedding.weight", 2)[0],
    )


def _heads(width: int) -> int:
    return width // 64 if width >= 512 else max(1, width // 32)


def save_viclip(model: ViCLIP, path: str | Path) -> None:
    """Write safetensors in the official layout, float32, with the sizes in the header."""
    state = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in model.state_dict().items()}
    save_file(state, path, metadata={"format": "pt", METADATA_KEY: json.dumps(asdict(model.config))})


def random_viclip(config: ViCLIPConfig, seed: int) -> ViCLIP:
    """A ViCLIP in evaluation mode with CLIP's initialisation, decided by `seed` alone; the global generator rests.

    Linear layers as in OpenAI's CLIP (residual branches scaled by (2·layers)^-½); class, positional and temporal
    embeddings and both projections with standard deviation width^-½.
    """
    with shapes_only():
        model = ViCLIP(config)
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.empty(parameter.shape) for key, parameter in model.named_parameters()}
    for key, value in state.items():
        if key == "temp":
            value.fill_(0.01)
        elif ".ln_" in key or key.endswith("bias"):
            value.fill_(1.0 if key.endswith("weight") else 0.0)
        else:
            value.normal_(0.0, _initial_std(key, value, config), generator=generator)
    load_strict(model, state, origin="random weights")
    return model.eval()


def _initial_std(key: str, value: Tensor, config: ViCLIPConfig) -> float:
    vision = key.startswith("vision_encoder")
    width = config.vision_width if vision else config.text_width
    layers = config.vision_layers if vision else config.text_layers
    if key.endswith(("attn.out_proj.weight", "mlp.c_proj.weight")):
        return float(width**-0.5 * (2 * layers) ** -0.5)
    if key.endswith("mlp.c_fc.weight"):
        return float((2 * width) ** -0.5)
    if key.endswith("token_embedding.weight"):
        return 0.02
    if key == "text_encoder.positional_embedding":
        return 0.01
    if key.endswith("conv1.weight"):
        return float((3 * value[0].numel()) ** -0.5)  # as wide as torch's default for a convolution
    return float(width**-0.5)
