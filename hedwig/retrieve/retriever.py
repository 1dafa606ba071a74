"""Where is this? First the geocells the classifier believes in, then the most similar reference inside them.

It needs only arrays: logits, a query vector per panorama, an index and the cells' centroids. The posterior is the
softmax of what the geolocator returns, whose temperature is part of the geolocator and not applied again. Restricting
the search to likely cells is the method, not a shortcut: a search over everything answers other questions. Where the
index holds every frame of a reference (max_sim), a query asks with all of its frames and the best pair counts; where
the geolocator pools frames (attention), it is handed the frames and its pool makes the one vector. Nothing is read
from disk here; that is `hedwig.retrieve.run`. How wide a radius is and what a confidence means is told by a
`Calibration`; without one the radius is a spread and the confidence a posterior.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from hedwig.geo import haversine_km
from hedwig.index import References
from hedwig.retrieve.answer import predictions_of
from hedwig.retrieve.calibration import Calibration
from hedwig.retrieve.evidence import Evidence, largest, log_softmax
from hedwig.retrieve.prediction import Prediction
from hedwig.retrieve.prototypes import Prototypes
from hedwig.retrieve.refine import mean_places, prototype_rows
from hedwig.retrieve.whitening import Whitening

__all__ = ["Retriever"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LEAST_FLOOR_KM = 1.0  # no answer claims to know the house number
_ROWS_AT_ONCE = 32  # of a posterior that is only looked at: it stays in the cache, and no memory is asked for again
_EMBEDDINGS, _REFINEMENTS = ("projected", "image", "whitened"), ("neighbour", "cell", "mean", "prototype")
_LIST_TYPES = {"cell_ids": np.int32, "cell_probs": np.float32, "neighbour_ids": object, "neighbour_scores": np.float32}


class Retriever:
    """Posterior over geocells, search inside the likely ones, an answer with a radius. Also a stage.

    Args:
        geolocator: (image (B, Di), text (B, Dt)) -> (projected (B, P), logits (B, C) at their temperature); one that
            pools frames takes (B, V, Di).
        index: the references, with one vector each or one per frame, here or with others.
        cell_lat: (C,) degrees of the geocells' centroids.
        cell_lon: (C,) degrees.
        cell_radius_km: (C,) how far a geocell's panoramas lie from its centroid; None for 1 km everywhere.
        embedding: what the index holds: the geolocator's projection, the image embedding as it is (where frames are
            pooled, what the pool makes of them), or that one whitened.
        whitening: what a whitened index was made with.
        prototypes: of the index, for refine="prototype".
        calibration: what validation rows taught.
        num_cells: how many cells to search at most.
        cell_mass: search only the smallest set of cells with this posterior mass, of at most `num_cells`.
        num_neighbours: M.
        score_temperature: T of score = cosine / T + log_prob_weight x log p(cell); None takes the calibration's, which
            is 1 unless tuned. Only T x log_prob_weight decides who is best; T alone sharpens the mean.
        log_prob_weight: of the same formula; None takes the calibration's, which is 0 (the paper) unless tuned.
        refine: the answer is the best neighbour's place (the paper), the most probable cell's centroid, the spherical
            mean of the neighbours near the best one, weighted by exp(score / 0.1), or PIGEON's prototype refinement,
            which goes by log p(cell) and distance alone: neighbours are then listed, and do not decide.
        mean_within_km: how near those neighbours must be: beyond it an average lands between two guesses.
        prototype_temperature: of PIGEON's softmax over distances.
        radius_scale: what `fit_radius_scale` found on a validation split; 1 yields the raw spread as radius; None
            takes the calibration's.
        abstain_below: answers of less confidence are flagged as not localisable; None flags none.
        regions: whether predictions list the cells of their 50 % and 90 % regions, where those were calibrated. It
            takes sorting all C cells.
    """

    reads: tuple[str, ...] = ("pano_id", "image_embedding", "text_embedding")
    reads_if_there: tuple[str, ...] = ("frame_embeddings",)
    writes: tuple[str, ...] = (
        "lat", "lon", "cell_ids", "cell_probs", "neighbour_ids", "neighbour_scores", "radius_km", "confidence",
        "radius_50_km", "localisable",
    )  # fmt: skip

    def __init__(
        self,
        geolocator: Any,
        index: References,
        cell_lat: ArrayLike,
        cell_lon: ArrayLike,
        *,
        cell_radius_km: ArrayLike | None = None,
        embedding: Literal["projected", "image", "whitened"] = "projected",
        whitening: Whitening | None = None,
        prototypes: Prototypes | None = None,
        calibration: Calibration | None = None,
        num_cells: int = 5,
        cell_mass: float | None = None,
        num_neighbours: int = 5,
        score_temperature: float | None = None,
        log_prob_weight: float | None = None,
        refine: Literal["neighbour", "cell", "mean", "prototype"] = "neighbour",
        mean_within_km: float = 1000.0,
        prototype_temperature: float = 1.6,
        radius_scale: float | None = None,
        abstain_below: float | None = None,
        regions: bool = False,
    ) -> None:
        self.geolocator, self.index = geolocator, index
        self.calibration = known = calibration or Calibration()
        self.cell_lat, self.cell_lon = np.asarray(cell_lat, np.float64), np.asarray(cell_lon, np.float64)
        floor = np.zeros(len(self.cell_lat)) if cell_radius_km is None else np.asarray(cell_radius_km, np.float64)
        self.cell_floor_km: Floats = np.maximum(np.nan_to_num(floor), LEAST_FLOOR_KM)
        self.embedding, self.refine, self.regions = embedding, refine, regions
        self.whitening, self.prototypes = whitening, prototypes
        self.num_cells, self.cell_mass, self.num_neighbours = min(num_cells, index.num_cells), cell_mass, num_neighbours
        self.score_temperature = float(known.score_temperature if score_temperature is None else score_temperature)
        self.log_prob_weight = float(known.log_prob_weight if log_prob_weight is None else log_prob_weight)
        self.radius_scale = float(known.radius_scale if radius_scale is None else radius_scale)
        self.mean_within_km, self.prototype_temperature = float(mean_within_km), float(prototype_temperature)
        self.abstain_below = abstain_below
        self.pools_frames = getattr(getattr(geolocator, "config", None), "num_frames", 0) > 0
        self.asks_frames = index.num_frames > 1
        self._check(len(floor))

    def _check(self, num_floors: int) -> None:
        index = self.index
        if not len(self.cell_lat) == len(self.cell_lon) == num_floors == index.num_cells:
            raise ValueError(
                f"{len(self.cell_lat)} cell centroids but an index of {index.num_cells} geocells; "
                "run `hedwig index` again."
            )
        if self.embedding not in _EMBEDDINGS or self.refine not in _REFINEMENTS:
            raise ValueError(
                f"embedding={self.embedding!r}, refine={self.refine!r}: one is unknown; see the Retriever's text."
            )
        if self.num_cells < 1 or self.num_neighbours < 1 or not (self.cell_mass is None or 0 < self.cell_mass <= 1):
            raise ValueError(
                f"num_cells={self.num_cells} and num_neighbours={self.num_neighbours} must be at least 1, "
                f"cell_mass={self.cell_mass} None or in (0, 1]."
            )
        for name in ("radius_scale", "score_temperature", "prototype_temperature", "mean_within_km"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite.")
        if not 0 <= self.log_prob_weight < math.inf or not (self.abstain_below is None or 0 <= self.abstain_below <= 1):
            raise ValueError(
                f"log_prob_weight={self.log_prob_weight} must be at least 0 and abstain_below={self.abstain_below} "
                "None or in [0, 1]."
            )
        if self.asks_frames and self.embedding == "projected":
            raise ValueError(
                f"The index holds {index.num_frames} vectors per panorama and embedding is {self.embedding!r}: a "
                "projection has one. Set index.embedding=image and run `hedwig index` again."
            )
        if self.embedding == "whitened" and self.whitening is None:
            raise ValueError("embedding='whitened' needs the whitening of the index; run `hedwig index` again.")
        clusters = None if self.prototypes is None else len(self.prototypes.clusters)
        if self.refine == "prototype" and (clusters != len(index) or not index.is_compact):
            raise ValueError(
                f"refine='prototype' needs prototypes of these {len(index)} references, and there are "
                f"{'none' if clusters is None else f'some of {clusters}'}; set retrieve.refine=prototype and run "
                "`hedwig index` again."
            )

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The batch with the prediction's columns; ``lat, lon`` become the answer, so no truth is left in it."""
        names, frames = batch["pano_id"].tolist(), batch.get("frame_embeddings")
        found = self.predict(batch["image_embedding"], batch["text_embedding"], names, frames=frames)
        columns: dict[str, NDArray[Any]] = {}
        for name in self.writes:
            values = [getattr(p, name) for p in found]
            if name == "localisable":
                columns[name] = np.array(values, dtype=bool)
            elif name in _LIST_TYPES:
                columns[name] = np.empty(len(values), dtype=object)
                columns[name][:] = [np.asarray(v, dtype=_LIST_TYPES[name]) for v in values]
            else:
                columns[name] = np.array(values, dtype=np.float64)  # None becomes NaN
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
        return self.retrieve(*self.encode(image, text, frames=frames), pano_ids, top_k=top_k)

    def encode(
        self, image: ArrayLike, text: ArrayLike, *, frames: ArrayLike | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Queries (B, D), or (B, V, D), of the kind that the index holds, and logits (B, C); arguments of `predict`."""
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
            if self.embedding != "projected" and self.pools_frames:
                images = self.geolocator.pool(given).float().cpu().numpy()
        own = each if self.asks_frames else images
        queries = projected.float().cpu().numpy() if self.embedding == "projected" else own
        if self.embedding == "whitened" and self.whitening is not None:
            queries = self.whitening(queries)
        return queries, logits.float().cpu().numpy()

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
        found = self.evidence(queries, logits, num_queries=len(pano_ids), top_k=top_k)
        return predictions_of(self, found, pano_ids, top_k=top_k, regions=self.regions)

    def evidence(
        self, queries: ArrayLike, logits: ArrayLike, *, num_queries: int | None = None, top_k: int | None = None
    ) -> Evidence:
        """What `retrieve` answers from, row by row; `num_queries` is how many rows there must be."""
        asked = np.asarray(queries)
        log_posterior = self._log_posterior(logits, len(asked) if num_queries is None else num_queries)
        order = largest(log_posterior, min(max(self.num_cells, top_k or 0), log_posterior.shape[1]))
        ordered_log = log_posterior[np.arange(len(order))[:, None], order]
        cells, log_probs = order[:, : self.num_cells].copy(), np.ascontiguousarray(ordered_log[:, : self.num_cells])
        probs = self._close(cells, log_probs)
        num = max(self.num_neighbours, top_k or 0)
        rows, scores, cosine = self._neighbours(asked, cells, log_probs, num)
        cell, lat, lon = self._places(asked, cells, log_probs, rows, scores)
        mass = np.where(cells >= 0, probs, 0.0)
        distance_km = haversine_km(lat[:, None], lon[:, None], self.cell_lat[cells], self.cell_lon[cells])
        spread_km = (mass * distance_km).sum(axis=1) / mass.sum(axis=1) + self.cell_floor_km[cell]
        return Evidence(
            log_posterior, order, ordered_log, cells, mass, distance_km, rows, scores, cosine, cell, lat, lon, spread_km
        )

    def neighbours(
        self, queries: ArrayLike, logits: ArrayLike, num: int, *, cells: ArrayLike | None = None
    ) -> tuple[Ints, Ints, Floats]:
        """Only the search: the references that `retrieve` would list, without an answer, or those of given cells.

        Args:
            queries: as in `retrieve`.
            logits: likewise.
            num: M, how many at most.
            cells: (B, K) int, none twice in a row, -1 is no cell; None searches the cells that `retrieve` searches.

        Returns:
            The searched cells (B, K), rows of the index (B, M), -1 for none, and their scores (B, M), -inf for none.

        Raises:
            ValueError: as in `retrieve`, and cells that there are not.
        """
        asked = np.asarray(queries)
        if cells is None:
            chosen = np.empty((len(asked), self.num_cells), dtype=np.int64)
        else:
            chosen = np.ascontiguousarray(cells, dtype=np.int64)
            if (
                chosen.ndim != 2
                or len(chosen) != len(asked)
                or not ((chosen >= -1) & (chosen < self.index.num_cells)).all()
            ):
                raise ValueError(
                    f"cells must be ({len(asked)}, K) in -1..{self.index.num_cells - 1}, got {chosen.shape}."
                )
            ordered = np.sort(chosen, axis=1)
            if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
                raise ValueError("A cell is named twice for one query; name each once.")
        z = self._checked_logits(logits, len(asked))
        log_probs = np.zeros(chosen.shape)
        weighed = self.log_prob_weight != 0 or self.cell_mass is not None  # else only their order counts
        for start in range(0, len(asked), _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            values = log_softmax(z[some].astype(np.float64)) if weighed else z[some]
            if cells is None:
                chosen[some] = largest(values, self.num_cells)
            if weighed:
                log_probs[some] = np.take_along_axis(values, chosen[some], axis=1)
        if cells is None and weighed:
            self._close(chosen, log_probs)
        rows, scores, _ = self._neighbours(asked, chosen, log_probs, num)
        return chosen, rows, scores

    def rescored(self, score_temperature: float, log_prob_weight: float) -> Retriever:
        """The same with another score."""
        other = copy.copy(self)
        other.score_temperature, other.log_prob_weight = float(score_temperature), float(log_prob_weight)
        return other

    def _log_posterior(self, logits: ArrayLike, num_rows: int) -> Floats:
        return log_softmax(self._checked_logits(logits, num_rows).astype(np.float64))

    def _checked_logits(self, logits: ArrayLike, num_rows: int) -> NDArray[Any]:
        z = np.asarray(logits)
        wanted = (num_rows, self.index.num_cells)
        if z.shape != wanted or not np.isfinite(z).all():
            raise ValueError(
                f"logits must be finite and {wanted}, got {z.shape} with {int((~np.isfinite(z)).sum())} values that "
                "are not."
            )
        return z

    def _close(self, cells: Ints, log_probs: Floats) -> Floats:
        """Write -1 over the cells (B, K) beyond the gate; the probabilities (B, K) of all of them."""
        probs = np.exp(log_probs)
        if self.cell_mass is not None:
            cells[np.cumsum(probs, axis=1) - probs >= self.cell_mass] = -1
        return probs

    def _neighbours(
        self, queries: NDArray[Any], cells: Ints, log_probs: Floats, num: int
    ) -> tuple[Ints, Floats, Floats]:
        """(B, M) index rows and scores, best first, -1 and -inf where there is nothing more; the best's cosine (B,)."""
        if self.log_prob_weight == 0:
            rows, found = self.index.search_rows(queries, cells, num)
            cosines = found.astype(np.float64)
            return rows, cosines / self.score_temperature, np.where(rows[:, 0] >= 0, cosines[:, 0], 0.0)
        # Inside one cell log p is a constant, so the best M of each cell hold the best M by the combined score.
        num_cells = cells.shape[1]
        rows, found = self.index.search_rows(np.repeat(queries, num_cells, axis=0), cells.reshape(-1, 1), num)
        cosines = found.astype(np.float64)
        combined = cosines / self.score_temperature + self.log_prob_weight * log_probs.reshape(-1, 1)
        rows, combined = rows.reshape(len(cells), -1), combined.reshape(len(cells), -1)
        best = np.argsort(-combined, axis=1, kind="stable")[:, :num]
        line = np.arange(len(cells))[:, None]
        rows, cosines = rows[line, best], cosines.reshape(len(cells), -1)[line, best]
        return rows, combined[line, best], np.where(rows[:, 0] >= 0, cosines[:, 0], 0.0)

    def _places(
        self, queries: NDArray[Any], cells: Ints, log_probs: Floats, rows: Ints, scores: Floats
    ) -> tuple[Ints, Floats, Floats]:
        """The answers: their cells (B,), latitudes (B,) and longitudes (B,)."""
        winner = rows[:, 0]
        if self.refine == "prototype" and self.prototypes is not None:
            centres = (self.cell_lat, self.cell_lon)
            winner = prototype_rows(
                self.prototypes, self.index, queries, cells, log_probs, centres, self.prototype_temperature
            )
        cell, lat, lon = cells[:, 0], self.cell_lat[cells[:, 0]], self.cell_lon[cells[:, 0]]
        found = np.flatnonzero(winner >= 0)
        if self.refine == "cell" or len(found) == 0:
            return cell, lat, lon
        chosen, cell = winner[found], cell.copy()
        cell[found] = self.index.cell_ids[chosen]
        lat[found], lon[found] = self.index.lat[chosen], self.index.lon[chosen]
        if self.refine == "mean":
            near, score = rows[found, : self.num_neighbours], scores[found, : self.num_neighbours]
            lat[found], lon[found] = mean_places(self.index.lat[near], self.index.lon[near], score, self.mean_within_km)
        return cell, lat, lon


def _stacked(column: Any) -> NDArray[np.float32]:
    """(B, D) writable float32, also of an object column of B vectors."""
    array = np.asarray(column)
    return np.array(np.stack(list(array)) if array.dtype == object else array, dtype=np.float32)
