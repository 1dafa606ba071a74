"""Read a panorama listing: CSV, Parquet or GeoParquet, as users have them, into named and typed columns.

Only the columns that hedwig knows are kept; common synonyms are renamed, and everything else in the file (captions,
file names with coordinates in them, passwords) stays there. What is wrong with single rows is not decided here but in
`hedwig.sources.table`.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd

from hedwig.schema import check_columns
from hedwig.storage import exists, is_folder, is_remote, list_files, read_bytes, resolve

__all__ = ["read_listing"]

# What says which panorama it is and where it comes from; passed through as it is.
KEPT = ("pano_id", "captured_at", "country", "sequence", "source", "licence", "author", "sha256", "made_from")
TEXT = (*KEPT, "projection", "split", "image_uri")
NUMBERS = ("lat", "lon", "heading", "fov_deg")
SYNONYMS = {
    "latitude": "lat",
    "lng": "lon",
    "long": "lon",
    "longitude": "lon",
    "compass_angle": "heading",
    "bearing": "heading",
    "license": "licence",
    "path": "image_uri",
    "image": "image_uri",
    "uri": "image_uri",
}
MAX_CSV_BYTES = 4 * 1024**3


def read_listing(path: str) -> pd.DataFrame:
    """The listing at `path` (local, s3:// or gs://; a folder means all its Parquet files).

    Returns:
        One row per row of the file, in its order, with the text columns as str or None and ``lat, lon, heading,
        fov_deg`` as float64 (NaN where empty or not a number; the text that was there is kept in ``<column>_text``).

    Raises:
        FileNotFoundError: nothing is there.
        SchemaError: the file has no ``image_uri`` column, or no position columns.
        ValueError: the file is of another type, or cannot be read.
    """
    path = resolve(path)
    if not exists(path):
        raise FileNotFoundError(f"No panorama listing at {path!r}; give a .csv, .parquet or .geoparquet file.")
    frame = _read(path)
    known = (*TEXT, *NUMBERS)
    lower = {str(name): str(name).strip().lower() for name in frame.columns}
    frame = frame.rename(columns=lower)
    frame = frame.rename(columns={k: v for k, v in SYNONYMS.items() if k in frame.columns and v not in frame.columns})
    check_columns(map(str, frame.columns), ("image_uri", "lat", "lon"), where=f"The listing {path}")
    return _typed(frame[[name for name in frame.columns if name in known]])


def _read(path: str) -> pd.DataFrame:
    if not is_remote(path) and not path.lower().endswith((".csv", ".parquet", ".geoparquet", ".tsv")):
        files = list_files(path, suffix=".parquet") if is_folder(path) else []
        if not files:
            raise ValueError(
                f"The listing {path!r} is neither .csv, .tsv, .parquet, .geoparquet nor a folder of Parquet."
            )
        return pd.concat([_read(file) for file in files], ignore_index=True)
    data = read_bytes(path)
    try:
        if path.lower().endswith((".parquet", ".geoparquet")):
            import pyarrow.parquet as pq

            table = pq.read_table(io.BytesIO(data))
            frame: pd.DataFrame = table.drop_columns([n for n in table.column_names if n == "geometry"]).to_pandas()
            if "geometry" in table.column_names and not {"lat", "latitude"} & set(map(str.lower, table.column_names)):
                frame = _positions_from_geometry(frame, table.column("geometry").to_pylist())
            return frame
        separator = "\t" if path.lower().endswith(".tsv") else ","
        return pd.read_csv(io.BytesIO(data), dtype=str, sep=separator, keep_default_na=False, skipinitialspace=True)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The listing {path} cannot be read: {error}") from error


def _positions_from_geometry(frame: pd.DataFrame, geometry: list[Any]) -> pd.DataFrame:
    import shapely

    points = shapely.from_wkb([g if isinstance(g, bytes) else None for g in geometry])
    return frame.assign(lat=shapely.get_y(points), lon=shapely.get_x(points))


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    for name in TEXT:
        if name in frame:
            columns[name] = _texts(frame[name].tolist())
        else:
            columns[name] = _texts([None] * len(frame))
    for name in NUMBERS:
        raw = frame[name] if name in frame else pd.Series([None] * len(frame), dtype=object)
        columns[name] = pd.to_numeric(raw.replace("", None), errors="coerce").to_numpy(dtype=np.float64)
        columns[f"{name}_text"] = _texts(raw.tolist())
    return pd.DataFrame(columns)


def _texts(values: list[Any]) -> pd.Series[Any]:
    """A column of str and None; pandas' own string type would turn None into NaN."""
    return pd.Series([_text(value) for value in values], dtype=object)


def _text(value: Any) -> str | None:
    if value is None or value is pd.NaT or (isinstance(value, float) and np.isnan(value)):
        return None
    text = str(value).strip()
    return text or None
