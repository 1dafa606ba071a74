"""Score two tables of anybody's: where pictures were said to be, and where they are.

CSV, TSV or Parquet with an id, lat and lon under the names that listings use. Every row of both is accounted for: a
row without a usable position, an id that comes twice, a truth that nobody answered and an answer that nobody asked
for are named, and none is dropped in silence. Of an id that comes twice the first row counts. A method that leaves
hard queries out looks better than it is, so the accuracies are also given with every unanswered query as wrong.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hedwig import storage
from hedwig.geo import EARTH_RADIUS_KM, haversine_km
from hedwig.metrics import summarise
from hedwig.schema import SchemaError, check_columns

__all__ = ["join_answered", "read_positions", "score_tables"]

LEVELS_KM = ("1", "25", "200", "750", "2500")
NUM_NAMED = 5  # examples of each fault; the counts are complete
_SYNONYMS = {
    "pano_id": ("pano_id", "id", "panoid", "img_id", "image_id"),
    "lat": ("lat", "latitude"),
    "lon": ("lon", "lng", "long", "longitude"),
}
_SUFFIXES = (".csv", ".tsv", ".parquet", ".geoparquet")


def read_positions(path: str, prefix: str = "") -> pd.DataFrame:
    """The ids and positions of a table (a file, or a folder of Parquet), one row per row of it, in order.

    Args:
        path: local, s3:// or gs://.
        prefix: of the position's columns, used where they are there: with ``pred_`` a table that has both ``lat`` and
            ``pred_lat`` gives the latter.

    Returns:
        ``pano_id`` (object: str, or None where empty), ``lat, lon`` float64 degrees, NaN where there is no number.

    Raises:
        FileNotFoundError: nothing is there.
        SchemaError: no column for the id or the position.
        ValueError: another type of file, or one that cannot be read.
    """
    path = storage.resolve(path)
    if not storage.exists(path):
        raise FileNotFoundError(f"No table at {path!r}; give a .csv, .tsv or .parquet file.")
    frame = _read(path)
    frame = frame.rename(columns={name: str(name).strip().lower() for name in frame.columns})
    have = [str(name) for name in frame.columns]
    column = {}
    for name, synonyms in _SYNONYMS.items():
        found = [s for s in (*(prefix + s for s in synonyms if name != "pano_id"), *synonyms) if s in have]
        check_columns(have if not found else [*have, name], (name,), where=f"The table {path}")
        column[name] = found[0]
    ids = pd.Series([_text(value) for value in frame[column["pano_id"]]], dtype=object)
    places = {
        name: pd.to_numeric(frame[column[name]], errors="coerce").to_numpy(dtype=np.float64) for name in ("lat", "lon")
    }
    return pd.DataFrame({"pano_id": ids, **places})


def score_tables(
    predictions: pd.DataFrame, truth: pd.DataFrame, *, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Scores of the answered queries, and what became of every row.

    Args:
        predictions: ``pano_id, lat, lon`` as `read_positions` gives them.
        truth: the same of the queries.
        num_bootstrap: resamplings of the intervals.
        seed: of the resampling.

    Returns:
        The keys of `hedwig.metrics.summarise` of the answered queries; ``share_answered``;
        ``unanswered_as_wrong`` (``accuracy_at_km`` at 1, 25, 200, 750, 2500 and ``geoscore`` over all queries);
        ``accounting`` {"predictions", "truth"}: ``num_rows, num_used`` and for ``no_id``, ``no_position``,
        ``duplicate``, and ``unknown`` (predictions nobody asked for) or ``missing`` (queries nobody answered) the
        ``num_…`` and the first five ids or, without an id, row numbers from 0; ``earth_radius_km``.

    Raises:
        ValueError: no query was answered.
    """
    joined, accounting = join_answered(predictions, truth)
    summary = summarise(joined["error_km"], num_bootstrap=num_bootstrap, seed=seed)
    num_asked = len(joined) + accounting["truth"]["num_missing"]
    share = len(joined) / num_asked
    return {
        **summary,
        "share_answered": share,
        "unanswered_as_wrong": {
            "num_queries": num_asked,
            "accuracy_at_km": {km: share * summary["accuracy_at_km"][km] for km in LEVELS_KM},
            "geoscore": share * summary["geoscore"],
        },
        "accounting": accounting,
        "earth_radius_km": EARTH_RADIUS_KM,
    }


