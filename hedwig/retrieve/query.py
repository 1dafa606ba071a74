"""One query: an image, or several photographs of one place, cut into the frames that the model will see.

Only pixels count: file names, Exif positions and dates stay behind here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedwig import storage
from hedwig.panorama import FrameWindow, Slicing, content_hash, decode_image, frame_windows, slice_panorama
from hedwig.retrieve.prediction import Frame, Prediction

__all__ = ["Query", "make_query"]


@dataclass(frozen=True, eq=False)
class Query:
    """Ready to be embedded.

    Attributes:
        pano_id: content hash of the frames.
        frames: (V, S, S, 3) uint8.
        projection: how the image was understood.
        heading: degrees clockwise from true north of the image's centre column; NaN when unknown.
        captured_at: ISO date, or None.
        windows: (V,) where each frame lies in the image.
    """

    pano_id: str
    frames: NDArray[np.uint8]
    projection: str
    heading: float
    captured_at: str | None
    windows: tuple[FrameWindow, ...]

    def seen(self, prediction: Prediction, log_probs: NDArray[np.float64] | None = None) -> Prediction:
        """The prediction with its frames; `log_probs` (V,) are log p of its cell by each frame alone."""
        probs = [None] * len(self.windows) if log_probs is None else np.exp(log_probs).tolist()
        weights = probs
        if log_probs is not None:
            shares = np.exp(log_probs - log_probs.max())
            weights = (shares / shares.sum()).tolist()
        frames = tuple(
            Frame(window.heading_deg, window.fov_deg, window.x0, window.x1, weight, prob)
            for window, weight, prob in zip(self.windows, weights, probs, strict=True)
        )
        return replace(prediction, frames=frames)


def make_query(
    image: Any,
    slicing: Slicing,
    *,
    heading: float = math.nan,
    captured_at: str | None = None,
    projection: str | None = None,
    bearings_deg: Sequence[float] | None = None,
) -> Query:
    """Decode and slice; arguments as in `hedwig.Hedwig.locate`.

    Raises:
        FileNotFoundError: there is no such image.
        ValueError: it cannot be decoded or sliced.
    """
    if isinstance(image, list | tuple):
        pixels: Any = [_pixels(one, slicing.half_size) for one in image]
        kind, shapes = "bearings", [one.shape for one in pixels]
        if bearings_deg is None:
            bearings_deg = [360 * i / len(pixels) for i in range(len(pixels))]
    else:
        pixels = _pixels(image, slicing.half_size)
        kind, shapes, bearings_deg = projection or _projection(pixels.shape), [pixels.shape], None
    frames = slice_panorama(pixels, slicing, projection=kind, heading=heading, bearings_deg=bearings_deg)
    windows = frame_windows(shapes, slicing, projection=kind, heading=heading, bearings_deg=bearings_deg)
    return Query(content_hash(frames.tobytes()), frames, kind, heading, captured_at, windows)


def _projection(shape: tuple[int, ...]) -> str:
    ratio = shape[1] / max(shape[0], 1)
    return "equirectangular" if 1.9 <= ratio <= 2.1 else "frame strip" if ratio > 2.1 else "perspective"


def _pixels(image: Any, half_size: bool) -> NDArray[np.uint8]:
    """(H, W, 3) uint8; whatever else came with the picture (name, position, time) stays behind."""
    if isinstance(image, str | Path):
        image = storage.read_bytes(str(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return decode_image(bytes(image), half_size=half_size)
    if isinstance(image, np.ndarray):
        return image
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    raise ValueError(
        f"Cannot take a {type(image).__name__} for an image; pass a path, bytes, PIL image or uint8 array."
    )
