"""Panorama to frames: what to cut out of an image for a model that wants V square pictures.

Four modes. `paper` slides a window over the strip and does not wrap; `wrap` takes evenly spaced windows all around;
`perspective` renders rectilinear views; `bearings` uses separate photographs as they are. Where frames lie a whole
number of output pixels apart, the strip is resized once and cut afterwards, which equals resizing every crop except
that a frame's two border columns see their true neighbours instead of an edge; else each crop is resized by itself.
Frames run clockwise and stay uint8: normalisation is folded into the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from hedwig.panorama.resample import around, perspective_views, resize, resize_around

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = [
    "Slicing",
    "band_rows",
    "select_frames",
    "slice_panorama",
    "stitch_bearings",
    "upsampling",
    "view_headings",
]

Mode = Literal["paper", "wrap", "perspective", "bearings"]
Select = Literal["uniform", "middle", "first"]

_PROJECTIONS = ("equirectangular", "perspective", "frame strip", "bearings")
_MAX_STRETCH = 0.01  # by how much `wrap` may widen frames to land on whole pixels; 0.5 % for 2048x640 and 8 frames


@dataclass(frozen=True)
class Slicing:
    """How a panorama becomes frames; the same for references and queries, or their embeddings do not compare.

    Attributes:
        mode: 'paper', 'wrap', 'perspective' or 'bearings'; see `slice_panorama`.
        num_frames: V, the number of frames given to the model.
        select: Which V of the frames found: 'uniform', 'middle' or 'first'; see `select_frames`.
        frame_px: S, the side of a frame.
        height_px: `paper`: the height to which the strip is scaled, and the side of the window on it.
        stride_px: `paper`: the distance of the windows at that height.
        fov_deg: `perspective`: the field of view.
        pitch_deg: `perspective`: the elevation of the views' centres, upwards positive.
        headings_deg: `wrap`, `perspective`: the directions of the frames' centres, clockwise from the image's centre
            column, or from north with `align_north`. None: V evenly spaced frames, of which the left edge of the
            first is the image's left edge, or north with `align_north`.
        band_deg: `paper`, `wrap`: the vertical field kept of an equirectangular image, centred on the horizon. The
            default keeps the middle 640 rows of 2048x1024.
        align_north: Count directions from true north wherever the heading of the centre column is known.
        half_size: Decode JPEG at half size: faster, not faithful. For sources far larger than the frames.

    Raises:
        ValueError: a value out of its range, with the range.
    """

    mode: Mode = "wrap"
    num_frames: int = 8
    select: Select = "uniform"
    frame_px: int = 224
    height_px: int = 640
    stride_px: int = 200
    fov_deg: float = 90.0
    pitch_deg: float = 0.0
    headings_deg: tuple[float, ...] | None = None
    band_deg: float = 112.5
    align_north: bool = False
    half_size: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("mode", get_args(Mode)), ("select", get_args(Select))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"slicing.{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")
        for name in ("num_frames", "frame_px", "height_px", "stride_px"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 8192:
                raise ValueError(f"slicing.{name} is {value!r}; it must be a whole number from 1 to 8192.")
        for name, low, high in (("fov_deg", 1, 160), ("pitch_deg", -90, 90), ("band_deg", 1, 180)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"slicing.{name} is {getattr(self, name)!r}; it must lie in {low} to {high} degrees.")
        if self.headings_deg is None:
            return
        if self.mode not in ("wrap", "perspective"):
            raise ValueError(f"slicing.headings_deg has no meaning in mode '{self.mode}'; leave it out.")
        if len(self.headings_deg) == 0 or not all(math.isfinite(heading) for heading in self.headings_deg):
            raise ValueError(f"slicing.headings_deg is {self.headings_deg!r}; give finite degrees, or None for even.")
        object.__setattr__(self, "headings_deg", tuple(float(heading) for heading in self.headings_deg))


def select_frames(num_in: int, num_out: int, how: Select) -> NDArray[np.intp]:
    """Which of `num_in` frames to keep, (num_out,) ascending; frames repeat when there are too few.

    'uniform' spreads over all: rounded linspace(0, num_in - 1, num_out). 'middle' is ViCLIP's evaluation sampler: the
    middle of each of num_out equal parts, then the last one again. 'first' is ViCLIP's demo: every (num_in //
    num_out)-th from the start, which with 10 frames means the first 8, and never the rest.

    Raises:
        ValueError: there are no frames, none are wanted, or `how` is unknown.
    """
    if num_in < 1 or num_out < 1:
        raise ValueError(f"Cannot select {num_out} of {num_in} frames; both must be at least 1.")
    if how == "uniform":
        return np.rint(np.linspace(0, num_in - 1, num_out)).astype(np.intp)
    if how == "middle":
        edges = np.linspace(0, num_in, min(num_out, num_in) + 1).astype(np.intp)
        found = (edges[:-1] + edges[1:] - 1) // 2
    elif how == "first":
        found = np.arange(num_in)[:: max(1, num_in // num_out)][:num_out]
    else:
        raise ValueError(f"select is {how!r}; choose one of {', '.join(get_args(Select))}.")
    return np.pad(found, (0, num_out - len(found)), mode="edge")


def slice_panorama(
    image: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
    slicing: Slicing,
    *,
    projection: str,
    heading: float = math.nan,
    bearings_deg: Sequence[float] | None = None,
) -> NDArray[np.uint8]:
    """Cut one panorama into the frames for the model.

    | projection | paper | wrap | perspective | bearings |
    |---|---|---|---|---|
    | equirectangular | windows over the band | around the band | views | error |
    | frame strip | windows over all rows | around all rows | error | error |
    | perspective | V square crops from left to right, no wrap, in every mode | | | |
    | bearings | stitched, then as a frame strip | the same | error | each its own frame |

    Args:
        image: (H, W, 3) uint8; for 'bearings' a list of such.
        slicing: What to cut.
        projection: 'equirectangular', 'perspective', 'frame strip' or 'bearings'.
        heading: Degrees clockwise from true north of the image's centre column; NaN when unknown.
        bearings_deg: For 'bearings': the heading of each image's centre.

    Returns:
        (V, S, S, 3) uint8, C-contiguous, V = slicing.num_frames, S = slicing.frame_px.

    Raises:
        ValueError: a projection that the mode cannot use, an array that is no RGB image, or too narrow a strip.
    """
    if projection not in _PROJECTIONS:
        raise ValueError(f"The projection is {projection!r}; it must be one of {', '.join(_PROJECTIONS)}.")
    if projection == "bearings":
        images, bearings = _checked_bearings(image, bearings_deg)
        if slicing.mode == "bearings":
            chosen = select_frames(len(images), slicing.num_frames, slicing.select)
            squares = [_centre_square(images[index], slicing.frame_px) for index in np.unique(chosen)]
            return _stacked([squares[place] for place in np.unique(chosen, return_inverse=True)[1]])
        if slicing.mode == "perspective":
            raise ValueError("Separate bearings have no common sphere to view; use mode 'bearings', 'wrap' or 'paper'.")
        strip, heading = stitch_bearings(images, bearings), math.nan
    else:
        strip = _checked_image(image)
    if projection == "perspective":
        return _crops(strip, slicing)
    if slicing.mode == "bearings":
        raise ValueError(f"Mode 'bearings' needs a list of images, not one of projection '{projection}'; use 'wrap'.")
    if slicing.mode == "perspective":
        if projection != "equirectangular":
            raise ValueError(f"A '{projection}' has no known vertical field to view; use mode 'wrap' or 'paper'.")
        views = view_headings(slicing, heading)
        chosen = select_frames(len(views), slicing.num_frames, slicing.select)
        headings = [views[index] for index in chosen]
        return perspective_views(strip, headings, slicing.frame_px, slicing.fov_deg, slicing.pitch_deg)
    top, rows = band_rows(strip.shape, slicing, projection)
    strip = strip[top : top + rows]
    north_px = None
    if slicing.align_north and math.isfinite(heading):
        north_px = round((0.5 - heading / 360) * strip.shape[1])
    if slicing.headings_deg is not None:
        return _windows_at(strip, slicing, strip.shape[1] / 2 if north_px is None else north_px)
    if north_px is not None:
        strip = around(strip, north_px, strip.shape[1])
    return _sliding_windows(strip, slicing) if slicing.mode == "paper" else _even_windows(strip, slicing)


def stitch_bearings(images: Sequence[NDArray[np.uint8]], headings_deg: Sequence[float]) -> NDArray[np.uint8]:
    """Photographs side by side in one strip, clockwise from the smallest heading in 0..360, at the smallest height.

    Nothing is blended or warped: neighbours whose fields overlap show the overlap twice, as in the paper's strips.

    Args:
        images: (H, W, 3) uint8 each.
        headings_deg: The heading of each image's centre, degrees clockwise from true north.

    Returns:
        (smallest H, sum of the scaled W, 3) uint8, writable.

    Raises:
        ValueError: no images, another number of headings, or a heading that is not finite.
    """
    images, headings_deg = _checked_bearings(images, headings_deg)
    height = min(image.shape[0] for image in images)
    scaled = []
    for image in images:
        width = max(1, round(image.shape[1] * height / image.shape[0]))
        scaled.append(image if image.shape[0] == height else resize(image, height, width))
    return np.concatenate(scaled, axis=1)


def upsampling(image_shape: Sequence[int], slicing: Slicing, projection: str = "equirectangular") -> float:
    """Frame px per source px at a frame's centre: above 1 frames are enlarged, above 1.5 they show no more detail.

    Args:
        image_shape: (H, W) or (H, W, 3) of the decoded image, or of one of the bearings.
        slicing: What is cut.
        projection: As in `slice_panorama`.
    """
    height, width = image_shape[:2]
    if projection == "perspective" or slicing.mode == "bearings":
        return slicing.frame_px / min(height, width)
    if slicing.mode == "perspective":
        focal_px = slicing.frame_px / 2 / math.tan(math.radians(slicing.fov_deg / 2))
        return 2 * math.pi * focal_px / width
    return slicing.frame_px / band_rows(image_shape, slicing, projection)[1]


def _checked_image(image: object) -> NDArray[np.uint8]:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        seen = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"A panorama must be one (H, W, 3) uint8 array, got {seen}.")
    if 0 in image.shape:
        raise ValueError(f"The panorama has no pixels: shape {image.shape}.")
    return np.require(image, requirements=["C", "W"])  # torch refuses negative strides, warns on read-only memory


def _checked_bearings(
    images: object, headings_deg: Sequence[float] | None
) -> tuple[list[NDArray[np.uint8]], list[float]]:
    """The images and their headings in 0..360, sorted by heading."""
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4:
        images = list(images)
    if not isinstance(images, list | tuple) or len(images) == 0:
        raise ValueError(f"Projection 'bearings' needs a list of at least one image, got {type(images).__name__}.")
    if headings_deg is None or len(headings_deg) != len(images):
        num_headings = "none" if headings_deg is None else len(headings_deg)
        raise ValueError(f"{len(images)} images need as many headings (column bearing_deg), got {num_headings}.")
    headings = [float(heading) for heading in headings_deg]
    if not all(math.isfinite(heading) for heading in headings):
        raise ValueError(f"The headings {headings} must all be finite degrees to put the images in order.")
    order = sorted(range(len(headings)), key=lambda index: headings[index] % 360)
    return [_checked_image(images[index]) for index in order], [headings[index] % 360 for index in order]


def band_rows(image_shape: Sequence[int], slicing: Slicing, projection: str) -> tuple[int, int]:
    """(first row, number of rows) to use."""
    height, width = image_shape[:2]
    rows = height
    if projection == "equirectangular":
        rows = min(height, max(1, round(width * slicing.band_deg / 360)))
    return (height - rows) // 2, rows


def view_headings(slicing: Slicing, heading: float) -> list[float]:
    """Degrees clockwise from the image's centre column of the views' centres."""
    aligned = slicing.align_north and math.isfinite(heading)
    if slicing.headings_deg is not None:
        return [view - heading if aligned else view for view in slicing.headings_deg]
    left_edge = -heading if aligned else -180.0
    step = 360 / slicing.num_frames
    return [left_edge + slicing.fov_deg / 2 + step * index for index in range(slicing.num_frames)]


def _stacked(frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """(V, S, S, 3) C-contiguous; np.stack alone keeps the memory order of the slices, which is another."""
    return np.stack(frames, out=np.empty((len(frames), *frames[0].shape), dtype=np.uint8))


def _centre_square(image: NDArray[np.uint8], frame_px: int) -> NDArray[np.uint8]:
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], frame_px, frame_px)


def _crops(image: NDArray[np.uint8], slicing: Slicing) -> NDArray[np.uint8]:
    """Square crops of one photograph, evenly spaced from its left to its right edge."""
    height, width, _ = image.shape
    spare = max(0, width - height)
    num_distinct = min(slicing.num_frames, spare + 1)
    starts = np.rint(np.linspace(0, spare, num_distinct)).astype(int)
    crops = [_centre_square(image[:, left : left + width - spare], slicing.frame_px) for left in starts]
    return _stacked([crops[index] for index in select_frames(num_distinct, slicing.num_frames, slicing.select)])


def _sliding_windows(strip: NDArray[np.uint8], slicing: Slicing) -> NDArray[np.uint8]:
    """`paper`: (V, S, S, 3) of windows of height_px every stride_px on the strip scaled to height_px, no wrap."""
    height, width, _ = strip.shape
    side, frame_px = slicing.height_px, slicing.frame_px
    scaled_width = round(width * side / height)
    if scaled_width < side:
        raise ValueError(f"A strip of {width}x{height} px is narrower than one square frame; is it a panorama?")
    num_windows = (scaled_width - side) // slicing.stride_px + 1
    chosen = select_frames(num_windows, slicing.num_frames, slicing.select)
    if slicing.stride_px * frame_px % side == 0:
        step = slicing.stride_px * frame_px // side
        scale = (frame_px / height, scaled_width * frame_px / side / width)
        shown = int(chosen[-1]) * step + frame_px
        resized = resize(strip, frame_px, shown, scale)
        return _stacked([resized[:, step * index : step * index + frame_px] for index in chosen])
    starts = {int(index): round(index * slicing.stride_px * width / scaled_width) for index in chosen}
    crop_px = min(width, round(side * width / scaled_width))
    frames = {
        index: resize(around(strip, min(start, width - crop_px), crop_px), frame_px, frame_px)
        for index, start in starts.items()
    }
    return _stacked([frames[int(index)] for index in chosen])


def _even_windows(strip: NDArray[np.uint8], slicing: Slicing) -> NDArray[np.uint8]:
    """`wrap`: (V, S, S, 3) of windows 360 / V degrees apart around a strip that closes on itself.

    Windows are widened or narrowed by at most 1 % so that they land on whole output pixels: for 8 frames of 2048x640
    they span 637 x 640 px, and one resize replaces eight.
    """
    height, width, _ = strip.shape
    num_frames, frame_px = slicing.num_frames, slicing.frame_px
    turn = width * frame_px / height
    step = max(1, round(turn / num_frames))
    if abs(step * num_frames / turn - 1) <= _MAX_STRETCH:
        resized = resize_around(strip, frame_px, step * num_frames, step * (num_frames - 1) + frame_px)
        return _stacked([resized[:, step * index : step * index + frame_px] for index in range(num_frames)])
    starts = [round(index * width / num_frames) for index in range(num_frames)]
    return _stacked([resize(around(strip, start, height), frame_px, frame_px) for start in starts])


def _windows_at(strip: NDArray[np.uint8], slicing: Slicing, origin_px: float) -> NDArray[np.uint8]:
    """`wrap` with given directions: (V, S, S, 3) of square windows centred there, counted from column origin_px."""
    height, width, _ = strip.shape
    headings = slicing.headings_deg or ()
    chosen = select_frames(len(headings), slicing.num_frames, slicing.select)
    starts = [round(origin_px + headings[index] / 360 * width - height / 2) for index in chosen]
    frames = {start: resize(around(strip, start, height), slicing.frame_px, slicing.frame_px) for start in set(starts)}
    return _stacked([frames[start] for start in starts])