def join_answered(predictions: pd.DataFrame, truth: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The answered queries as ``pano_id, lat, lon, pred_lat, pred_lon, error_km``, and the accounting of all rows.

    Raises:
        ValueError: no query was answered.
    """
    asked, asked_account = _usable(truth)
    given, given_account = _usable(predictions)
    _count(asked_account, "missing", asked.loc[~asked["pano_id"].isin(given["pano_id"]), "pano_id"].tolist())
    _count(given_account, "unknown", given.loc[~given["pano_id"].isin(asked["pano_id"]), "pano_id"].tolist())
    given = given.rename(columns={"lat": "pred_lat", "lon": "pred_lon"})
    joined = asked.merge(given, on="pano_id", validate="one_to_one")
    asked_account["num_used"] = given_account["num_used"] = len(joined)
    if joined.empty:
        raise ValueError(
            f"None of {len(truth)} queries has an answer among {len(predictions)} predictions: do the ids of the two "
            f"tables match? First ids: {_first(asked)!r} and {_first(given)!r}."
        )
    joined["error_km"] = haversine_km(joined["lat"], joined["lon"], joined["pred_lat"], joined["pred_lon"])
    return joined, {"predictions": given_account, "truth": asked_account}


def _usable(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows with an id and a position, the first of each id; and the account of the others."""
    account: dict[str, Any] = {"num_rows": len(table), "num_used": 0}
    lat, lon = table["lat"].to_numpy(np.float64), table["lon"].to_numpy(np.float64)
    no_id = table["pano_id"].isna().to_numpy()
    # 0..360 is another way to write a longitude, not a fault.
    no_position = ~(np.abs(lat) <= 90) | ~((lon >= -180) & (lon <= 360))
    _count(account, "no_id", np.flatnonzero(no_id).tolist())
    _count(account, "no_position", table.loc[~no_id & no_position, "pano_id"].tolist())
    rest = table[~no_id & ~no_position]
    twice: NDArray[np.bool_] = rest["pano_id"].duplicated().to_numpy()
    _count(account, "duplicate", rest.loc[twice, "pano_id"].tolist())
    return rest[~twice], account


def _count(account: dict[str, Any], fault: str, names: list[Any]) -> None:
    account[f"num_{fault}"], account[fault] = len(names), names[:NUM_NAMED]


def _first(table: pd.DataFrame) -> Any:
    return None if table.empty else table["pano_id"].iloc[0]


def _read(path: str) -> pd.DataFrame:
    if storage.is_folder(path):
        frame: pd.DataFrame = storage.read_table(path, prefix="").to_pandas()
        return frame
    if not path.lower().endswith(_SUFFIXES):
        raise ValueError(f"The table {path!r} is none of {', '.join(_SUFFIXES)} and no folder of Parquet.")
    data = storage.read_bytes(path)
    try:
        if path.lower().endswith(("parquet",)):
            import pyarrow.parquet as pq

            frame = pq.read_table(io.BytesIO(data)).to_pandas()
            return frame
        separator = "\t" if path.lower().endswith(".tsv") else ","
        # Ids are texts: 0042 and 42 are two, and NA is a name.
        return pd.read_csv(io.BytesIO(data), dtype=str, sep=separator, keep_default_na=False, skipinitialspace=True)
    except SchemaError:
        raise
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The table {path} cannot be read: {error}") from error


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    return str(value).strip() or None
