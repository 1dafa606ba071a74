"""From evidence to predictions: what the calibration makes of it, and the names and places of what was found.

The answer itself is settled in the evidence; here it gets its radius, its confidence, its regions and the flag of
abstention, and whatever else was asked for is listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hedwig.retrieve.calibration import region_cells
from hedwig.retrieve.evidence import entropy_bits
from hedwig.retrieve.prediction import Posterior, Prediction

if TYPE_CHECKING:
    from hedwig.retrieve.evidence import Evidence
    from hedwig.retrieve.retriever import Retriever

__all__ = ["neighbours_of", "predictions_of"]


def predictions_of(
    retriever: Retriever,
    found: Evidence,
    pano_ids: Sequence[str],
    *,
    top_k: int | None = None,
    regions: bool = False,
    posterior_above: float | None = None,
) -> list[Prediction]:
    """One prediction for each of B queries.

    Args:
        retriever: that found it.
        found: the evidence.
        pano_ids: (B,) names of the queries.
        top_k: as in `Retriever.retrieve`.
        regions: list the cells of the 50 % and 90 % regions, where those were calibrated.
        posterior_above: list all cells of at least this probability; None lists none.
    """
    known, num_rows = retriever.calibration, len(pano_ids)
    if known.confidence_weights is None:
        confidence = np.where(found.cells == found.cell[:, None], found.mass, 0.0).sum(axis=1)
    else:
        confidence = known.confidence(found.features(known.confidence_km))
    half, most = (
        [()] * num_rows if level is None or not regions else region_cells(found.log_posterior, level)
        for level in (known.region_50_level, known.region_90_level)
    )
    entropy = entropy_bits(found.log_posterior).tolist()
    index, half_scale, floor = retriever.index, known.radius_50_scale, retriever.abstain_below
    predictions = []
    for b, name in enumerate(pano_ids):
        considered: Any = np.flatnonzero(found.cells[b] >= 0) if top_k is None else slice(top_k)
        rows = found.rows[b, : retriever.num_neighbours if top_k is None else top_k]
        near, cells = rows[rows >= 0], found.order[b, considered]
        spread_km = float(found.spread_km[b])
        predictions.append(
            Prediction(
                pano_id=str(name),
                lat=float(found.lat[b]),
                lon=float(found.lon[b]),
                cell_ids=tuple(cells.tolist()),
                cell_probs=tuple(np.exp(found.log_probs[b, considered]).tolist()),
                neighbour_ids=tuple(index.pano_ids[near].tolist()),
                neighbour_scores=tuple(found.scores[b, : len(near)].tolist()),
                neighbour_lat=tuple(index.lat[near].tolist()),
                neighbour_lon=tuple(index.lon[near].tolist()),
                radius_km=retriever.radius_scale * spread_km,
                confidence=float(confidence[b]),
                radius_50_km=None if half_scale is None else half_scale * spread_km,
                localisable=floor is None or bool(confidence[b] >= floor),
                region_50=half[b],
                region_90=most[b],
                cell_lat=tuple(retriever.cell_lat[cells].tolist()),
                cell_lon=tuple(retriever.cell_lon[cells].tolist()),
                entropy_bits=entropy[b],
                posterior=None if posterior_above is None else _posterior(found, b, posterior_above),
                cell_id=int(found.cell[b]),
            )
        )
    return predictions


def neighbours_of(
    retriever: Retriever, cells: NDArray[np.int64], rows: NDArray[np.int64], scores: NDArray[np.float64]
) -> dict[str, list[Any]]:
    """Names, places and scores of what `Retriever.neighbours` found, as lists for each query; -1 ends a row."""
    index = retriever.index
    columns = {
        "neighbour_ids": index.pano_ids[rows].tolist(),
        "neighbour_scores": scores.tolist(),
        "neighbour_lat": index.lat[rows].tolist(),
        "neighbour_lon": index.lon[rows].tolist(),
    }
    if (rows < 0).any():
        counts = (rows >= 0).sum(axis=1).tolist()
        columns = {name: [line[:n] for line, n in zip(c, counts, strict=True)] for name, c in columns.items()}
    return {"cell_ids": cells.tolist(), **columns}


def _posterior(found: Evidence, b: int, least: float) -> Posterior:
    probs = np.exp(found.log_posterior[b])
    cells = np.flatnonzero(probs >= least)
    cells = cells[np.argsort(-probs[cells], kind="stable")]
    return Posterior(tuple(cells.tolist()), tuple(probs[cells].tolist()))
