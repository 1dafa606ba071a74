"""Truth and predictions as one table, one row per query; whatever cannot be joined is an error that names it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hedwig.geo import haversine_km

__all__ = ["join_predictions", "padded_cells"]


def join_predictions(truth: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """One row per query, sorted by pano_id: the truth, and the prediction as ``pred_lat, pred_lon, error_km, …``.

    Raises:
        ValueError: queries without a position or a prediction, ids that occur twice, or no queries at all.
    """
    for name, table in (("truth", truth), ("predictions", predictions)):
        if num_double := int(table["pano_id"].duplicated().sum()):
            raise ValueError(f"{num_double} pano_id occur more than once in the {name}; they cannot be joined.")
    if truth.empty:
        raise ValueError("There are no queries to evaluate; is there a test split with positions?")
    if num_lost := int(truth[["lat", "lon"]].isna().any(axis=1).sum()):
        raise ValueError(f"{num_lost} of {len(truth)} queries have no position; take them out of the truth.")
    missing = truth.loc[~truth["pano_id"].isin(predictions["pano_id"]), "pano_id"]
    if len(missing):
        raise ValueError(
            f"{len(missing)} of {len(truth)} queries have no prediction, such as {missing.iloc[0]!r}; "
            "run `hedwig predict` for the whole split."
        )
    renamed = predictions.rename(columns={"lat": "pred_lat", "lon": "pred_lon"})
    known = truth[[c for c in ("pano_id", "lat", "lon", "country") if c in truth.columns]]
    overlap = [c for c in renamed.columns if c in known.columns and c != "pano_id"]
    joined = known.merge(renamed.drop(columns=overlap), on="pano_id", validate="one_to_one")
    joined = joined.sort_values("pano_id", ignore_index=True)
    joined["error_km"] = haversine_km(joined["lat"], joined["lon"], joined["pred_lat"], joined["pred_lon"])
    return joined


def padded_cells(cell_ids: pd.Series[Any], num_cells: int) -> NDArray[np.int64]:
    """Lists of any length as (Q, K) with -1 behind the shorter ones."""
    lists = [np.asarray(row, dtype=np.int64) for row in cell_ids]
    if empty := sum(len(row) == 0 for row in lists):
        raise ValueError(f"{empty} predictions name no cell; they are not predictions of this version.")
    padded = np.full((len(lists), max(len(row) for row in lists)), -1, dtype=np.int64)
    for i, row in enumerate(lists):
        padded[i, : len(row)] = row
    if padded.max() >= num_cells:
        raise ValueError(
            f"Predictions name cell {padded.max()} but there are {num_cells} geocells: they were made with other "
            "geocells; run `hedwig predict` again."
        )
    return padded
