"""The picture: a row of the listing becomes an equirectangular panorama, and a stage that does it for batches.

Camera 2.4 m above a straight road; the centre column looks to `heading`, the middle row is the horizon, the columns
wrap at 360°. The picture depends on the row alone (position, country, date, heading; chance from `pano_id`), so a
lost image can be drawn again anywhere. Painted in layers from far to near; a drawing, not a ray tracer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from hedwig.synthetic.backdrop import draw_ground, draw_horizon, draw_sky, rays
from hedwig.synthetic.scene import scene_of
from hedwig.synthetic.street import draw_houses, draw_objects

__all__ = ["PanoramaRenderer", "encode_jpeg", "render_panorama"]


def render_panorama(row: Mapping[str, Any], *, width: int) -> NDArray[np.uint8]:
    """Draw one panorama.

    Args:
        row: `pano_id`, `lat`, `lon`, `heading`; `country`, `captured_at` and `population` where known.
        width: columns; even, at least 32.

    Returns:
        The image, (width/2, width, 3) uint8 RGB.

    Raises:
        ValueError: the row has no finite position or heading, the date is none, or the width is not possible.
    """
    view, scene = rays(width), scene_of(row)
    canvas = np.empty((3, width // 2, width), np.float32)
    draw_sky(canvas, scene, view)
    draw_horizon(canvas, scene, view)
    draw_ground(canvas, scene, view)
    draw_houses(canvas, scene, view)
    draw_objects(canvas, scene, view)
    shift = scene.random("grain").integers(0, width)
    grain = np.float32(2.2) * np.roll(view.grain, int(shift), axis=1)
    image = np.empty((width // 2, width, 3), np.uint8)
    for band in range(3):
        plane = canvas[band]
        plane *= np.float32(scene.light[band])
        plane += grain
        np.clip(plane, 0, 255, out=plane)
        image[:, :, band] = plane
    return image


def encode_jpeg(image: NDArray[np.uint8], quality: int = 88) -> bytes:
    """JPEG bytes of an (H, W, 3) uint8 RGB image."""
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality, colorspace="RGB"))


class PanoramaRenderer:
    """Stage: draws each row of a synthetic listing and adds its JPEG file as `image_bytes`.

    `population` is used where the batch has it, and taken as that of a small town where not. A row that cannot be
    drawn gets a reason in `failure`, and empty bytes.

    Args:
        width: pixels; the height is half of it.
        quality: of the JPEG, 1 to 100.
    """

    reads = ("pano_id", "lat", "lon", "heading", "country", "captured_at")
    writes = ("image_bytes",)

    def __init__(self, *, width: int = 1024, quality: int = 88) -> None:
        if not 1 <= quality <= 100:
            raise ValueError(f"JPEG quality is {quality}; choose 1 to 100.")
        self.width, self.quality = rays(width).width, quality

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Add `image_bytes` (B,) object and `failure` (B,) object of None or text."""
        names = [*self.reads, *(["population"] if "population" in batch else [])]
        num = len(batch["pano_id"])
        images, failures = np.full(num, b"", object), np.full(num, None, object)
        for index in range(num):
            row = {name: batch[name][index] for name in names}
            try:
                images[index] = encode_jpeg(render_panorama(row, width=self.width), self.quality)
            except ValueError as error:
                failures[index] = str(error)
        return {**batch, "image_bytes": images, "failure": failures}
