"""The stage that makes one panorama out of a row's bearings, between reading images and slicing them.

With it, a listing of eight Street View pictures a place can be cut like any panorama: perspective views at any heading,
a band around the horizon. Rows of other projections pass through untouched. The panorama is handed on as JPEG bytes,
because that is what the stages after it take.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from hedwig.panorama.decode import decode_image
from hedwig.panorama.stitch import Stitched, StitchedProjection, stitch_views

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ViewStitcher"]

DEFAULT_FOV_DEG = 90.0
_SAME_DEG = 0.01
_LISTED_AS = {"equirectangular": "equirectangular", "strip": "frame strip"}  # schema.PROJECTIONS


class ViewStitcher:
    """Replace the images of a row in bearings by one panorama; the arguments are those of `stitch_views`.

    ``image_bytes`` becomes one JPEG, ``projection`` 'equirectangular' or 'frame strip', ``heading`` that of the centre
    column. New (B,): ``band_deg`` and ``overlap_deg`` float64 (NaN for rows that passed through), ``failure``.

    Args:
        fov_deg: Horizontal field of view of every picture; None for that of the row's ``fov_deg``, or 90 where there is
            none. A row that says another than this one fails.
        pitch_deg: Elevation of their centres.
        height_px: Rows of the panorama.
        projection: 'equirectangular' or 'strip'.
        heading_deg: Heading of the centre column.
        feather_deg: Width of the blending on either side of a seam.
        jpeg_quality: 1 to 100; colours are not subsampled.
        num_threads: Panoramas at a time.

    Raises:
        ValueError: num_threads or jpeg_quality out of range.
    """

    reads = ("image_bytes", "projection", "heading", "bearing_deg")
    reads_if_there = ("fov_deg",)
    writes = ("image_bytes", "projection", "heading", "band_deg", "overlap_deg")

    def __init__(
        self,
        *,
        fov_deg: float | None = None,
        pitch_deg: float = 0.0,
        height_px: int = 512,
        projection: StitchedProjection = "equirectangular",
        heading_deg: float = 0.0,
        feather_deg: float = 10.0,
        jpeg_quality: int = 95,
        num_threads: int = 2,
    ) -> None:
        if num_threads < 1 or not 1 <= jpeg_quality <= 100:
            raise ValueError(f"num_threads is {num_threads} (at least 1), jpeg_quality {jpeg_quality} (1 to 100).")
        self.fov_deg = fov_deg
        self.geometry: dict[str, Any] = {
            "pitch_deg": pitch_deg, "height_px": height_px, "projection": projection,
            "heading_deg": heading_deg, "feather_deg": feather_deg,
        }  # fmt: skip
        self.jpeg_quality, self.num_threads = jpeg_quality, num_threads

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Stitch the rows in bearings of a batch; columns not named above pass through untouched."""
        num_rows = len(batch["image_bytes"])
        images, projections = batch["image_bytes"].copy(), batch["projection"].astype(object)
        headings = np.array([np.nan if h is None else float(h) for h in batch["heading"]], dtype=np.float64)
        bands, overlaps = np.full(num_rows, np.nan), np.full(num_rows, np.nan)
        failures = np.full(num_rows, None, dtype=object)

        def fill(row: int) -> None:
            if str(batch["projection"][row]) != "bearings":
                return
            try:
                fov_deg = self._fov_of(batch["fov_deg"][row] if "fov_deg" in batch else None)
                panorama = self._stitched(batch["image_bytes"][row], batch["bearing_deg"][row], fov_deg)
            except ValueError as error:
                failures[row] = str(error)
            except MemoryError as error:
                failures[row] = f"Out of memory while stitching: {error}"
            else:
                images[row] = _jpeg(panorama.image, self.jpeg_quality)
                projections[row], headings[row] = _LISTED_AS[panorama.projection], panorama.heading_deg
                bands[row], overlaps[row] = panorama.band_deg, panorama.overlap_deg

        if self.num_threads == 1 or num_rows == 1:
            for row in range(num_rows):
                fill(row)
        else:
            with ThreadPoolExecutor(self.num_threads, thread_name_prefix="stitcher") as pool:
                list(pool.map(fill, range(num_rows)))  # list: an unexpected error must not stay in its thread
        made = {"image_bytes": images, "projection": projections, "heading": headings}
        return {**batch, **made, "band_deg": bands, "overlap_deg": overlaps, "failure": failures}

    def _fov_of(self, listed: Any) -> float:
        if listed is None or not np.isfinite(listed):
            return DEFAULT_FOV_DEG if self.fov_deg is None else self.fov_deg
        if self.fov_deg is not None and abs(self.fov_deg - float(listed)) > _SAME_DEG:
            raise ValueError(
                f"fov mismatch: fov_deg is {self.fov_deg:g}, and the row says {float(listed):g}; leave it out."
            )
        return float(listed)

    def _stitched(self, files: Any, bearings_deg: Any, fov_deg: float) -> Stitched:
        if files is None or isinstance(files, bytes | bytearray | memoryview) or bearings_deg is None:
            raise ValueError("Projection 'bearings' needs a list of images and one of their headings.")
        images = [decode_image(file) for file in files]
        return stitch_views(images, [float(bearing) for bearing in bearings_deg], fov_deg=fov_deg, **self.geometry)


def _jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    import simplejpeg

    return bytes(simplejpeg.encode_jpeg(image, quality=quality, colorspace="RGB", colorsubsampling="444"))
