"""Where is this? First the geocells the classifier believes in, then the most similar reference inside them.

It needs only arrays: logits, a query vector per panorama, an index and the cells' centroids. The posterior is the
softmax of what the geolocator returns, whose temperature is part of the geolocator and not applied again. Restricting
the search to likely cells is the method, not a shortcut: a search over everything answers other questions. Where the
index holds every frame of a reference (max_sim), a query asks with all of its frames and the best pair counts; where
the geolocator pools frames (attention), it is handed the frames and its pool makes the one vector. Nothing is read
from disk here; that is `hedwig.retrieve.run`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from hedwig.geo import haversine_km, spherical_mean
from hedwig.index import GeocellIndex
from hedwig.retrieve.prediction import Prediction

__all__ = ["Retriever"]

Floats = NDArray[np.float64]
MEAN_WITHIN_KM = 1000.0  # beyond it an average lands in the sea between two guesses (PIGEON's guard)
MEAN_SCORE_SCALE = 0.1  # a neighbour 0.1 less similar than the best counts e times less
LEAST_FLOOR_KM = 1.0  # no answer claims to know the house number
_LIST_TYPES = {"cell_ids": np.int32, "cell_probs": np.float32, "neighbour_ids": object, "neighbour_scores": np.float32}


class Retriever:
    """Posterior over geocells, search inside the likely ones, an answer with a radius. Also a stage.

    Args:
        geolocator: (image (B, Di), text (B, Dt)) -> (projected (B, P), logits (B, C) at their temperature); one that
            pools frames takes (B, V, Di).
        index: the references, with one vector each or one per frame.
        cell_lat: (C,) degrees of the geocells' centroids.
        cell_lon: (C,) degrees.
        cell_radius_km: (C,) how far a geocell's panoramas lie from its centroid; None for 1 km everywhere.
        embedding: what the index holds: the geolocator's projection, or the image embedding as it is (where frames
            are pooled, what the pool makes of them).
        num_cells: how many cells to search at most.
        cell_mass: search only the smallest set of cells with this posterior mass.
        num_neighbours: M.
        log_prob_weight: neighbours compete by cosine + this x log p(cell); 0 is the paper.
        refine: the answer is the best neighbour's place (the paper), the most probable cell's centroid, or the
            spherical mean of the neighbours within 1000 km of the best one, weighted by exp(score / 0.1).
        radius_scale: what `fit_radius_scale` found on a validation split; 1 yields the raw spread as radius.
    """

    reads: tuple[str, ...] = ("pano_id", "image_embedding", "text_embedding")
    reads_if_there: tuple[str, ...] = ("frame_embeddings",)
    writes: tuple[str, ...] = (
        "lat", "lon", "cell_ids", "cell_probs", "neighbour_ids", "neighbour_scores", "radius_km", "confidence",
    )  # fmt: skip

    def __init__(
        self,
        geolocator: Any,
        index: GeocellIndex,
        cell_lat: ArrayLike,
        cell_lon: ArrayLike,
        *,
        cell_radius_km: ArrayLike | None = None,
        embedding: Literal["projected", "image"] = "projected",
        num_cells: int = 5,
        cell_mass: float | None = None,
        num_neighbours: int = 5,
        log_prob_weight: float = 0.0,
        refine: Literal["neighbour", "cell", "mean"] = "neighbour",
        radius_scale: float = 1.0,
    ) -> None:
        self.geolocator, self.index = geolocator, index
        self.cell_lat, self.cell_lon = np.asarray(cell_lat, np.float64), np.asarray(cell_lon, np.float64)
        floor = np.zeros(len(self.cell_lat)) if cell_radius_km is None else np.asarray(cell_radius_km, np.float64)
        self.cell_floor_km: Floats = np.maximum(np.nan_to_num(floor), LEAST_FLOOR_KM)
        if not len(self.cell_lat) == len(self.cell_lon) == len(floor) == index.num_cells:
            raise ValueError(
                f"{len(self.cell_lat)} cell centroids but an index of {index.num_cells} geocells; "
                "run `hedwig index` again."
            )
        if embedding not in ("projected", "image") or refine not in ("neighbour", "cell", "mean"):
            raise ValueError(f"embedding={embedding!r}, refine={refine!r}: one is unknown; see the Retriever's text.")
        if num_cells < 1 or num_neighbours < 1 or not (cell_mass is None or 0 < cell_mass <= 1):
            raise ValueError(
                f"num_cells={num_cells} and num_neighbours={num_neighbours} must be at least 1, cell_mass={cell_mass} "
                "None or in (0, 1]."
            )
        if not (radius_scale > 0 and math.isfinite(radius_scale) and log_prob_weight >= 0):
            raise ValueError(f"radius_scale={radius_scale} must be > 0 and log_prob_weight={log_prob_weight} >= 0.")
        self.pools_frames = getattr(getattr(geolocator, "config", None), "num_frames", 0) > 0
        self.asks_frames = index.num_frames > 1
        if self.asks_frames and embedding != "image":
            raise ValueError(
                f"The index holds {index.num_frames} vectors per panorama and embedding is {embedding!r}: a projection "
                "has one. Set index.embedding=image and run `hedwig index` again."
            )
        self.embedding, self.refine = embedding, refine
        self.num_cells, self.cell_mass = min(num_cells, index.num_cells), cell_mass
        self.num_neighbours, self.log_prob_weight = num_neighbours, float(log_prob_weight)
        self.radius_scale = float(radius_scale)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The batch with the prediction's columns; ``lat, lon`` become the answer, so no truth is left in it."""
        names, frames = batch["pano_id"].tolist(), batch.get("frame_embeddings")
        found = self.predict(batch["image_embedding"], batch["text_embedding"], names, frames=frames)
        columns: dict[str, NDArray[Any]] = {}
        for name in self.writes:
            values = [getattr(p, name) for p in found]
            if name in ("lat", "lon", "radius_km", "confidence"):
                columns[name] = np.array(values, dtype=np.float64)
            else:
                columns[name] = np.empty(len(values), dtype=object)
                columns[name][:] = [np.asarray(v, dtype=_LIST_TYPES[name]) for v in values]
        return {**batch, **columns}

    def predict(
        self,
        image: ArrayLike,
        text: ArrayLike,
        pano_ids: Sequence[str],
        *,
        frames: ArrayLike | None = None,
        top_k: int | None = None,
    ) -> list[Prediction]:
        """Predictions of (B, Di) image and (B, Dt) text embeddings; the rest as in `retrieve`.

        `frames`, (B, V·Di), are the vectors of each frame; needed where frames are pooled or compared.
        """
        device = next((p.device for p in self.geolocator.parameters()), torch.device("cpu"))
        images, texts = _stacked(image), _stacked(text)
        if self.pools_frames or self.asks_frames:
            if frames is None:
                raise ValueError(
                    "This run compares or pools frames (encoder.fusion is max_sim or attention), and the rows have no "
                    "frame_embeddings; run `hedwig embed` again."
                )
            each = _stacked(frames).reshape(len(images), -1, images.shape[1])
        with torch.inference_mode():
            given = torch.from_numpy(each if self.pools_frames else images).to(device)
            projected, logits = self.geolocator(given, torch.from_numpy(texts).to(device))
            if self.embedding == "image" and self.pools_frames:
                images = self.geolocator.pool(given).float().cpu().numpy()
        own = each if self.asks_frames else images
        queries = projected.float().cpu().numpy() if self.embedding == "projected" else own
        return self.retrieve(queries, logits.float().cpu().numpy(), pano_ids, top_k=top_k)

    def retrieve(
        self, queries: ArrayLike, logits: ArrayLike, pano_ids: Sequence[str], *, top_k: int | None = None
    ) -> list[Prediction]:
        """The algorithm, on arrays.

        Args:
            queries: (B, D) vectors of unit norm, of the kind the index holds; (B, V, D) if that is frames.
            logits: (B, C), already divided by the temperature.
            pano_ids: (B,) names of the queries.
            top_k: list this many cells and neighbours in each prediction instead of those that were considered; the
                answer does not depend on it.

        Raises:
            ValueError: values that are not finite, or shapes that do not fit the index.
        """
        z = np.asarray(logits, dtype=np.float64)
        if z.shape != (len(pano_ids), self.index.num_cells) or not np.isfinite(z).all():
            raise ValueError(
                f"logits must be finite and ({len(pano_ids)}, {self.index.num_cells}), got {z.shape} with "
                f"{int((~np.isfinite(z)).sum())} values that are not."
            )
        z = z - z.max(axis=1, keepdims=True)
        log_probs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        order = _largest(log_probs, min(max(self.num_cells, top_k or 0), z.shape[1]))
        ordered_log = np.take_along_axis(log_probs, order, axis=1)
        cells = order[:, : self.num_cells].copy()
        if self.cell_mass is not None:
            probs = np.exp(ordered_log[:, : self.num_cells])
            cells[np.cumsum(probs, axis=1) - probs >= self.cell_mass] = -1
        rows, scores = self._neighbours(
            np.asarray(queries), cells, ordered_log[:, : self.num_cells], max(self.num_neighbours, top_k or 0)
        )
        return [
            self._prediction(str(pano_ids[b]), order[b], ordered_log[b], cells[b] >= 0, rows[b], scores[b], top_k)
            for b in range(len(z))
        ]

    def _neighbours(
        self, queries: NDArray[Any], cells: NDArray[np.int64], log_probs: Floats, num: int
    ) -> tuple[NDArray[np.int64], Floats]:
        """(B, M) index rows and scores, best first; -1 and -inf where there is nothing more."""
        if self.log_prob_weight == 0:
            rows, cosines = self.index.search(queries, cells, num)
            return rows, cosines.astype(np.float64)
        # Inside one cell log p is a constant, so the best M of each cell hold the best M by the combined score.
        num_cells = cells.shape[1]
        rows, cosines = self.index.search(np.repeat(queries, num_cells, axis=0), cells.reshape(-1, 1), num)
        combined = cosines.astype(np.float64) + self.log_prob_weight * log_probs.reshape(-1, 1)
        rows, combined = rows.reshape(len(cells), -1), combined.reshape(len(cells), -1)
        best = np.argsort(-combined, axis=1, kind="stable")[:, :num]
        return np.take_along_axis(rows, best, axis=1), np.take_along_axis(combined, best, axis=1)

    def _prediction(
        self,
        pano_id: str,
        order: NDArray[np.int64],
        log_probs: Floats,
        searched: NDArray[np.bool_],
        rows: NDArray[np.int64],
        scores: Floats,
        top_k: int | None,
    ) -> Prediction:
        probs = np.exp(log_probs)
        rows, scores = rows[rows >= 0], scores[rows >= 0]
        lat, lon, cell = float(self.cell_lat[order[0]]), float(self.cell_lon[order[0]]), int(order[0])
        if self.refine != "cell" and len(rows):
            cell = int(self.index.cell_ids[rows[0]])
            lat, lon = float(self.index.lat[rows[0]]), float(self.index.lon[rows[0]])
            if self.refine == "mean":
                lat, lon = self._mean(lat, lon, rows[: self.num_neighbours], scores[: self.num_neighbours])
        considered, mass = order[: len(searched)][searched], probs[: len(searched)][searched]
        distance_km = haversine_km(lat, lon, self.cell_lat[considered], self.cell_lon[considered])
        spread_km = float(mass @ distance_km / mass.sum()) + float(self.cell_floor_km[cell])
        listed, listed_probs = (considered, mass) if top_k is None else (order[:top_k], probs[:top_k])
        num_neighbours = self.num_neighbours if top_k is None else top_k
        near = rows[:num_neighbours]
        return Prediction(
            pano_id=pano_id,
            lat=lat,
            lon=lon,
            cell_ids=tuple(listed.tolist()),
            cell_probs=tuple(listed_probs.tolist()),
            neighbour_ids=tuple(self.index.pano_ids[near].tolist()),
            neighbour_scores=tuple(scores[:num_neighbours].tolist()),
            neighbour_lat=tuple(self.index.lat[near].tolist()),
            neighbour_lon=tuple(self.index.lon[near].tolist()),
            radius_km=self.radius_scale * spread_km,
            confidence=float(mass[considered == cell].sum()),
        )

    def _mean(self, lat: float, lon: float, rows: NDArray[np.int64], scores: Floats) -> tuple[float, float]:
        lats, lons = self.index.lat[rows], self.index.lon[rows]
        near = haversine_km(lat, lon, lats, lons) <= MEAN_WITHIN_KM
        weights = np.exp((scores - scores[0]) / MEAN_SCORE_SCALE)
        return spherical_mean(lats[near], lons[near], weights[near])


def _largest(values: Floats, num: int) -> NDArray[np.int64]:
    """(B, num) columns of the largest values, descending."""
    top = np.sort(np.argpartition(-values, num - 1, axis=1)[:, :num], axis=1)
    rank = np.argsort(-np.take_along_axis(values, top, axis=1), axis=1, kind="stable")
    return np.take_along_axis(top, rank, axis=1).astype(np.int64)


def _stacked(column: Any) -> NDArray[np.float32]:
    """(B, D) writable float32, also of an object column of B vectors."""
    array = np.asarray(column)
    return np.array(np.stack(list(array)) if array.dtype == object else array, dtype=np.float32)
