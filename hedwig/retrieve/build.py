"""Build the retriever's files from embeddings: the index of training rows, and the radius that validation rows teach.

What is written is what `load_retriever` opens: ``index.faiss``, ``rows.parquet`` and ``calibration.json``. The index is
checked before it is kept: a sample of training rows, asked as queries, must find themselves at 0 km.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hedwig.geo import haversine_km
from hedwig.geocells import Geocells
from hedwig.index import GeocellIndex
from hedwig.models.geolocator import Geolocator
from hedwig.retrieve.prediction import fit_radius_scale
from hedwig.retrieve.retriever import Retriever

__all__ = ["build_index"]

LEAST_SELF_RETRIEVAL = 0.9  # equal pictures at different places find each other; more than that is a slip of rows
_BATCH = 4096


def build_index(
    rows: Mapping[str, NDArray[Any]],
    cells: Geocells,
    head: Path,
    target: Path,
    *,
    embedding: Literal["projected", "image"],
    storage: Literal["fp16", "fp32"],
    retrieve: Mapping[str, Any],
    each_frame: bool = False,
) -> dict[str, Any]:
    """Write the index and its calibration into `target`.

    Args:
        rows: ``pano_id, lat, lon, split``, ``image_embedding`` (N, Di) and ``text_embedding`` (N, Dt) of the training
            and validation panoramas (others are ignored); ``frame_embeddings`` (N, V·Di) where frames are pooled or
            compared.
        cells: the geocells.
        head: folder of the trained geolocator.
        target: local folder to write into.
        embedding: what to index: the head's projection, or the image embedding as it is.
        storage: bytes per component.
        retrieve: keyword arguments of `Retriever` that the calibration is for.
        each_frame: index every frame's vector (max_sim); `embedding` must be "image".

    Returns:
        ``num_vectors, self_retrieval, radius_scale, num_calibration``.

    Raises:
        ValueError: there are no training rows, or they do not find themselves: vectors and names have slipped; or
            frames are to be indexed as projections.
    """
    if each_frame and embedding != "image":
        raise ValueError(
            f"index.embedding is {embedding!r}, and max_sim compares the frames' own vectors, which have no "
            "projection; set index.embedding=image."
        )
    geolocator = Geolocator.load(head)
    train, val = rows["split"] == "train", (rows["split"] == "val") & np.isfinite(rows["lat"])
    if not train.any():
        raise ValueError("No training panorama was embedded; there is nothing to search in.")
    vectors = _vectors(geolocator, rows, train, embedding, each_frame)
    lat, lon, names = rows["lat"][train], rows["lon"][train], rows["pano_id"][train]
    members = cells.assign(lat, lon)
    num_cells = len(cells.table)
    index = GeocellIndex.build(vectors, members, names, lat, lon, num_cells=num_cells, storage=storage)
    found, _ = index.search(vectors[:_BATCH], members[:_BATCH, None], 1)
    error_km = haversine_km(lat[:_BATCH], lon[:_BATCH], index.lat[found[:, 0]], index.lon[found[:, 0]])
    share = float((error_km < 1e-6).mean())
    twins = 1 - len(np.unique(vectors.round(3).reshape(len(vectors), -1), axis=0)) / len(vectors)
    if share < LEAST_SELF_RETRIEVAL - twins:
        raise ValueError(
            f"Only {share:.1%} of the training rows find themselves in the index: vectors and names have slipped. "
            "Delete embeddings/ and geolocator/ and run again; please report this."
        )
    index.save(target)
    table = cells.table
    retriever = Retriever(
        geolocator,
        index,
        table["lat"],
        table["lon"],
        cell_radius_km=table["radius_km"],
        embedding=embedding,
        **retrieve,
    )
    scale, num_calibration = 1.0, int(val.sum())
    if num_calibration:
        columns = (rows["image_embedding"][val], rows["text_embedding"][val], rows["pano_id"][val])
        frames = rows["frame_embeddings"][val] if "frame_embeddings" in rows else None
        answers = retriever.predict(*columns, frames=frames)
        answer_lat, answer_lon = [p.lat for p in answers], [p.lon for p in answers]
        errors = haversine_km(rows["lat"][val], rows["lon"][val], answer_lat, answer_lon)
        scale = fit_radius_scale([p.radius_km for p in answers], errors)
    calibration = {"radius_scale": scale, "coverage": 0.9, "num_calibration": num_calibration}
    (target / "calibration.json").write_text(json.dumps(calibration, indent=1) + "\n", encoding="utf-8")
    return {
        "num_vectors": len(vectors),
        "self_retrieval": share,
        "radius_scale": scale,
        "num_calibration": num_calibration,
    }


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
