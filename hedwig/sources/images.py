"""The stage that turns addresses into image bytes, many at a time, and nothing else: pixels are made elsewhere.

Reads are spread over threads because object storage answers in tens of milliseconds and the bytes release the GIL. What
a later batch will ask for can be begun earlier (`ImageReader.prefetch`), so that nobody waits for it then.
The address itself goes no further than this stage: no model ever sees a file name.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedwig.sources.tars import is_member, read_member
from hedwig.storage import read_bytes

__all__ = ["ImageReader", "addresses_of", "read_image"]

Batch = dict[str, NDArray[Any]]
_Row = tuple[str, Any]
_Result = tuple[Any, str | None]


class ImageReader:
    """Fetch the encoded image, or the images of all bearings, of each row.

    Args:
        num_threads: Images fetched at a time.
    """

    reads = ("image_uri", "bearing_uri")
    writes = ("image_bytes",)

    def __init__(self, *, num_threads: int = 32) -> None:
        self._pool = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="read")
        self._ahead: dict[tuple[str, ...], list[Future[_Result]]] = {}  # as often as a row names it

    def __call__(self, batch: Batch) -> Batch:
        """Add ``image_bytes``: (B,) object array of bytes, or of a list of bytes for a panorama in bearings."""
        results = [begun.result() for begun in [self._begun(row) for row in addresses_of(batch)]]
        images, failures = np.empty(len(results), dtype=object), np.empty(len(results), dtype=object)
        for i, (image, failure) in enumerate(results):
            images[i], failures[i] = image, failure
        return {**batch, "image_bytes": images, "failure": failures}

    def prefetch(self, batch: Batch) -> None:
        """Begin to fetch the images of a batch that will be asked for next; of an empty one: forget what was begun."""
        rows = addresses_of(batch)
        if not rows:
            for begun in self._ahead.values():
                for one in begun:
                    one.cancel()
            self._ahead.clear()
        for row in rows:
            self._ahead.setdefault(_key(row), []).append(self._begin(row))

    def _begin(self, row: _Row) -> Future[_Result]:
        return self._pool.submit(self._fetch, row)

    def _begun(self, row: _Row) -> Future[_Result]:
        earlier = self._ahead.get(_key(row), [])
        begun = earlier.pop(0) if earlier else self._begin(row)
        if not earlier:
            self._ahead.pop(_key(row), None)
        return begun

    def _fetch(self, row: _Row) -> _Result:
        uri, bearings = row
        try:
            if bearings is not None and len(bearings):
                return [read_image(str(address)) for address in bearings], None
            return read_image(uri), None
        except FileNotFoundError as error:
            return None, f"image not found: {error}"
        except (OSError, ValueError) as error:
            return None, f"image not readable: {error}"


def addresses_of(batch: Batch) -> list[_Row]:
    """``image_uri`` and ``bearing_uri`` of each row."""
    return list(zip(batch["image_uri"].tolist(), batch["bearing_uri"].tolist(), strict=True))


def _key(row: _Row) -> tuple[str, ...]:
    uri, bearings = row
    return (uri,) if bearings is None else (uri, *map(str, bearings))


def read_image(uri: str) -> bytes:
    """The encoded image at a path, an ``s3://`` or ``gs://`` address, or inside a tar (``shard.tar#member``)."""
    return read_member(uri) if is_member(uri) else read_bytes(uri)
