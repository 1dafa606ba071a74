"""Panoramas from bytes to model input: decode an image, cut it into square frames, and the stage that does both.

Frames stay uint8 here; the model folds mean and standard deviation into its first layer, so that a quarter of the
bytes travel. Captioning, embedding and fetching are elsewhere.
"""

from __future__ import annotations

from hedwig.panorama.decode import content_hash, decode_image, image_size
from hedwig.panorama.slicing import (
    Slicing,
    select_frames,
    slice_panorama,
    stitch_bearings,
    upsampling,
)
from hedwig.panorama.stage import PanoramaSlicer
from hedwig.panorama.windows import FrameWindow, frame_windows

__all__ = [
    "FrameWindow",
    "PanoramaSlicer",
    "Slicing",
    "content_hash",
    "decode_image",
    "frame_windows",
    "image_size",
    "select_frames",
    "slice_panorama",
    "stitch_bearings",
    "upsampling",
]
