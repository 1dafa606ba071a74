"""Photographs taken in several directions from one spot, put together into one panorama of known geometry.

Each output pixel is a direction; it is looked up in every photograph that shows it (inverse map, one bicubic sample),
and where several do, they are blended over a few degrees around the line on which they are equally far from their
edges. The turn has no first column: the seam at 360 degrees is blended like any other. The map depends on the geometry
alone and is kept, so that a thousand panoramas of one rig cost one map. Nothing is registered or exposure-matched:
headings and field of view are taken as given. `hedwig.panorama.stitch_bearings` puts pictures side by side instead.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from hedwig.panorama.resample import perspective_views, resize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Stitched", "StitchedProjection", "cut_bearings", "stitch_views"]

StitchedProjection = Literal["equirectangular", "strip"]

_MAX_DENSITY = 2.0  # photograph px per panorama px above which sampling aliases; such photographs are shrunk first
_SURVEY_DEG = 0.5  # grid on which the band that every heading has is looked for
_MAX_HEIGHT_PX = 4096  # making the map of eight views of 90 degrees took 0.9 GB at 2048; it grows by the square
_BLOCK_PX = 256
_MAP_LOCK = threading.Lock()  # lru_cache alone lets every thread make the same large map at once
_TOUCHING_DEG = 1e-6  # four views of 90 degrees touch; rounding must not make that a gap


@dataclass(frozen=True)
class Stitched:
    """One panorama put together from photographs.

    Attributes:
        image: (H, W, 3) uint8; black where no photograph shows anything.
        mask: (H, W) bool, True where one does.
        heading_deg: Heading of the centre column, degrees clockwise from true north.
        projection: 'equirectangular' (the whole sphere, W = 2 H) or 'strip' (cylindrical: columns linear in heading,
            rows linear in the tangent of the elevation, only rows that every heading has).
        overlap_deg: The smallest overlap of two neighbours, along the middle rows of the photographs.
        band_deg: The field centred on the horizon that is covered at every heading; what `Slicing.band_deg` may be.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    heading_deg: float
    projection: StitchedProjection
    overlap_deg: float
    band_deg: float

    @property
    def height_px(self) -> int:
        """H, rows of the panorama."""
        return int(self.image.shape[0])

    @property
    def coverage(self) -> NDArray[np.float64]:
        """(H,) float64 share of each row that some photograph shows."""
        return np.asarray(self.mask.mean(axis=1), dtype=np.float64)


class _Rig(NamedTuple):
    """The geometry of all photographs: what the map depends on."""

    headings_deg: tuple[float, ...]  # ascending, in 0..360
    fovs_deg: tuple[float, ...]
    pitches_deg: tuple[float, ...]
    height_px: int
    width_px: int


class _Patch(NamedTuple):
    """The part of the panorama that one photograph fills."""

    rows: slice
    columns: NDArray[np.intp]  # (C,), going round the seam
    grid: NDArray[np.float32]  # (R, C, 2) as torch's grid_sample takes it: -1..1 from edge to edge
    weight: NDArray[np.float32]  # (R, C), summing to 1 over all photographs where there is any


class _Map(NamedTuple):
    patches: tuple[_Patch, ...]
    mask: NDArray[np.bool_]
    band_deg: float


