"""The pixel work under slicing: resizing strips, going round the seam, and rectilinear views of the sphere.

Resizing is Torch's uint8 bicubic with antialiasing on channels-last memory: within one level of Pillow and 5 to 20
times faster. Views are bilinear samples of a panorama that was first shrunk to twice the density of a view's centre:
sampling the full size aliases twice as much, supersampling costs four times as much. Nothing here knows of modes or
frames, and Torch's thread count is left alone, because it belongs to the process.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["around", "perspective_views", "resize", "resize_around"]

_SEAM_PX = 3  # bicubic reaches two output pixels; one more for rounding
_VIEW_DENSITY = 2.0  # panorama px per view px at its centre; mean error 1.5 levels, against 3.8 at 1 and 2.9 at full


def resize(
    image: NDArray[np.uint8], height_px: int, width_px: int, scale: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """Resize (H, W, 3) uint8, writable, to (height_px, width_px, 3) uint8 with antialiased bicubic weights.

    The pixels of a row lie together, three by three; the rows may lie apart.

    Args:
        image: May be a view with any positive strides.
        height_px: Rows of the result.
        width_px: Columns of the result.
        scale: Output px per input px (vertical, horizontal), when the image holds more than the result shows; what
            lies beyond the result then serves as context of its last pixels. None fills the result exactly.
    """
    import torch

    height, width, _ = image.shape
    vertical, horizontal = scale or (height_px / height, width_px / width)
    # interpolate() truncates size * scale, so a scale that is one rounding error short would cost a pixel.
    nudge = 1 + 1e-12
    # In this order: with the axis of one added last, its stride says nothing, and torch works and answers in planes.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        pixels, scale_factor=(vertical * nudge, horizontal * nudge), mode="bicubic", antialias=True
    )
    found: NDArray[np.uint8] = resized[0, :, :height_px, :width_px].permute(1, 2, 0).numpy()
    return found


def around(strip: NDArray[np.uint8], start: int, width_px: int) -> NDArray[np.uint8]:
    """Columns start .. start + width_px - 1 of a (H, W, 3) strip that closes on itself; a view where it can be."""
    pieces = []
    start %= strip.shape[1]
    while width_px > 0:
        piece = strip[:, start : start + width_px]
        pieces.append(piece)
        width_px -= piece.shape[1]
        start = 0
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)


def resize_around(
    strip: NDArray[np.uint8], height_px: int, turn_px: int, width_px: int, vertical: float | None = None
) -> NDArray[np.uint8]:
    """Resize a (H, W, 3) strip that closes on itself so that one turn takes `turn_px` columns.

    Args:
        strip: Writable uint8.
        height_px: Rows of the result.
        turn_px: Columns per turn.
        width_px: Columns of the result, of which those beyond `turn_px` repeat the first ones.
        vertical: Output rows per input row; None fills the result exactly.

    Returns:
        (height_px, width_px, 3) uint8. Every column has its true neighbours, those at the seam too.
    """
    height, width, _ = strip.shape
    horizontal = turn_px / width
    computed = max(width_px, turn_px + _SEAM_PX)
    context = math.ceil((computed + _SEAM_PX) / horizontal)
    result = resize(around(strip, 0, context), height_px, computed, (vertical or height_px / height, horizontal))
    result[:, :_SEAM_PX] = result[:, turn_px : turn_px + _SEAM_PX]
    return result[:, :width_px]


@lru_cache(maxsize=8)
def _view_map(frame_px: int, fov_deg: float, pitch_deg: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Heading relative to the view's and elevation, degrees, (S, S) each, of the pixel centres of a pinhole view."""
    focal_px = frame_px / 2 / math.tan(math.radians(fov_deg / 2))
    offset = (np.arange(frame_px) + 0.5 - frame_px / 2) / focal_px
    right, up = np.meshgrid(offset, -offset)
    pitch = math.radians(pitch_deg)
    forward = math.cos(pitch) - up * math.sin(pitch)
    up = up * math.cos(pitch) + math.sin(pitch)
    heading = np.degrees(np.arctan2(right, forward)).astype(np.float32)
    elevation = np.degrees(np.arctan2(up, np.hypot(right, forward))).astype(np.float32)
    heading.flags.writeable = elevation.flags.writeable = False  # shared by every caller
    return heading, elevation


def perspective_views(
    image: NDArray[np.uint8], headings_deg: Sequence[float], frame_px: int, fov_deg: float, pitch_deg: float
) -> NDArray[np.uint8]:
    """Rectilinear (pinhole) views of an equirectangular image.

    Args:
        image: (H, W, 3) uint8, writable: 360 degrees wide with square pixels, the horizon at H / 2. H = W / 2 is the
            full sphere, less is a band.
        headings_deg: (V,) directions of the views' centres, clockwise from the image's centre column.
        frame_px: S, the side of a view.
        fov_deg: Horizontal and vertical field of view.
        pitch_deg: Elevation of the views' centres, upwards positive.

    Returns:
        (V, S, S, 3) uint8.

    Raises:
        ValueError: the image is taller than a sphere, or is a band that the views look beyond.
    """
    import torch

    height, width, _ = image.shape
    if height > width * 0.51:
        raise ValueError(
            f"A {width}x{height} image is not equirectangular (at most twice as wide as high is 180 degrees); "
            "mark it as 'perspective' or 'frame strip'."
        )
    field_deg = min(180.0, 360.0 * height / width)
    heading, elevation = _view_map(frame_px, fov_deg, pitch_deg)
    lowest, highest = float(elevation.min()), float(elevation.max())
    if max(-lowest, highest) > field_deg / 2 + 0.5:
        raise ValueError(
            f"Views of {fov_deg:g} degrees at pitch {pitch_deg:g} reach elevations {lowest:.0f} to {highest:.0f}, but "
            f"a {width}x{height} image covers only ±{field_deg / 2:.0f}; use mode 'wrap' or the full sphere."
        )
    focal_px = frame_px / 2 / math.tan(math.radians(fov_deg / 2))
    # A multiple of V, so that evenly spaced views sample alike and turning the panorama by one view permutes them.
    num_views = len(headings_deg)
    turn_px = min(width, num_views * max(1, round(_VIEW_DENSITY * 2 * math.pi * focal_px / num_views)))
    rows_per_deg, shrink = height / field_deg, turn_px / width
    margin = math.ceil(3 / shrink)
    top = max(0, math.floor((field_deg / 2 - highest) * rows_per_deg) - margin)
    bottom = min(height, math.ceil((field_deg / 2 - lowest) * rows_per_deg) + margin)
    band_px = max(1, math.floor((bottom - top) * shrink))
    # One column of the next turn on either side lets bilinear sampling cross the seam.
    band = resize_around(image[top:bottom], band_px, turn_px, turn_px + 1, shrink)
    source = torch.from_numpy(np.concatenate([band[:, turn_px - 1 : turn_px], band], axis=1)).permute(2, 0, 1)
    directions = np.asarray(headings_deg, dtype=np.float32)[:, None, None]
    column = ((heading + directions) / 360 + 0.5) % 1 * turn_px + 1
    row = ((field_deg / 2 - elevation) * rows_per_deg - top) * shrink
    grid = np.empty((*column.shape, 2), dtype=np.float32)
    grid[..., 0] = 2 * column / (turn_px + 2) - 1
    grid[..., 1] = 2 * row / band_px - 1
    views = torch.nn.functional.grid_sample(
        source.float().contiguous().expand(len(grid), -1, -1, -1),
        torch.from_numpy(grid),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    result: NDArray[np.uint8] = (views + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return result
