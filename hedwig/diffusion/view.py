"""The condition of image-to-panorama: one view laid onto the sphere in front, and a mask of where it lies.

As SD-T2I-360PanoImage's ControlNet `sd-i2p` was published: four channels, the mask (1 where the view is) and an RGB
image, which is the view's rectilinear projection inside the mask and the whole view stretched over the panorama
outside. With the 90 degrees of its own example the mask covers 11.7 % of the panorama.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

__all__ = ["view_condition"]


def view_condition(views: NDArray[np.uint8], height_px: int, *, fov_deg: float = 90.0) -> Tensor:
    """Lay square views onto panoramas of twice the height in width, at the centre.

    Args:
        views: (B, S, S, 3) uint8 rectilinear views.
        height_px: H; the panorama is (H, 2 H).
        fov_deg: horizontal and vertical field of view of the views.

    Returns:
        (B, 4, H, 2 H), 0 to 1: mask, red, green, blue.

    Raises:
        ValueError: the views have another shape, or a field of view that is no view.
    """
    if views.ndim != 4 or views.shape[1] != views.shape[2] or views.shape[3] != 3 or views.dtype != np.uint8:
        raise ValueError(f"The views are {views.shape} {views.dtype}; expected (B, S, S, 3) uint8.")
    if not 1 <= fov_deg <= 160:
        raise ValueError(f"fov_deg is {fov_deg}; it must lie in 1 to 160 degrees.")
    lat = math.pi * (0.5 - (torch.arange(height_px) + 0.5) / height_px)[:, None]
    lon = math.pi * ((torch.arange(2 * height_px) + 0.5) / height_px - 1)[None, :]
    right, forward = torch.cos(lat) * torch.sin(lon), torch.cos(lat) * torch.cos(lon)
    up = torch.sin(lat).expand_as(right)
    reach = forward.clamp(min=1e-6) * math.tan(math.radians(fov_deg / 2))
    # A view's own pixels, -1 to 1 from its left and upper edges.
    grid = torch.stack([right / reach, -up / reach], dim=-1)
    mask = ((forward > 0) & (grid.abs().amax(dim=-1) <= 1)).float()[None, None]
    pixels = torch.from_numpy(np.ascontiguousarray(views)).permute(0, 3, 1, 2).float() / 255
    laid = F.grid_sample(pixels, grid[None].expand(len(views), -1, -1, -1), padding_mode="border", align_corners=False)
    stretched = F.interpolate(
        pixels, size=(height_px, 2 * height_px), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)
    return torch.cat([mask.expand(len(views), -1, -1, -1), mask * laid + (1 - mask) * stretched], dim=1)
