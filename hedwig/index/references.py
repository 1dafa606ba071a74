"""Who the references are and where they are, and how what is found among their vectors becomes the nearest of them.

This is the half of an index that is small: 50 bytes for each reference beside the 1,536 of its vector. The other half,
the vectors themselves, is searched by whoever has them: `GeocellIndex` here, `ShardedIndex` through others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from hedwig.index.codecs import Codec
from hedwig.index.exact import best_of, best_rows, check_queries
from hedwig.index.files import Header
from hedwig.index.names import Names

__all__ = ["RERANK", "References"]

RERANK = 32  # of 20 candidates of PQ96x8 the best is the exact one on every query that was measured

Ints = NDArray[np.int64]
Scores = NDArray[np.float32]


class References(ABC):
    """References by geocell, their rows numbered over all parts of an index.

    A row is the number of a reference: its position in the columns below. Those of a fresh index are in the order of
    (cell_id, pano_id); what was added later stands behind them in the same order, and removed rows keep their place.

    Args:
        header: of the first part.
        tables: the rows of every part.
        removed: rows that are passed over; None for none.

    Attributes:
        pano_ids: (R,) `Names`, a sequence of str.
        lat: (R,) float64, degrees.
        lon: (R,) float64, degrees.
        cell_ids: (R,) int32.
        codec: how the vectors are kept.
        num_cells: geocells, empty ones included.
        dim: D, width of an embedding.
        num_frames: V, the vectors of one reference; 1 unless every frame has its own.
    """

    def __init__(self, header: Header, tables: Sequence[pa.Table], removed: Ints | None = None) -> None:
        self._removed = np.empty(0, dtype=np.int64) if removed is None else removed
        self.codec: Codec = header.codec  # type: ignore[assignment]  # checked where it was read
        self.num_cells, self.dim, self.num_frames = header.num_cells, header.dim, header.num_frames
        self._num_rows = [len(table) for table in tables]
        rows = tables[0] if len(tables) == 1 else pa.concat_tables(tables)
        self.pano_ids = Names(rows["pano_id"])
        self.lat: NDArray[np.float64] = rows["lat"].to_numpy()
        self.lon: NDArray[np.float64] = rows["lon"].to_numpy()
        self.cell_ids: NDArray[np.int32] = rows["cell_id"].to_numpy()
        # What a plain index can skip: one part, one vector each, nothing removed.
        self._plain = len(tables) == 1 and self.num_frames == 1 and not len(self._removed)
        self._gone = np.zeros(len(self.pano_ids) + 1, dtype=bool)  # the last one stands for row -1
        self._gone[self._removed] = True
        self._gone_by_cell = np.bincount(self.cell_ids[self._removed], minlength=self.num_cells + 1)

    def __len__(self) -> int:
        """References that can be found."""
        return len(self.pano_ids) - len(self._removed)

    @property
    def is_compact(self) -> bool:
        """Whether all rows can be found and stand in the order of (cell_id, pano_id), as in a fresh index."""
        return len(self._num_rows) == 1 and not len(self._removed)

    @abstractmethod
    def _search_parts(self, x: Scores, wanted: Ints, top_k: int, rerank: int) -> list[tuple[Ints, Scores]]:
        """For every part the nearest vectors (B, M) of queries (B, D) in cells (B, K), by number, as in `Segment`."""

    def _search_one(self, query: Any, cells: Any, top_k: int) -> tuple[Ints, Scores] | None:
        """What `search_rows` answers, if this is one query and there is a shorter way for it; else None."""
        return None

    def search(
        self, queries: ArrayLike, cells: ArrayLike, top_k: int, *, rerank: int = RERANK
    ) -> tuple[NDArray[np.object_], Scores]:
        """The nearest references of each query inside its own cells, by name; see `search_rows`.

        Returns:
            ids: (B, M) object, pano_id, best first; None where there is nothing more.
            scores: (B, M).
        """
        rows, scores = self.search_rows(queries, cells, top_k, rerank=rerank)
        return self.pano_ids.at(rows), scores

    def search_rows(
        self, queries: ArrayLike, cells: ArrayLike, top_k: int, *, rerank: int = RERANK, num_threads: int | None = None
    ) -> tuple[Ints, Scores]:
        """The nearest references of each query inside its own cells, by inner product.

        Args:
            queries: (B, D) embeddings of unit norm, or (B, V', D) several for each query.
            cells: (B, K) int, none twice; -1 is no cell. Empty cells give nothing.
            top_k: M, how many at most.
            rerank: sq8 and pq: how many candidates are scored again on their originals.
            num_threads: of every search in this process from here on, as OpenMP has it; None leaves them as they are.

        Returns:
            rows: (B, M) int64, best first, positions in `pano_ids`; -1 where there is nothing more.
            scores: (B, M), cosines for unit vectors, the largest over all pairs of a query's and a reference's vectors;
                -inf where the row is -1. Equal ones go by row.

        Raises:
            ValueError: queries of another width or not finite, cells out of range, fewer than one neighbour.
        """
        if num_threads is not None and num_threads != faiss.omp_get_max_threads():
            faiss.omp_set_num_threads(num_threads)
        if self._plain and (found := self._search_one(queries, cells, top_k)) is not None:
            return found
        asked = np.asarray(queries, dtype=np.float32)
        if asked.ndim == 2 and self._plain:
            x, wanted = check_queries(asked, cells, top_k, self.dim, self.num_cells)
            return self._search_parts(x, wanted, top_k, rerank)[0]
        return self._search_pairs(asked, np.asarray(cells), top_k, rerank)

    def _search_pairs(self, queries: Scores, cells: NDArray[Any], top_k: int, rerank: int) -> tuple[Ints, Scores]:
        """The search over all pairs of a query's vectors and a reference's, over every part, without removed rows.

        Exact: of the (M-1)·V+1 nearest vectors to one query vector at least M belong to different references, so who is
        not among them for any query vector is not among the best M. With removed rows there must be so many more.
        """
        asking = queries.shape[1] if queries.ndim == 3 else 1
        flat = queries.reshape(-1, queries.shape[-1]) if queries.ndim > 1 else queries
        x, wanted = check_queries(
            flat, np.repeat(cells, asking, axis=0) if asking > 1 else cells, top_k, self.dim, self.num_cells
        )
        gone = int(self._gone_by_cell[wanted].sum(axis=1).max(initial=0)) if len(self._removed) else 0
        least = (top_k + gone - 1) * self.num_frames + 1
        rows, scores, first = [], [], 0
        found = self._search_parts(x, wanted, least, max(rerank, least))
        for (numbers, score), num_rows in zip(found, self._num_rows, strict=True):
            rows.append(np.where(numbers < 0, -1, first + numbers // self.num_frames))
            scores.append(score)
            first += num_rows
        shape = (len(queries), asking * sum(each.shape[1] for each in rows))  # -1 is no width of no queries
        merged = np.concatenate(rows, axis=1).reshape(shape)
        their_scores = np.concatenate(scores, axis=1).reshape(shape)
        if gone:
            their_scores[self._gone[merged]] = -np.inf
        if self.num_frames == 1 and asking == 1:
            merged, their_scores = best_of(merged, their_scores, top_k)
            return np.where(np.isneginf(their_scores), -1, merged), their_scores
        return best_rows(merged, their_scores, top_k)
