"""Where on the image each frame was cut: what a page draws over the strip, and which way a frame looks.

It repeats the arithmetic of `slice_panorama` without touching a pixel; a test compares the two. Of several photographs
the image is the strip that they make side by side (`stitch_bearings`), also where every photograph is a frame of its
own. Angles are told only where the image closes on itself; a photograph's field of view is not known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hedwig.panorama.slicing import band_rows, select_frames, view_headings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hedwig.panorama.slicing import Slicing

__all__ = ["FrameWindow", "frame_windows"]


@dataclass(frozen=True)
class FrameWindow:
    """One frame's place in the image.

    Attributes:
        x0: Left edge as a fraction of the image's width, in [0, 1).
        x1: Right edge, above x0; above 1 where the frame goes around the right edge.
        heading_deg: Of the frame's centre, 0 to 360, clockwise from true north where the image's heading is known, else
            from its centre column; None where the image says nothing of angles.
        fov_deg: Horizontal field of view, or None.
    """

    x0: float
    x1: float
    heading_deg: float | None = None
    fov_deg: float | None = None


def frame_windows(
    shapes: Sequence[Sequence[int]],
    slicing: Slicing,
    *,
    projection: str,
    heading: float = math.nan,
    bearings_deg: Sequence[float] | None = None,
) -> tuple[FrameWindow, ...]:
    """The windows of the frames that `slice_panorama` returns for the same arguments, in its order.

    Args:
        shapes: (H, W) of the image, or of each of several photographs.
        slicing: What is cut.
        projection: As in `slice_panorama`.
        heading: Degrees of the image's centre column; NaN when unknown.
        bearings_deg: For 'bearings': the heading of each photograph's centre.
    """
    height, width = shapes[0][0], shapes[0][1]
    if projection == "bearings":
        bearings = [float(bearing) % 360 for bearing in bearings_deg or ()]
        order = sorted(range(len(shapes)), key=lambda index: bearings[index])
        height = min(shapes[index][0] for index in order)
        widths = [max(1, round(shapes[index][1] * height / shapes[index][0])) for index in order]
        if slicing.mode == "bearings":
            return _photographs(height, widths, [bearings[index] for index in order], slicing)
        width, heading = sum(widths), math.nan
    if projection == "perspective":
        return _crops(height, width, slicing)
    if slicing.mode == "perspective":
        views = view_headings(slicing, heading)
        share = slicing.fov_deg / 360
        starts = [
            0.5 + views[i] / 360 - share / 2 for i in select_frames(len(views), slicing.num_frames, slicing.select)
        ]
    else:
        rows = band_rows((height, width), slicing, projection)[1]
        starts, share = _strip_starts(rows, width, slicing, heading)
    around = projection == "equirectangular" or (projection == "frame strip" and slicing.mode == "wrap")
    return tuple(_window(start % 1.0, share, heading, around) for start in starts)


def _window(start: float, share: float, heading: float, around: bool) -> FrameWindow:
    if not around:
        return FrameWindow(start, start + share)
    centre_deg = (start + share / 2 - 0.5) * 360 + (heading if math.isfinite(heading) else 0.0)
    return FrameWindow(start, start + share, centre_deg % 360, share * 360)


def _strip_starts(rows: int, width: int, slicing: Slicing, heading: float) -> tuple[list[float], float]:
    """Left edges and the common width of the windows on a strip, as fractions of its width."""
    north = None
    if slicing.align_north and math.isfinite(heading):
        north = round((0.5 - heading / 360) * width) / width
    if slicing.headings_deg is not None:
        origin = 0.5 if north is None else north
        chosen = select_frames(len(slicing.headings_deg), slicing.num_frames, slicing.select)
        share = rows / width
        return [origin + slicing.headings_deg[i] / 360 - share / 2 for i in chosen], share
    left = north or 0.0
    if slicing.mode == "paper":
        scaled_width = round(width * slicing.height_px / rows)
        num_windows = (scaled_width - slicing.height_px) // slicing.stride_px + 1
        chosen = select_frames(num_windows, slicing.num_frames, slicing.select)
        return [left + int(i) * slicing.stride_px / scaled_width for i in chosen], slicing.height_px / scaled_width
    return [left + i / slicing.num_frames for i in range(slicing.num_frames)], rows / width


def _crops(height: int, width: int, slicing: Slicing) -> tuple[FrameWindow, ...]:
    spare = max(0, width - height)
    num_distinct = min(slicing.num_frames, spare + 1)
    lefts = np.rint(np.linspace(0, spare, num_distinct)).astype(int).tolist()
    side = width - spare
    windows = [FrameWindow(left / width, (left + side) / width) for left in lefts]
    return tuple(windows[i] for i in select_frames(num_distinct, slicing.num_frames, slicing.select))


def _photographs(
    height: int, widths: Sequence[int], bearings_deg: Sequence[float], slicing: Slicing
) -> tuple[FrameWindow, ...]:
    """The centre squares of photographs of one height side by side."""
    total, lefts = sum(widths), np.cumsum([0, *widths[:-1]]).tolist()
    windows = []
    for left, width, bearing in zip(lefts, widths, bearings_deg, strict=True):
        side = min(height, width)
        start = left + (width - side) / 2
        windows.append(FrameWindow(start / total, (start + side) / total, bearing))
    return tuple(windows[i] for i in select_frames(len(widths), slicing.num_frames, slicing.select))
