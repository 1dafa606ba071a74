"""Rows of an earlier table that need not be computed again: the same image, read and cut by the same stages.

A stage's rows depend on the columns that its stages read, on the image's bytes, and on the settings and models in the
artefact's fingerprint. Where an earlier artefact has the same settings and models, each of its rows whose columns are
unchanged and whose image is the same is taken over, its vectors as they are, its place and split as they are now; the
rest is computed. Whether the image is the same is told, in this order, by the listing's sha256 (against the content
hash that was recorded), else by its stamp (`hedwig.sources.stamps`), or, when asked for, by reading and hashing every
image. A file of which nothing changed at all is copied by the storage, without passing through here.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hedwig import storage
from hedwig.pipelines.staged import open_parquet, part_files
from hedwig.schema import SCHEMA_VERSION
from hedwig.sources.stamps import STAMP, image_stamps
from hedwig.vectors import is_vector

__all__ = ["Earlier", "find_earlier", "images_changed", "take_over"]

logger = logging.getLogger(__name__)
ADDRESS = ("image_uri", "bearing_uri")  # where an image is; when contents are compared, it may have moved
ROWS_PER_HASHING = 256


@dataclass(frozen=True)
class Earlier:
    """An earlier table to take rows from.

    Attributes:
        folder: of the finished artefact.
        read: the source's columns that the stages read.
        written: the result's columns that the stages write.
        rehash: compare the contents of all images, and not their stamps.
    """

    folder: str
    read: Sequence[str]
    written: Sequence[str]
    rehash: bool = False


def find_earlier(
    folders: Sequence[str], kind: str, config: Mapping[str, Any], inputs: Mapping[str, str], source: str
) -> str | None:
    """The first folder with a finished artefact of this kind, made with these settings and models.

    Args:
        folders: where to look.
        kind: of the artefact.
        config: its settings.
        inputs: its inputs; the one called `source`, whose rows it is made of, may be another.
        source: name of that input.
    """
    models = {name: digest for name, digest in inputs.items() if name != source}
    for folder in folders:
        manifest = storage.read_manifest(folder)
        if manifest is None or manifest.kind != kind or manifest.schema_version != SCHEMA_VERSION:
            continue
        theirs = {name: digest for name, digest in manifest.inputs.items() if name != source}
        if manifest.config == config and theirs == models and part_files(folder):
            return folder
    return None


def images_changed(folder: str, *, rehash: bool) -> bool:
    """Whether an image of a finished table is another than the one that its row was computed from."""
    for path in part_files(folder):
        names = pq.read_schema(open_parquet(path)).names
        wanted = [n for n in (*ADDRESS, STAMP, "content_hash") if n in names]
        table = pq.read_table(open_parquet(path), columns=wanted)
        if rehash and "content_hash" in names:
            if _hashes(table).tolist() != table["content_hash"].to_pylist():
                return True
        elif STAMP not in names or _stamps(table) != table[STAMP].to_pylist():
            return True
    return False


def take_over(earlier: Earlier, source: pa.Table, folder: str, schema: pa.Schema) -> set[str]:
    """Write the rows of `source` that `earlier` has already into parts of `folder`; returns their ids.

    Args:
        earlier: what to take them from.
        source: (N,) rows that are wanted, with all columns of `schema` that are not written by the stages.
        folder: of the result.
        schema: of the result.
    """
    places = {name: place for place, name in enumerate(source["pano_id"].to_pylist())}
    kept: set[str] = set()
    with ThreadPoolExecutor(4, thread_name_prefix="reuse") as pool:
        for ids in pool.map(lambda path: _take_part(earlier, path, source, places, folder, schema), _parts(earlier)):
            kept |= ids
    return kept


def _parts(earlier: Earlier) -> Iterator[str]:
    yield from part_files(earlier.folder)


def _take_part(
    earlier: Earlier, path: str, source: pa.Table, places: Mapping[str, int], folder: str, schema: pa.Schema
) -> set[str]:
    there = pq.read_schema(open_parquet(path))
    if not set(schema.names) <= set(there.names) or any(
        not there.field(n).equals(schema.field(n), check_metadata=is_vector(schema.field(n))) for n in earlier.written
        if n in schema.names
    ):  # fmt: skip
        return set()
    light = [name for name in there.names if not is_vector(there.field(name))]
    old = pq.read_table(open_parquet(path), columns=light)
    rows = np.array([places.get(name, -1) for name in old["pano_id"].to_pylist()], dtype=np.int64)
    candidates = np.flatnonzero(rows >= 0)
    old, new = old.take(candidates), source.take(rows[candidates])
    same = _same_columns(earlier, old, new)
    same &= _same_images(earlier, old, new, same)
    if not same.any():
        return set()
    old, new = old.filter(pa.array(same)), new.filter(pa.array(same))
    target = storage.join(folder, f"part-kept-{uuid.uuid4().hex[:12]}.parquet")
    columns = {name: (old if name in earlier.written else new)[name] for name in schema.names if name in light}
    if earlier.rehash and STAMP in columns:
        columns[STAMP] = pa.chunked_array([pa.array(_stamps(new), pa.string())])
    unchanged = len(rows) == int(same.sum()) and there.names == schema.names
    if unchanged and all(columns[name].cast(schema.field(name).type).equals(old[name]) for name in columns):
        storage.copy_file(path, target)
        return set(old["pano_id"].to_pylist())
    heavy = pq.read_table(open_parquet(path), columns=[n for n in there.names if is_vector(there.field(n))])
    heavy = heavy.take(candidates[same])
    every = [columns[name] if name in columns else heavy[name] for name in schema.names]
    arrays = [column.cast(field.type) for column, field in zip(every, schema, strict=True)]
    storage.write_table(target, pa.Table.from_arrays(arrays, schema=schema))
    return set(old["pano_id"].to_pylist())


def _same_columns(earlier: Earlier, old: pa.Table, new: pa.Table) -> NDArray[np.bool_]:
    """(N,) whether all that the stages read of a row, but for the image, is what it was."""
    same = np.ones(old.num_rows, dtype=np.bool_)
    for name in earlier.read:
        if earlier.rehash and name in ADDRESS:
            continue
        if name not in old.column_names or name not in new.column_names:
            return np.zeros(old.num_rows, dtype=np.bool_)
        same &= _equal(old[name], new[name])
    return same


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray) -> NDArray[np.bool_]:
    """(N,) equality in which null equals null, and NaN equals NaN."""
    if left.null_count == len(left) and right.null_count == len(right):
        return np.ones(len(left), dtype=np.bool_)
    pairs = zip(left.to_pylist(), right.to_pylist(), strict=True)
    return np.array([a == b or (a != a and b != b) for a, b in pairs], dtype=np.bool_)


def _same_images(earlier: Earlier, old: pa.Table, new: pa.Table, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(N,) whether a row's image is the one that the old row was computed from; only `wanted` rows are looked at."""
    same = np.zeros(old.num_rows, dtype=np.bool_)
    rows = np.flatnonzero(wanted)
    hashes = old["content_hash"].to_pylist() if "content_hash" in old.column_names else [None] * old.num_rows
    listed = new["sha256"].to_pylist() if "sha256" in new.column_names else [None] * old.num_rows
    asked = []
    for row in rows:
        if hashes[row] and listed[row] and not earlier.rehash:
            same[row] = str(listed[row]).lower().startswith(str(hashes[row]))
        else:
            asked.append(row)
    if not asked:
        return same
    some = new.take(np.array(asked))
    if earlier.rehash and "content_hash" in old.column_names:
        found: Sequence[Any] = _hashes(some).tolist()
        same[asked] = [a is not None and a == hashes[row] for a, row in zip(found, asked, strict=True)]
    elif STAMP in old.column_names and not earlier.rehash:
        stamps, before = _stamps(some), old[STAMP].to_pylist()
        same[asked] = [a is not None and a == before[row] for a, row in zip(stamps, asked, strict=True)]
    return same