def stitch_views(
    images: Sequence[NDArray[np.uint8]],
    headings_deg: Sequence[float],
    *,
    fov_deg: float | Sequence[float] = 90.0,
    pitch_deg: float | Sequence[float] = 0.0,
    height_px: int = 512,
    projection: StitchedProjection = "equirectangular",
    heading_deg: float = 0.0,
    feather_deg: float = 10.0,
) -> Stitched:
    """Put rectilinear photographs of one spot together into one panorama.

    Args:
        images: V photographs, (H, W, 3) uint8 each, all of one size.
        headings_deg: (V,) headings of the photographs' centres, degrees clockwise from true north, in any order.
        fov_deg: Horizontal field of view, one for all or (V,). Pixels are square, so the vertical one follows.
        pitch_deg: Elevation of the centres, upwards positive, one for all or (V,).
        height_px: Rows of the panorama.
        projection: 'equirectangular' or 'strip'; see `Stitched`.
        heading_deg: The heading that the centre column shall have.
        feather_deg: Width of the blending on either side of a seam; narrow keeps detail, wide hides exposure steps.

    Raises:
        ValueError: no images, mixed sizes, a value out of range, or a gap between neighbours (named with its width).
    """
    rig, order = _checked_rig(images, headings_deg, fov_deg, pitch_deg)
    if projection not in get_args(StitchedProjection):
        raise ValueError(f"projection is {projection!r}; choose one of {', '.join(get_args(StitchedProjection))}.")
    if not 16 <= height_px <= _MAX_HEIGHT_PX:
        raise ValueError(
            f"height_px is {height_px}; it must be a whole number from 16 to {_MAX_HEIGHT_PX}: the map of a rig takes "
            "memory by the square of it."
        )
    if not 0 < feather_deg <= 180 or not math.isfinite(heading_deg):
        raise ValueError(
            f"feather_deg is {feather_deg} and heading_deg {heading_deg}; the first must lie in 0 to 180, the second "
            "must be finite."
        )
    overlap = _smallest_overlap(rig)
    heading_deg %= 360
    with _MAP_LOCK:
        mapping = _map(rig, height_px, projection, heading_deg, feather_deg)
    height, width = mapping.mask.shape
    canvas = np.zeros((height, width, 3), dtype=np.float32)
    for place, patch, fov in zip(order, mapping.patches, rig.fovs_deg, strict=True):
        canvas[patch.rows, patch.columns] += _sampled(images[place], fov, width, patch)
    np.clip(canvas + 0.5, 0, 255, out=canvas)
    return Stitched(
        image=canvas.astype(np.uint8),
        mask=mapping.mask.copy(),
        heading_deg=heading_deg,
        projection=projection,
        overlap_deg=overlap,
        band_deg=mapping.band_deg,
    )


def cut_bearings(
    image: NDArray[np.uint8],
    heading_deg: float,
    bearings_deg: Sequence[float],
    *,
    fov_deg: float = 90.0,
    pitch_deg: float = 0.0,
    frame_px: int = 512,
) -> NDArray[np.uint8]:
    """The way back: square rectilinear views of an equirectangular image at headings counted from true north.

    Args:
        image: (H, W, 3) uint8, equirectangular.
        heading_deg: Heading of its centre column.
        bearings_deg: (V,) headings of the views' centres.
        fov_deg: Horizontal and vertical field of view.
        pitch_deg: Elevation of the views' centres.
        frame_px: S, side of a view.

    Returns:
        (V, S, S, 3) uint8.
    """
    relative = [bearing - heading_deg for bearing in bearings_deg]
    image = np.require(image, requirements=["C", "W"])
    return perspective_views(image, relative, frame_px, fov_deg, pitch_deg)


def _checked_rig(
    images: Sequence[NDArray[np.uint8]],
    headings_deg: Sequence[float],
    fov_deg: float | Sequence[float],
    pitch_deg: float | Sequence[float],
) -> tuple[_Rig, list[int]]:
    """The geometry with ascending headings, and which image stands where in it."""
    if len(images) == 0 or len(images) != len(headings_deg):
        raise ValueError(f"{len(images)} images and {len(headings_deg)} headings; give at least one, and one for each.")
    for image in images:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            seen = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"A photograph must be a (H, W, 3) uint8 array, got {seen}.")
    sizes = sorted({f"{image.shape[1]}x{image.shape[0]}" for image in images})
    if len(sizes) > 1:
        raise ValueError(f"The photographs have mixed sizes, {' and '.join(sizes)}; resize or leave out the odd ones.")
    num = len(images)
    fovs = [float(fov) for fov in np.broadcast_to(fov_deg, num)]
    pitches = [float(pitch) for pitch in np.broadcast_to(pitch_deg, num)]
    for name, values, low, high in (("fov_deg", fovs, 1, 160), ("pitch_deg", pitches, -90, 90)):
        if not all(low <= value <= high for value in values):
            raise ValueError(f"{name} is {values}; every value must lie in {low} to {high} degrees.")
    headings = [float(heading) for heading in headings_deg]
    if not all(math.isfinite(heading) for heading in headings):
        raise ValueError(f"The headings {headings} must all be finite degrees.")
    order = sorted(range(num), key=lambda index: headings[index] % 360)
    height, width, _ = images[0].shape
    ascending = tuple(headings[index] % 360 for index in order)
    by_heading = tuple(fovs[index] for index in order), tuple(pitches[index] for index in order)
    return _Rig(ascending, *by_heading, height, width), order


