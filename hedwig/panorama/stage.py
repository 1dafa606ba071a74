"""The stage that turns image bytes into frames: decode and slice in a few threads, one failure text per bad row.

Threads and not processes, because decoding, hashing and resizing release the interpreter lock. Frames stay uint8. The
stage fetches nothing and knows nothing of Ray.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from hedwig.panorama.decode import content_hash, decode_image
from hedwig.panorama.slicing import Slicing, slice_panorama

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PanoramaSlicer"]


class PanoramaSlicer:
    """Add the columns `frames`, (B, V, S, S, 3) uint8, `content_hash` and `failure`.

    An item of `image_bytes` is one file, or for bearings a list of files, whose headings stand in the optional
    column `bearing_deg` (a list per row). A row that cannot be done gets a reason in `failure`, else None there, and
    black frames.

    Args:
        slicing: What to cut; the same for references and queries.
        num_threads: How many images are decoded and sliced at a time.

    Raises:
        ValueError: num_threads is below 1.
    """

    reads = ("image_bytes", "projection", "heading")
    reads_if_there = ("bearing_deg",)
    writes = ("frames", "content_hash")

    def __init__(self, *, slicing: Slicing, num_threads: int = 2) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be at least 1.")
        self.slicing = slicing
        self.num_threads = num_threads

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Slice every row of a batch; other columns pass through untouched."""
        num_rows, slicing = len(batch["image_bytes"]), self.slicing
        frames = np.zeros((num_rows, slicing.num_frames, slicing.frame_px, slicing.frame_px, 3), dtype=np.uint8)
        hashes, failures = np.full(num_rows, "", dtype=object), np.full(num_rows, None, dtype=object)

        def fill(row: int) -> None:
            try:
                hashes[row], frames[row] = self._slice_row(batch, row)
            except ValueError as error:
                failures[row] = str(error)
            except MemoryError as error:
                failures[row] = f"Out of memory while slicing: {error}"

        if self.num_threads == 1 or num_rows == 1:
            for row in range(num_rows):
                fill(row)
        else:
            with ThreadPoolExecutor(self.num_threads, thread_name_prefix="slicer") as pool:
                list(pool.map(fill, range(num_rows)))  # list: an unexpected error must not stay in its thread
        return {**batch, "frames": frames, "content_hash": hashes, "failure": failures}

    def _slice_row(self, batch: dict[str, NDArray[Any]], row: int) -> tuple[str, NDArray[np.uint8]]:
        item, projection = batch["image_bytes"][row], str(batch["projection"][row])
        heading = batch["heading"][row]
        heading = math.nan if heading is None else float(heading)
        half_size = self.slicing.half_size
        if projection != "bearings":
            image = decode_image(item, half_size=half_size)
            return content_hash(item), slice_panorama(image, self.slicing, projection=projection, heading=heading)
        if item is None or isinstance(item, bytes | bytearray | memoryview):
            raise ValueError(f"Projection 'bearings' needs a list of images, got {type(item).__name__}.")
        images = [decode_image(one, half_size=half_size) for one in item]
        bearings = batch["bearing_deg"][row] if "bearing_deg" in batch else None
        frames = slice_panorama(images, self.slicing, projection=projection, bearings_deg=bearings)
        return content_hash(list(item)), frames