def _addresses(table: pa.Table) -> list[tuple[str, Any]]:
    return list(zip(table["image_uri"].to_pylist(), table["bearing_uri"].to_pylist(), strict=True))


def _stamps(table: pa.Table) -> list[str | None]:
    return image_stamps(_addresses(table), list_folders=True)


def _hashes(table: pa.Table) -> NDArray[np.object_]:
    """(N,) content hash of each row's image, None where it cannot be read; on Ray's CPUs where Ray runs."""
    addresses = _addresses(table)
    chunks = [addresses[i : i + ROWS_PER_HASHING] for i in range(0, len(addresses), ROWS_PER_HASHING)]
    results = map(hash_images, chunks)
    if len(chunks) > 1:
        import ray

        if ray.is_initialized():
            remote = ray.remote(hash_images)
            results = iter(ray.get([remote.remote(chunk) for chunk in chunks]))
    found = [one for chunk in results for one in chunk]
    column = np.empty(len(found), dtype=object)
    column[:] = found
    return column


def hash_images(addresses: Sequence[tuple[str, Any]]) -> list[str | None]:
    """Content hash of each image, None where it cannot be read."""
    from hedwig.panorama.decode import content_hash
    from hedwig.sources import ImageReader

    uris, bearings = np.empty(len(addresses), dtype=object), np.empty(len(addresses), dtype=object)
    for row, (uri, several) in enumerate(addresses):
        uris[row], bearings[row] = uri, several
    read = ImageReader()({"image_uri": uris, "bearing_uri": bearings})
    return [
        None if failure is not None else content_hash(image)
        for image, failure in zip(read["image_bytes"], read["failure"], strict=True)
    ]
