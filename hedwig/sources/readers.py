"""What every reader of a foreign data set gives: the columns of a listing, and what stood in the number columns.

A reader translates names and units and finds the image files; it judges nothing. Its table goes through `listing_frame`
into `hedwig.sources.check_listing`, which keeps or rejects row by row, so that a faulty position in somebody's CSV is
rejected with its text and not read as "no position". A row whose image is not there has no ``image_uri``, and is
rejected by that name: the list of what remains to be fetched.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from hedwig import storage
from hedwig.schema import SchemaError, check_columns
from hedwig.sources.listing import NUMBERS, TEXT

__all__ = ["IMAGE_SUFFIXES", "LISTING", "images_by_name", "listing_frame", "listing_table", "read_csv"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

LISTING = pa.schema(
    [pa.field(name, pa.string()) for name in TEXT]
    + [pa.field(name, pa.float64()) for name in NUMBERS]
    # What stood there, to tell "not a number" from "nothing".
    + [pa.field(f"{name}_text", pa.string()) for name in NUMBERS]
)


def listing_table(columns: Mapping[str, Iterable[Any]], num_rows: int) -> pa.Table:
    """A table of `LISTING` from columns of anything; absent ones become null, empty texts too.

    Args:
        columns: name to (N,) values; ``lat, lon, heading, fov_deg`` as numbers or as texts.
        num_rows: N.

    Raises:
        ValueError: a column that a listing does not have, or of another length.
    """
    unknown = [name for name in columns if name not in LISTING.names]
    if unknown:
        raise ValueError(f"A listing has no column {', '.join(unknown)}; it has {', '.join(LISTING.names)}.")
    arrays: dict[str, Any] = {}
    for name in TEXT:
        arrays[name] = [_text(value) for value in columns.get(name, [None] * num_rows)]
    for name in NUMBERS:
        texts = [_text(value) for value in columns.get(name, [None] * num_rows)]
        numbers = pd.to_numeric(pd.Series(texts, dtype=object), errors="coerce").to_numpy(dtype=np.float64)
        arrays[name] = pa.array(numbers, from_pandas=True)
        arrays[f"{name}_text"] = texts
    lengths = {name: len(values) for name, values in arrays.items() if len(values) != num_rows}
    if lengths:
        raise ValueError(f"The columns of a listing of {num_rows} rows have other lengths: {lengths}.")
    return pa.table(arrays, schema=LISTING)


def listing_frame(table: pa.Table) -> pd.DataFrame:
    """The table as `hedwig.sources.check_listing` takes it: texts or None, numbers with NaN for nothing."""
    columns: dict[str, Any] = {}
    for name in table.column_names:
        values = table[name].to_pylist()
        is_number = name in NUMBERS
        columns[name] = pd.Series(values, dtype=np.float64 if is_number else object)
    return pd.DataFrame(columns)


def read_csv(path: str, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[str]]:
    """Some columns of a CSV file as texts, by lower-case name; absent optional ones are lists of empty texts.

    Raises:
        FileNotFoundError: no such file.
        SchemaError: a needed column is missing.
        ValueError: it cannot be read as CSV.
    """
    path = storage.resolve(path)
    if not storage.exists(path) or storage.is_folder(path):
        raise FileNotFoundError(f"No CSV file at {path!r}.")
    wanted = {*needed, *optional}
    data = storage.read_bytes(path)
    try:
        header = pd.read_csv(io.BytesIO(data), nrows=0, dtype=str)
        names = [name for name in header.columns if str(name).strip().lower() in wanted]
        check_columns([str(name).strip().lower() for name in header.columns], needed, where=path)
        # keep_default_na: NA is the country Namibia.
        frame = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False, usecols=names)
    except SchemaError:
        raise
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error
    columns = {str(name).strip().lower(): [str(value) for value in frame[name].tolist()] for name in frame.columns}
    return {name: columns.get(name, [""] * len(frame)) for name in (*needed, *optional)}


def images_by_name(folder: str) -> dict[str, str]:
    """File name without suffix, to the full path of each image below `folder`; the first in order of path wins."""
    found: dict[str, str] = {}
    for path in storage.list_files(storage.resolve(folder), recursive=True):
        stem, suffix = os.path.splitext(os.path.basename(path))
        if suffix.lower() in IMAGE_SUFFIXES:
            found.setdefault(stem, path)
    return found


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return None
    return str(value).strip() or None
