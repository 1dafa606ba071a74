"""Build the retriever's files from embeddings: the index of training rows, and what validation rows teach.

What is written is what `load_retriever` opens: the index (see `hedwig.index`) and ``calibration.json``, and where
they are asked for ``whitening.safetensors`` and ``prototypes.safetensors``. The index is checked before it is kept: a
sample of training rows, asked as queries, must find themselves at 0 km. Where the score is tuned, every second
validation row (by name) tunes and the others calibrate: nothing is calibrated on what it was chosen by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hedwig.geo import haversine_km
from hedwig.geocells import Geocells
from hedwig.index import GeocellIndex
from hedwig.models.geolocator import Geolocator
from hedwig.retrieve.calibration import (
    CALIBRATION_FILE,
    LEAST_CONFIDENCE_ROWS,
    Calibration,
    conformal_quantile,
    fit_confidence,
    fit_radius_scale,
    mass_before,
)
from hedwig.retrieve.halves import in_halves
from hedwig.retrieve.prototypes import Prototypes
from hedwig.retrieve.retriever import Retriever
from hedwig.retrieve.tuning import tune_score
from hedwig.retrieve.whitening import Whitening

__all__ = ["build_index"]

LEAST_SELF_RETRIEVAL = 0.9  # equal pictures at different places find each other; more than that is a slip of rows
LEAST_TUNING_ROWS = 20
MAX_TUNING_ROWS = 4096  # evenly spaced; a score out of eight needs no more
_BATCH = 4096

Rows = Mapping[str, NDArray[Any]]
Ints = NDArray[np.int64]


def build_index(
    rows: Rows,
    cells: Geocells,
    head: Path,
    target: Path,
    *,
    embedding: Literal["projected", "image", "whitened"],
    codec: Literal["fp16", "fp32", "sq8", "pq"],
    retrieve: Mapping[str, Any],
    each_frame: bool = False,
    whiten_dim: int | None = None,
    whiten_shrinkage: float | None = None,
    prototype_min_samples: int = 3,
    prototype_xi: float = 0.15,
    tune: bool = False,
    tune_for: Literal["geoscore", "median"] = "geoscore",
    confidence_km: float = 200.0,
) -> dict[str, Any]:
    """Write the index and its calibration into `target`.

    Args:
        rows: ``pano_id, lat, lon, split``, ``image_embedding`` (N, Di) and ``text_embedding`` (N, Dt) of the training
            and validation panoramas (others are ignored); ``frame_embeddings`` (N, V·Di) where frames are pooled or
            compared.
        cells: the geocells.
        head: folder of the trained geolocator.
        target: local folder to write into.
        embedding: what to index: the head's projection, the image embedding as it is, or that one whitened.
        codec: how the vectors are kept, see `GeocellIndex.build`.
        retrieve: keyword arguments of `Retriever` that the calibration is for; of the score's two, a value that is
            not None wins over tuning.
        each_frame: index every frame's vector (max_sim); `embedding` must not be "projected".
        whiten_dim: axes that whitening keeps; None for all.
        whiten_shrinkage: see `Whitening.fit`.
        prototype_min_samples: see `Prototypes.build`; they are built where `retrieve` refines by them.
        prototype_xi: likewise.
        tune: choose the score by grid; needs 40 validation rows, with fewer it stays as it is.
        tune_for: see `tune_score`.
        confidence_km: confidence is the probability that the answer is within this distance.

    Returns:
        ``num_vectors, self_retrieval, radius_scale, num_calibration, num_tuning, score_temperature, log_prob_weight``.

    Raises:
        ValueError: there are no training rows, or they do not find themselves: vectors and names have slipped; or
            frames are to be indexed as projections.
    """
    if each_frame and embedding == "projected":
        raise ValueError(
            f"index.embedding is {embedding!r}, and max_sim compares the frames' own vectors, which have no "
            "projection; set index.embedding=image."
        )
    geolocator = in_halves(Geolocator.load(head))
    train = rows["split"] == "train"
    if not train.any():
        raise ValueError("No training panorama was embedded; there is nothing to search in.")
    vectors = _vectors(geolocator, rows, train, "projected" if embedding == "projected" else "image", each_frame)
    lat, lon, names = rows["lat"][train], rows["lon"][train], rows["pano_id"][train]
    whitening = None
    if embedding == "whitened":
        by_name = np.argsort(names.astype(str), kind="stable")  # the same references, the same numbers
        whitening = Whitening.fit(vectors[by_name], dim=whiten_dim, shrinkage=whiten_shrinkage)
        vectors = whitening(vectors)
    members = cells.assign(lat, lon)
    index = GeocellIndex.build(vectors, members, names, lat, lon, num_cells=len(cells.table), codec=codec)
    share = _self_retrieval(index, vectors, members, lat, lon)
    index.save(target)
    if whitening is not None:
        whitening.save(target)
    prototypes = None
    if retrieve.get("refine") == "prototype":
        prototypes = Prototypes.build(index, min_samples=prototype_min_samples, xi=prototype_xi)
        prototypes.save(target)
    table = cells.table
    retriever = Retriever(
        geolocator,
        index,
        table["lat"],
        table["lon"],
        cell_radius_km=table["radius_km"],
        embedding=embedding,
        whitening=whitening,
        prototypes=prototypes,
        **{**retrieve, "radius_scale": 1.0},
    )
    val = np.flatnonzero((rows["split"] == "val") & np.isfinite(rows["lat"]))
    val = val[np.argsort(rows["pano_id"][val].astype(str), kind="stable")]
    grid: list[dict[str, Any]] = []
    tuning = val[:0]
    if tune and len(val) >= 2 * LEAST_TUNING_ROWS:
        tuning, val = val[::2], val[1::2]
        tuning = tuning[:: -(-len(tuning) // MAX_TUNING_ROWS)]
        queries, logits = _asked(retriever, rows, tuning)
        retriever, grid = tune_score(
            retriever,
            queries,
            logits,
            rows["lat"][tuning],
            rows["lon"][tuning],
            tune_for=tune_for,
            score_temperature=retrieve.get("score_temperature"),
            log_prob_weight=retrieve.get("log_prob_weight"),
        )
    calibration = _calibrated(retriever, rows, val, cells, confidence_km)
    about = {"coverage": 0.9, "num_calibration": len(val), "num_tuning": len(tuning) if grid else 0}
    more = {"tune_for": tune_for, "tuning": grid} if grid else {}
    calibration.save(target / CALIBRATION_FILE, {**about, **more})
    return {
        "num_vectors": len(vectors),
        "self_retrieval": share,
        "radius_scale": calibration.radius_scale,
        "num_calibration": about["num_calibration"],
        "num_tuning": about["num_tuning"],
        "score_temperature": calibration.score_temperature,
        "log_prob_weight": calibration.log_prob_weight,
    }


def _self_retrieval(
    index: GeocellIndex, vectors: NDArray[np.float32], members: NDArray[np.int32], lat: Any, lon: Any
) -> float:
    """Share of a sample of references that, asked as queries, find themselves or one at the same place."""
    found, _ = index.search_rows(vectors[:_BATCH], members[:_BATCH, None], 1)
    error_km = haversine_km(lat[:_BATCH], lon[:_BATCH], index.lat[found[:, 0]], index.lon[found[:, 0]])
    share = float((error_km < 1e-6).mean())
    twins = 1 - len(np.unique(vectors.round(3).reshape(len(vectors), -1), axis=0)) / len(vectors)
    if share < LEAST_SELF_RETRIEVAL - twins:
        raise ValueError(
            f"Only {share:.1%} of the training rows find themselves in the index: vectors and names have slipped. "
            "Delete embeddings/ and geolocator/ and run again; please report this."
        )
    return share


def _calibrated(retriever: Retriever, rows: Rows, val: Ints, cells: Geocells, confidence_km: float) -> Calibration:
    """What the validation rows teach of this retriever; only its score where there are none."""
    untaught = Calibration(
        confidence_km=confidence_km,
        score_temperature=retriever.score_temperature,
        log_prob_weight=retriever.log_prob_weight,
    )
    if len(val) == 0:
        return untaught
    spread, error, features, before = [], [], [], []
    for some in _batches(val):
        found = retriever.evidence(*_asked(retriever, rows, some))
        lat, lon = rows["lat"][some], rows["lon"][some]
        spread.append(found.spread_km)
        error.append(haversine_km(lat, lon, found.lat, found.lon))
        features.append(found.features(confidence_km))
        before.append(mass_before(found.log_posterior, cells.assign(lat, lon)))
    spread_km, error_km = np.concatenate(spread), np.concatenate(error)
    weights = None
    if len(val) >= LEAST_CONFIDENCE_ROWS:
        weights = fit_confidence(np.concatenate(features), error_km <= confidence_km)
    return replace(
        untaught,
        radius_scale=fit_radius_scale(spread_km, error_km),
        radius_50_scale=fit_radius_scale(spread_km, error_km, 0.5),
        region_90_level=conformal_quantile(np.concatenate(before), 0.9),
        region_50_level=conformal_quantile(np.concatenate(before), 0.5),
        confidence_weights=weights,
    )


def _asked(retriever: Retriever, rows: Rows, chosen: Ints) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Queries and logits of the chosen rows."""
    frames = rows["frame_embeddings"][chosen] if "frame_embeddings" in rows else None
    return retriever.encode(rows["image_embedding"][chosen], rows["text_embedding"][chosen], frames=frames)


def _batches(chosen: Ints) -> Iterator[Ints]:
    for start in range(0, len(chosen), _BATCH):
        yield chosen[start : start + _BATCH]


def _vectors(
    geolocator: Geolocator,
    rows: Mapping[str, NDArray[Any]],
    chosen: NDArray[np.bool_],
    embedding: str,
    each_frame: bool,
) -> NDArray[np.float32]:
    """What is indexed of the chosen rows: (n, D), or (n, V, D) for every frame."""
    num_frames = geolocator.config.num_frames
    image, text = rows["image_embedding"][chosen], rows["text_embedding"][chosen]
    if each_frame or num_frames:
        frames = rows["frame_embeddings"][chosen].reshape(len(image), -1, image.shape[1])
        image = frames if num_frames else image
    if embedding == "image" and not num_frames:
        return np.asarray(frames if each_frame else image, dtype=np.float32)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(image), _BATCH):
            batch = torch.tensor(image[start : start + _BATCH])
            if embedding == "image":
                vectors = geolocator.pool(batch)
            else:
                vectors = geolocator(batch, torch.tensor(text[start : start + _BATCH]))[0]
            parts.append(vectors.float().numpy())
    return np.concatenate(parts)
