"""Is this picture worth embedding? A few numbers per image, and the stage that takes out what shows nothing.

Everything is measured on the image at 512 px width, so that thresholds mean the same for every size. The defaults are
lenient on purpose: each lies well beyond the worst of 284 real images (street scenes, sign photos, night skies, a
cloudless sky), and still catches the grey tile of a place without imagery, a lens cap, a blown exposure and a picture
blurred beyond use. Rows of pure black, as a stitched panorama has above and below its band, do not count. There is no
indoor filter: the cheap signs of sky (bluer or brighter upper third) are wrong for one in seven of 39 labelled
panoramas, and most often for forests and arcades. Near duplicates are found in `hedwig.panorama.duplicates`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from hedwig.panorama.decode import decode_image
from hedwig.panorama.duplicates import perceptual_hash, roll_hash
from hedwig.panorama.resample import resize

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Quality", "QualityFilter", "QualityLimits", "image_quality", "quality_fault"]

_WIDTH_PX = 512
_BLACK = 12  # JPEG rings a little into padding that was 0
_DARK, _BRIGHT = 16, 250
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


@dataclass(frozen=True)
class Quality:
    """What was measured on one image at 512 px width; in brackets the range of 284 real images.

    Attributes:
        sharpness: Variance of the 4-neighbour Laplacian of the grey levels (22 to 9452; blurred by sigma 3: under 6).
        brightness: Mean grey level, 0 to 255 (38 to 188).
        dark_share: Share of pixels at level 16 or below (0 to 0.48).
        bright_share: Share of pixels at level 250 or above (0 to 0.14).
        entropy_bits: Shannon entropy of the grey levels (5.6 to 7.9; the tile without imagery: 0.2).
        flatness: Share of the commonest five neighbouring grey levels (0.03 to 0.33; that tile: 0.99).
        red_share: Red's part of all light (0.17 to 0.51). Water takes red away; no picture of it was at hand to test.
    """

    sharpness: float
    brightness: float
    dark_share: float
    bright_share: float
    entropy_bits: float
    flatness: float
    red_share: float


@dataclass(frozen=True)
class QualityLimits:
    """Beyond which values an image is refused; the sense of each is in `Quality`.

    Raises:
        ValueError: a limit that is not finite.
    """

    min_sharpness: float = 15.0
    min_brightness: float = 20.0
    max_brightness: float = 235.0
    max_dark_share: float = 0.9
    max_bright_share: float = 0.6
    min_entropy_bits: float = 3.0
    max_flatness: float = 0.75
    min_red_share: float = 0.1

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not np.isfinite(value):
                raise ValueError(f"{item.name} is {value!r}; it must be a number (0, or a large one, switches it off).")


def image_quality(image: NDArray[np.uint8]) -> Quality:
    """Measure one decoded image, (H, W, 3) uint8."""
    small = _small(image)
    lit = small.max(axis=(1, 2)) > _BLACK
    if lit.mean() >= 0.1:
        small = small[np.flatnonzero(lit)]
    grey = small @ _LUMA
    centre = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * centre
    shares = np.bincount(grey.astype(np.intp).ravel(), minlength=256) / grey.size
    present = shares[shares > 0]
    means = small.reshape(-1, 3).mean(axis=0, dtype=np.float64)
    return Quality(
        sharpness=float(laplacian.var()) if laplacian.size else 0.0,
        brightness=float(grey.mean()),
        dark_share=float(shares[: _DARK + 1].sum()),
        bright_share=float(shares[_BRIGHT:].sum()),
        entropy_bits=float(-(present * np.log2(present)).sum()),
        flatness=float(np.convolve(shares, np.ones(5)).max()),
        red_share=float(means[0] / means.sum()) if means.sum() > 0 else 0.0,
    )


def quality_fault(quality: Quality, limits: QualityLimits) -> str | None:
    """Why an image is refused, or None; the part before ':' names the fault, the rest gives the values."""
    q, lim = quality, limits
    if q.entropy_bits < lim.min_entropy_bits or q.flatness > lim.max_flatness:
        # A lens cap and a blown sky are of one colour, too: say which.
        if q.brightness < lim.min_brightness:
            return f"underexposed: mean grey level {q.brightness:.0f}, below {lim.min_brightness:g}"
        if q.brightness > lim.max_brightness:
            return f"overexposed: mean grey level {q.brightness:.0f}, above {lim.max_brightness:g}"
        return (
            f"blank or no imagery: {q.flatness:.0%} of the pixels have one grey level, entropy {q.entropy_bits:.1f} "
            f"bits (limits {lim.max_flatness:.0%} and {lim.min_entropy_bits:g})"
        )
    faults = (
        (q.brightness < lim.min_brightness, "underexposed: mean grey level", q.brightness, lim.min_brightness),
        (q.dark_share > lim.max_dark_share, "underexposed: share of black pixels", q.dark_share, lim.max_dark_share),
        (q.brightness > lim.max_brightness, "overexposed: mean grey level", q.brightness, lim.max_brightness),
        (q.bright_share > lim.max_bright_share, "overexposed: share of white", q.bright_share, lim.max_bright_share),
        (q.sharpness < lim.min_sharpness, "blurred: variance of Laplacian", q.sharpness, lim.min_sharpness),
        (q.red_share < lim.min_red_share, "no red light, perhaps under water: share", q.red_share, lim.min_red_share),
    )
    for bad, what, value, limit in faults:
        if bad:
            return f"{what} {value:.3g}, the limit is {limit:g}"
    return None


class QualityFilter:
    """Add the numbers of `Quality`, two hashes, and a `failure` for images that show nothing.

    Columns (B,): those of `Quality` as float32; ``perceptual_hash`` and ``roll_hash`` uint64 (see
    `hedwig.panorama.duplicates`). An item of ``image_bytes`` is one file or, for bearings, a list of files: then the
    numbers are those of the first refused image, or of the least sharp one, and the hashes those of the first image.

    Args:
        limits: What is refused.
        num_threads: How many images are decoded at a time.

    Raises:
        ValueError: num_threads is below 1.
    """

    reads = ("image_bytes",)
    writes = (*(item.name for item in fields(Quality)), "perceptual_hash", "roll_hash")

    def __init__(self, *, limits: QualityLimits | None = None, num_threads: int = 2) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be at least 1.")
        self.limits, self.num_threads = limits or QualityLimits(), num_threads

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Measure every row of a batch; other columns pass through untouched."""
        num_rows = len(batch["image_bytes"])
        columns: dict[str, NDArray[Any]] = {f.name: np.zeros(num_rows, dtype=np.float32) for f in fields(Quality)}
        hashes = {name: np.zeros(num_rows, dtype=np.uint64) for name in ("perceptual_hash", "roll_hash")}
        failures = np.full(num_rows, None, dtype=object)

        def fill(row: int) -> None:
            try:
                quality, failures[row], first = self._judge(batch["image_bytes"][row])
            except ValueError as error:
                failures[row] = str(error)
            except MemoryError as error:
                failures[row] = f"Out of memory while decoding: {error}"
            else:
                for name, value in asdict(quality).items():
                    columns[name][row] = value
                hashes["perceptual_hash"][row] = perceptual_hash(first)
                hashes["roll_hash"][row] = roll_hash(first)

        if self.num_threads == 1 or num_rows == 1:
            for row in range(num_rows):
                fill(row)
        else:
            with ThreadPoolExecutor(self.num_threads, thread_name_prefix="quality") as pool:
                list(pool.map(fill, range(num_rows)))  # list: an unexpected error must not stay in its thread
        return {**batch, **columns, **hashes, "failure": failures}

    def _judge(self, item: Any) -> tuple[Quality, str | None, NDArray[np.uint8]]:
        """The numbers, the fault, and the first image at 512 px width."""
        if item is None or isinstance(item, bytes | bytearray | memoryview):
            image = _decoded_small(item)
            quality = image_quality(image)
            return quality, quality_fault(quality, self.limits), image
        images = [_decoded_small(one) for one in item]
        if not images:
            raise ValueError("The row has no image.")
        numbers = [image_quality(image) for image in images]
        for place, quality in enumerate(numbers):
            fault = quality_fault(quality, self.limits)
            if fault is not None:
                return quality, f"{fault} (image {place + 1} of {len(images)})", images[0]
        return min(numbers, key=lambda quality: quality.sharpness), None, images[0]


def _decoded_small(data: Any) -> NDArray[np.uint8]:
    return _small(decode_image(data))


def _small(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image at 512 px width, (h, 512, 3) uint8."""
    height, width, _ = image.shape
    if width == _WIDTH_PX:
        return image
    image = np.require(image, requirements=["C", "W"])
    return resize(image, max(3, round(height * _WIDTH_PX / width)), _WIDTH_PX)
