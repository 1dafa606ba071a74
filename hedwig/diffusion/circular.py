"""Panoramas without a seam: blending latents across the wrap, decoding around it, and measuring what is left.

The way of Diffusion360 (Feng et al. 2023, arXiv 2311.13141, section 2.1): latents are made a little wider than the
panorama, so that the columns beyond its right edge show what its left edge must continue; after every denoising step
they are faded into the left edge, and in the end cropped. The decoder sees a quarter of the panorama twice, for the
same reason. Written from that description for any width, against the stock models of diffusers; nothing is patched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "CircularBlend",
    "SeamMetric",
    "blend_wrap",
    "circular_decode",
    "close_wrap",
    "extend_wrap",
    "num_extra_columns",
    "seam_step",
]

COLUMNS_PER_EXTRA = 32  # one extra latent column for every 32: 4 at 1024 px
REPEATED_SHARE = 4  # the decoder sees 1 / 4 of the columns twice


class SeamMetric(NamedTuple):
    """How visible the wrap of a panorama is.

    Attributes:
        wrap: mean absolute colour step from the last column to the first, in levels of 255.
        inside: the same between neighbouring columns inside.
        ratio: wrap / inside; 1 means that no seam can be told.
    """

    wrap: float
    inside: float
    ratio: float


def seam_step(image: NDArray[np.uint8]) -> SeamMetric:
    """Measure the wrap of a panorama.

    Args:
        image: (H, W, 3) uint8 with at least 3 columns.

    Raises:
        ValueError: the image has another shape.
    """
    if image.ndim != 3 or image.shape[1] < 3:
        raise ValueError(f"The image is {image.shape}; a panorama is (H, W, 3) with at least 3 columns.")
    pixels = image.astype(np.float32)
    wrap = float(np.abs(pixels[:, 0] - pixels[:, -1]).mean())
    inside = float(np.abs(np.diff(pixels, axis=1)).mean())
    ratio = wrap / inside if inside > 0 else 1.0 if wrap == 0 else float("inf")
    return SeamMetric(wrap, inside, ratio)


def num_extra_columns(latent_width: int) -> int:
    """Latent columns beyond the right edge, for a panorama of `latent_width` columns: e = W // 8 // 32."""
    return max(1, latent_width // COLUMNS_PER_EXTRA)


def extend_wrap(values: Tensor, extra: int) -> Tensor:
    """(..., W) -> (..., W + extra): the first columns again at the right."""
    return torch.cat([values, values[..., :extra]], dim=-1)


def blend_wrap(values: Tensor, extra: int) -> Tensor:
    """Fade the last `extra` columns into the first ones: ``z[x] = z[x - e] (1 - x / e) + z[x] x / e`` for 0 <= x < e.

    Args:
        values: (..., W + extra), of which the last columns continue the panorama beyond its right edge.
        extra: e.

    Returns:
        A new tensor of the same shape; only its first `extra` columns differ.

    Raises:
        ValueError: the columns beyond the edge would overlap with those they are faded into.
    """
    if not 0 < 2 * extra <= values.shape[-1]:
        raise ValueError(f"{extra} columns cannot be blended in a width of {values.shape[-1]}; at most half of it can.")
    return torch.cat([_faded(values[..., -extra:], values[..., :extra]), values[..., extra:]], dim=-1)


def close_wrap(values: Tensor, extra: int) -> Tensor:
    """(..., W + extra) -> (..., W): blend once more and crop what lies beyond the edge."""
    return blend_wrap(values, extra)[..., :-extra]


def _faded(before: Tensor, after: Tensor, dim: int = -1) -> Tensor:
    """`before` at the first index of `dim`, turning linearly into `after`, which it would reach one past the last."""
    size = after.shape[dim]
    shape = [1] * after.ndim
    shape[dim] = size
    ramp = (torch.arange(size, device=after.device) / size).to(after.dtype).reshape(shape)
    return before * (1 - ramp) + after * ramp


class CircularBlend:
    """What a pipeline of diffusers takes as ``callback_on_step_end``: blends the latents after every step.

    Args:
        extra: columns beyond the right edge that the latents were made with.
    """

    def __init__(self, extra: int) -> None:
        self.extra = extra

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Return the step's tensors with ``latents`` (B, C, h, w + extra) blended."""
        return {**tensors, "latents": blend_wrap(tensors["latents"], self.extra)}


def circular_decode(vae: Any, latents: Tensor, *, tile_rows: int = 64, overlap: float = 0.25) -> Tensor:
    """Decode the latents of panoramas so that the left edge continues the right one.

    The first quarter of the columns is appended at the right, tiles of full width are decoded and blended from top to
    bottom, and what was decoded beyond the right edge is faded into the left quarter.

    Args:
        vae: an AutoencoderKL; only its ``decode`` and ``config.scaling_factor`` are used.
        latents: (B, C, h, w) as the denoising left them, scaled.
        tile_rows: latent rows that are decoded at a time.
        overlap: share of a tile's rows that it has in common with the next.

    Returns:
        (B, 3, h s, w s), about -1 to 1; s is the factor of the decoder.

    Raises:
        ValueError: the latents are narrower than four columns, or the tiles would not advance.
    """
    height, width = latents.shape[-2:]
    repeated, step = width // REPEATED_SHARE, int(tile_rows * (1 - overlap))
    if repeated < 1 or step < 1:
        raise ValueError(f"Latents of width {width} cannot be decoded in tiles of {tile_rows} rows, overlap {overlap}.")
    latents = extend_wrap(latents, repeated) / vae.config.scaling_factor
    start, image = 0, _decoded(vae, latents[:, :, :tile_rows])
    scale = image.shape[2] // min(tile_rows, height)
    while start + tile_rows < height:
        start += step
        tile = _decoded(vae, latents[:, :, start : start + tile_rows])
        above = image[:, :, start * scale :]
        common = _faded(above, tile[:, :, : above.shape[2]], dim=2)
        image = torch.cat([image[:, :, : start * scale], common, tile[:, :, above.shape[2] :]], dim=2)
    beyond, inside = image[..., width * scale :], image[..., : width * scale]
    return torch.cat([_faded(beyond, inside[..., : beyond.shape[-1]]), inside[..., beyond.shape[-1] :]], dim=-1)


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    image: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
    return image
