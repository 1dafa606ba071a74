"""The captions that panoramas are to be made of, from a captions table or from anybody's file with a caption column.

Rows that may not ask are left out and counted: those of a held-out split, buffers and queries, and panoramas that were
themselves made. Rows that are wrong stay, with their `fault`, so that they end up in the rejected rows like any others.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from hedwig import storage
from hedwig.schema import PANORAMAS, PROJECTIONS, SPLITS, check_columns
from hedwig.sources.listing import SYNONYMS
from hedwig.sources.synthesised import is_synthesised

__all__ = ["Asked", "read_asked"]

logger = logging.getLogger(__name__)

TEXT = ("pano_id", "caption", "country", "sequence", "split", "image_uri", "source", "projection")
NUMBERS = ("lat", "lon", "heading")


@dataclass(frozen=True)
class Asked:
    """The rows that ask for panoramas.

    Attributes:
        table: the panorama columns, `caption`, `fault` (null, or why the row is wrong), and `projection_known`; where
            that is false, `projection` is a guess that the image may prove wrong.
        digest: of the file or table that they were read from.
        left_out: why -> how many rows may not ask.
        split_unknown: rows that ask and name no split: nobody knows whether they are held out elsewhere.
    """

    table: pa.Table
    digest: str
    left_out: dict[str, int]
    split_unknown: int = 0


def read_asked(source: str) -> Asked:
    """Read the captions of `source`, a captions table (folder) or a .csv, .tsv or .parquet file.

    Raises:
        FileNotFoundError: nothing is there.
        SchemaError: there is no column `caption`.
        ValueError: no row may ask, or the file cannot be read.
    """
    if not storage.exists(source):
        raise FileNotFoundError(f"No captions at {source!r}; give a captions table, or a file with a column 'caption'.")
    if storage.is_folder(source):
        table = storage.read_table(source)
        check_columns(table.column_names, ("pano_id", "caption"), where=f"The table {source}")
        there = [name for name in (*PANORAMAS.names, "caption") if name in table.column_names]
        rows = table.select(there).to_pylist()
        finished = storage.read_manifest(source) is not None
        digest = storage.manifest_digest(source) if finished else _digest(storage.list_files(source, suffix=".parquet"))
    else:
        rows, digest = _read_file(source), _digest([source])
    kept, left_out, seen = [], Counter[str](), set[str]()
    for row in rows:
        reason = _may_not_ask(row)
        if reason is not None:
            left_out[reason] += 1
            continue
        fault = _fault(row)
        if row["pano_id"] in seen:
            fault = f"duplicate pano_id: {row['pano_id']!r}"
            row["pano_id"] = f"{row['pano_id']}#{len(seen)}"
        seen.add(row["pano_id"])
        if fault is not None:
            row.update(lat=None, lon=None)
        kept.append({**row, "fault": fault})
    if not kept:
        raise ValueError(
            f"None of the {len(rows)} rows of {source} may be made into panoramas ({dict(left_out)}); only training "
            "rows, and captions without a split, may."
        )
    schema = PANORAMAS.append(pa.field("caption", pa.string())).append(pa.field("fault", pa.string()))
    schema = schema.append(pa.field("projection_known", pa.bool_()))
    split_unknown = sum(row.get("split") is None for row in kept)
    if split_unknown:
        logger.warning(
            "%s: %d of %d rows that ask name no split; if their places are held out elsewhere, what is made of them "
            "leaks. Add a column 'split'.", source, split_unknown, len(kept),
        )  # fmt: skip
    guessed = {row["pano_id"] for row in kept if row.get("projection") is None}
    # What a file leaves out is found out or made later; what the schema requires is filled in.
    filled = [{"image_uri": "", **row, "projection": row.get("projection") or "equirectangular"} for row in kept]
    for row in filled:
        row["projection_known"] = row["pano_id"] not in guessed
        row["split"], row["image_uri"] = row.get("split") or "train", row["image_uri"] or ""
    return Asked(pa.Table.from_pylist(filled, schema=schema), digest, dict(left_out), split_unknown)


def _digest(files: list[str]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(storage.read_bytes(f)).digest() for f in files)).hexdigest()


def _may_not_ask(row: dict[str, Any]) -> str | None:
    split = row.get("split")
    if split is not None and split in SPLITS and split != "train":
        return f"split {split}"
    return "made panorama" if is_synthesised(row.get("source")) else None


def _fault(row: dict[str, Any]) -> str | None:
    """Why a row is wrong, or None; the part before ':' is the reason's name."""
    lat, lon = row.get("lat"), row.get("lon")
    if (lat is None) != (lon is None):
        return f"only one of lat and lon is given: lat={lat}, lon={lon}"
    if lat is not None and lon is not None and not (-90 <= lat <= 90 and -180 <= lon <= 180):
        return f"position out of range: lat={lat}, lon={lon}"
    if row.get("split") not in (None, "train"):
        return f"unknown split: {row['split']!r}, must be one of {', '.join(SPLITS)}"
    if row.get("projection") is not None and row["projection"] not in PROJECTIONS:
        return f"unknown projection: {row['projection']!r}, must be one of {', '.join(PROJECTIONS)}"
    if not (row.get("caption") or "").strip():
        return "no caption"
    return None


def _read_file(path: str) -> list[dict[str, Any]]:
    """The rows of a file; an id is made of the caption and the row's number where there is none."""
    data = storage.read_bytes(path)
    try:
        if path.lower().endswith(".parquet"):
            frame = pd.read_parquet(io.BytesIO(data))
        elif path.lower().endswith((".csv", ".tsv")):
            separator = "\t" if path.lower().endswith(".tsv") else ","
            frame = pd.read_csv(
                io.BytesIO(data), dtype=str, sep=separator, keep_default_na=False, skipinitialspace=True
            )
        else:
            raise ValueError("it is neither .csv, .tsv, .parquet nor a folder")
    except (ValueError, OSError) as error:
        raise ValueError(f"The captions {path} cannot be read: {error}") from error
    frame = frame.rename(columns={name: str(name).strip().lower() for name in frame.columns})
    frame = frame.rename(columns={k: v for k, v in SYNONYMS.items() if k in frame.columns and v not in frame.columns})
    check_columns(map(str, frame.columns), ("caption",), where=f"The captions {path}")
    numbers = {n: pd.to_numeric(frame[n].replace("", None), errors="coerce") for n in NUMBERS if n in frame}
    rows = []
    for index, record in enumerate(frame.to_dict("records")):
        row: dict[str, Any] = {n: _text(record[n]) for n in TEXT if n in record}
        for name, values in numbers.items():
            value = float(values.iloc[index])
            row[name] = value if np.isfinite(value) else None
        if row.get("image_uri"):
            row["image_uri"] = storage.resolve(row["image_uri"], os.path.dirname(path))
        if row.get("pano_id") is None:
            row["pano_id"] = hashlib.sha256(f"{index}:{row['caption']}".encode()).hexdigest()[:22]
        rows.append(row)
    return rows


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    return str(value).strip() or None
