"""The stage that turns addresses into image bytes, many at a time, and nothing else: pixels are made elsewhere.

Reads are spread over threads because object storage answers in tens of milliseconds and the bytes release the GIL.
The address itself goes no further than this stage: no model ever sees a file name.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedwig.sources.tars import is_member, read_member
from hedwig.storage import read_bytes

__all__ = ["ImageReader", "read_image"]

Batch = dict[str, NDArray[Any]]


class ImageReader:
    """Fetch the encoded image, or the images of all bearings, of each row."""

    reads = ("image_uri", "bearing_uri")
    writes = ("image_bytes",)

    def __init__(self, *, num_threads: int = 8) -> None:
        self._pool = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="read")

    def __call__(self, batch: Batch) -> Batch:
        """Add ``image_bytes``: (B,) object array of bytes, or of a list of bytes for a panorama in bearings."""
        rows = zip(batch["image_uri"].tolist(), batch["bearing_uri"].tolist(), strict=True)
        results = list(self._pool.map(_fetch, rows))
        images, failures = np.empty(len(results), dtype=object), np.empty(len(results), dtype=object)
        for i, (image, failure) in enumerate(results):
            images[i], failures[i] = image, failure
        return {**batch, "image_bytes": images, "failure": failures}


def _fetch(row: tuple[str, Any]) -> tuple[Any, str | None]:
    uri, bearings = row
    try:
        if bearings is not None and len(bearings):
            return [read_image(str(address)) for address in bearings], None
        return read_image(uri), None
    except FileNotFoundError as error:
        return None, f"image not found: {error}"
    except (OSError, ValueError) as error:
        return None, f"image not readable: {error}"


def read_image(uri: str) -> bytes:
    """The encoded image at a path, an ``s3://`` or ``gs://`` address, or inside a tar (``shard.tar#member``)."""
    return read_member(uri) if is_member(uri) else read_bytes(uri)
