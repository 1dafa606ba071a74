"""Positions from a table as people keep them: CSV or Parquet, named columns or two bare ones, comma or blanks between.

A listing of panoramas is read by `hedwig.sources`; this is for bare points, such as the two columns without a header in
which street-view positions are passed around. Without names the first column is latitude.
"""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hedwig import storage

__all__ = ["read_points"]

Floats = NDArray[np.float64]

LAT_NAMES = ("lat", "latitude", "y")
LON_NAMES = ("lon", "lng", "long", "longitude", "x")


def read_points(path: str) -> tuple[Floats, Floats, int]:
    """Latitudes (N,) and longitudes (N,) in degrees, and how many rows were left out because they have no position.

    Args:
        path: .csv, .txt, .tsv or .parquet; local, ``s3://`` or ``gs://``.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no two columns of positions, text among the numbers, or no row with a position.
    """
    path = storage.resolve(path)
    if not storage.exists(path):
        raise FileNotFoundError(f"No points at {path!r}; give a CSV or Parquet file with lat and lon.")
    if path.lower().endswith((".parquet", ".pq")):
        table = pq.read_table(io.BytesIO(storage.read_bytes(path))).to_pandas()
        columns = _columns(table.columns.tolist(), path)
        table = table[list(columns)]
    else:
        table = _read_text(path)
    values = table.to_numpy(dtype=np.float64)
    known = np.isfinite(values).all(axis=1)
    if not known.any():
        raise ValueError(f"{path} has {len(values)} rows and no position in any of them.")
    lat, lon = values[known].T
    outside = np.flatnonzero((np.abs(lat) > 90) | (np.abs(lon) > 360))
    if len(outside):
        first = int(outside[0])
        raise ValueError(
            f"{len(outside)} of {len(lat)} rows of {path} are not positions, first lat={lat[first]}, lon={lon[first]}; "
            "latitude comes first where columns have no names."
        )
    return lat.copy(), lon.copy(), int((~known).sum())


def _read_text(path: str) -> pd.DataFrame:
    raw = storage.read_bytes(path)
    first = raw.split(b"\n", 1)[0].decode("utf-8-sig", errors="replace").strip()
    if not first:
        raise ValueError(f"{path} is empty or begins with an empty line; give lat and lon, one position a line.")
    separator = next((mark for mark in (",", ";", "\t") if mark in first), r"\s+")
    cells = [cell.strip().strip('"') for cell in (first.split() if separator == r"\s+" else first.split(separator))]
    named = not all(_is_number(cell) for cell in cells[:2])
    use = list(_columns(cells, path)) if named else [0, 1]
    if not named and len(cells) < 2:
        raise ValueError(f"{path} has one column; give lat and lon, separated by a comma or a blank.")
    try:
        table = pd.read_csv(
            io.BytesIO(raw), sep=separator, header=0 if named else None, usecols=use, skipinitialspace=True,
            encoding="utf-8-sig",
        )  # fmt: skip
        numbers: pd.DataFrame = table[use].apply(pd.to_numeric)
        return numbers
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as positions: {error}") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _columns(names: list[str], path: str) -> tuple[str, str]:
    """The names of the columns of latitude and longitude as the file spells them."""
    by_lower = {str(name).strip().lower(): name for name in reversed(names)}
    found = [next((by_lower[name] for name in known if name in by_lower), None) for known in (LAT_NAMES, LON_NAMES)]
    if found[0] is None or found[1] is None:
        raise ValueError(f"{path} has no columns lat and lon; it has {names}. Rename them.")
    return found[0], found[1]