def _smallest_overlap(rig: _Rig) -> float:
    """Degrees of heading by which neighbours overlap along their middle rows; a negative one is a gap and an error."""
    # The middle row of a view tilted by p reaches atan(tan(fov / 2) / cos p) to either side.
    halves = [
        math.degrees(math.atan2(math.tan(math.radians(fov / 2)), math.cos(math.radians(pitch))))
        for fov, pitch in zip(rig.fovs_deg, rig.pitches_deg, strict=True)
    ]
    num = len(halves)
    following = (*rig.headings_deg[1:], rig.headings_deg[0] + 360)
    overlaps = [
        halves[index] + halves[(index + 1) % num] - (following[index] - rig.headings_deg[index]) for index in range(num)
    ]
    worst = min(range(num), key=lambda index: overlaps[index])
    if overlaps[worst] < -_TOUCHING_DEG:
        left, right = rig.headings_deg[worst], rig.headings_deg[(worst + 1) % num]
        raise ValueError(
            f"The photographs leave a gap of {-overlaps[worst]:.1f} degrees between headings {left:g} and {right:g}; "
            f"their field of view is {rig.fovs_deg[worst]:g} degrees. Add photographs, or give the true field of view."
        )
    return max(0.0, overlaps[worst])


def _inside(
    rig: _Rig, index: int, heading_deg: NDArray[np.float64], elevation: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Where directions fall in one photograph.

    Args:
        rig: The geometry.
        index: Which photograph.
        heading_deg: (C,) headings.
        elevation: (R,) elevations in radians.

    Returns:
        x and y, -1..1 from edge to edge, and the angle to the nearest edge in degrees, negative outside; (R, C) each.
    """
    turn, pitch = np.radians(heading_deg - rig.headings_deg[index]), math.radians(rig.pitches_deg[index])
    half_x = math.tan(math.radians(rig.fovs_deg[index] / 2))
    half_y = half_x * rig.height_px / rig.width_px
    level, up = np.cos(elevation)[:, None].astype(np.float32), np.sin(elevation)[:, None].astype(np.float32)
    right = level * np.sin(turn)[None].astype(np.float32)
    ahead = level * np.cos(turn)[None].astype(np.float32)
    forward = ahead * np.float32(math.cos(pitch)) + up * np.float32(math.sin(pitch))
    upward = up * np.float32(math.cos(pitch)) - ahead * np.float32(math.sin(pitch))
    behind = forward <= 1e-6
    forward = np.where(behind, np.float32(1), forward)
    x: NDArray[np.float32] = (right / forward).astype(np.float32, copy=False)
    y: NDArray[np.float32] = (-upward / forward).astype(np.float32, copy=False)
    to_side = math.atan(half_x) - np.arctan(np.abs(x))
    to_top = math.atan(half_y) - np.arctan(np.abs(y))
    distance = np.degrees(np.minimum(to_side, to_top)).astype(np.float32)
    distance[behind] = -1
    x /= np.float32(half_x)
    y /= np.float32(half_y)
    return x, y, distance


def _common_band(rig: _Rig) -> tuple[float, float]:
    """Lowest and highest elevation, degrees, of the rows around the middle that are covered at every heading."""
    headings = np.arange(0, 360, _SURVEY_DEG)
    elevations = np.arange(-90 + _SURVEY_DEG / 2, 90, _SURVEY_DEG)
    covered = np.zeros((len(elevations), len(headings)), dtype=bool)
    for index in range(len(rig.headings_deg)):
        covered |= _inside(rig, index, headings, np.radians(elevations))[2] >= 0
    full: NDArray[np.bool_] = np.asarray(covered.all(axis=1))
    middle = int(np.argmin(np.abs(elevations - np.mean(rig.pitches_deg))))
    if not full[middle]:
        return 0.0, 0.0
    ends = np.flatnonzero(~full)
    below, above = ends[ends < middle], ends[ends > middle]
    lowest = elevations[below[-1] + 1] if len(below) else -90.0
    highest = elevations[above[0] - 1] if len(above) else 90.0
    return float(lowest), float(highest)


@lru_cache(maxsize=2)
def _map(rig: _Rig, height_px: int, projection: str, heading_deg: float, feather_deg: float) -> _Map:
    lowest, highest = _common_band(rig)
    if projection == "equirectangular":
        width_px = 2 * height_px
        elevation = np.radians(90 - (np.arange(height_px) + 0.5) / height_px * 180)
    else:
        if highest - lowest < 1 or max(-lowest, highest) > 85:
            raise ValueError(
                f"A strip needs rows that every heading has, below 85 degrees of elevation; here they are "
                f"{lowest:.0f} to {highest:.0f}. Use projection 'equirectangular'."
            )
        top, bottom = math.tan(math.radians(highest)), math.tan(math.radians(lowest))
        width_px = round(2 * math.pi * height_px / (top - bottom))
        elevation = np.arctan(top - (np.arange(height_px) + 0.5) / height_px * (top - bottom))
    headings = heading_deg + ((np.arange(width_px) + 0.5) / width_px - 0.5) * 360
    views = []
    best = np.full((height_px, width_px), -1, dtype=np.float32)
    for index in range(len(rig.headings_deg)):
        view = _seen_columns(rig, index, headings, elevation)
        best[:, view[0]] = np.maximum(best[:, view[0]], view[3])
        views.append(view)
    weights: list[NDArray[np.float32]] = []
    total = np.zeros_like(best)
    for columns, _, _, distance in views:
        behind_best = 1 - (best[:, columns] - distance) / np.float32(feather_deg)
        weight = np.clip(behind_best, 0, 1) * np.clip(distance / np.float32(feather_deg), 1e-4, 1)
        weights.append(np.where(distance >= 0, weight, np.float32(0)).astype(np.float32, copy=False))
        total[:, columns] += weights[-1]
    np.maximum(total, np.float32(1e-12), out=total)
    patches = [
        _patch(columns, x, y, weight / total[:, columns], (headings[columns] - heading) % 360)
        for (columns, x, y, _), weight, heading in zip(views, weights, rig.headings_deg, strict=True)
    ]
    for patch in patches:
        patch.grid.flags.writeable = patch.weight.flags.writeable = False  # shared by every later call
    return _Map(tuple(patches), best >= 0, 2 * max(0.0, min(highest, -lowest)))


def _seen_columns(
    rig: _Rig, index: int, headings: NDArray[np.float64], elevation: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """The columns in which a photograph shows anything, and `_inside` of these alone, found block by block."""
    found = []
    for start in range(0, len(headings), _BLOCK_PX):
        block = _inside(rig, index, headings[start : start + _BLOCK_PX], elevation)
        seen = np.flatnonzero((block[2] >= 0).any(axis=0))
        if len(seen):
            found.append((start + seen, block[0][:, seen], block[1][:, seen], block[2][:, seen]))
    if not found:
        nothing = np.zeros((len(elevation), 0), np.float32)
        return np.zeros(0, np.intp), nothing, nothing, nothing
    columns = np.concatenate([part[0] for part in found])
    x, y, distance = (np.concatenate([part[i] for part in found], axis=1) for i in (1, 2, 3))
    return columns, x, y, distance


def _patch(
    columns: NDArray[np.intp],
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    weight: NDArray[np.float32],
    turn_deg: NDArray[np.float64],
) -> _Patch:
    """The rows and columns in which a photograph counts; columns run on through the seam."""
    rows = np.flatnonzero((weight > 0).any(axis=1))
    kept = np.flatnonzero((weight > 0).any(axis=0))
    if len(rows) == 0:
        return _Patch(slice(0, 0), columns[kept], np.zeros((0, 0, 2), np.float32), np.zeros((0, 0), np.float32))
    kept = kept[np.argsort((turn_deg[kept] + 180) % 360)]
    within = slice(int(rows[0]), int(rows[-1]) + 1)
    grid = np.stack([x[within][:, kept], y[within][:, kept]], axis=-1)
    # Behind the camera and far outside the weight is 0; keep the sampler's arithmetic finite there.
    return _Patch(within, columns[kept], np.clip(grid, -2, 2), np.ascontiguousarray(weight[within][:, kept]))


def _sampled(image: NDArray[np.uint8], fov_deg: float, turn_px: int, patch: _Patch) -> NDArray[np.float32]:
    """(R, C, 3) float32: the photograph at the patch's directions, times its weight."""
    import torch

    height, width, _ = image.shape
    focal_px = width / 2 / math.tan(math.radians(fov_deg / 2))
    shrink = _MAX_DENSITY * turn_px / (2 * math.pi * focal_px)
    image = np.require(image, requirements=["C", "W"])
    if shrink < 1:
        image = resize(image, max(1, round(height * shrink)), max(1, round(width * shrink)))
    source = torch.from_numpy(image).permute(2, 0, 1)[None].float().contiguous()
    grid = torch.from_numpy(patch.grid.copy())[None]  # torch warns on read-only memory
    values = torch.nn.functional.grid_sample(source, grid, mode="bicubic", padding_mode="border", align_corners=False)
    result: NDArray[np.float32] = values[0].permute(1, 2, 0).numpy() * patch.weight[..., None]
    return result
