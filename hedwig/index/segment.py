"""Coded vectors sorted by cell, and the search among those of a few cells: what FAISS scans without owning.

The lists of a FAISS IVF index are made to point into one flat array, mapped from disk or in memory, so opening copies
nothing and FAISS parses nothing. FAISS answers with (list, offset) pairs; the row is `starts[list] + offset`, and no
array of ids exists.

A batch is split by cell: a cell that many of its queries ask is turned to fp32 once and multiplied once, the rest is
scanned query by query. Per vector of 768 components (one core, Sapphire Rapids) a scan takes 145 ns, the conversion
200 ns, and a query in the product 30 ns, a cell some 40 us of Python: the product wins where
``num_vectors x (num_queries - 3) >= 1000``; for fp32, where nothing is converted, with 1 in place of 3. Measured at
batch 512 between 100 and 5,000 and 1 and 5 the choice matters little (+-8 %).

Equal scores go by number, also where only some of them are among the best: FAISS keeps whom it met first, so one more
than was asked for is looked at, and where that one ties, more. What is found in some cells by one process and in
others by another is then, put together, what one process finds in all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from hedwig.index import codecs
from hedwig.index.exact import best_of
from hedwig.index.products import cell_products

__all__ = ["GROUPED_FROM", "Segment"]

GROUPED_FROM = 8  # queries at once; below this counting costs more than grouping saves
_GROUPED_GAIN = 1000
_CONVERSION = {"fp16": 3, "fp32": 1}  # in scans of the same cell

Ints = NDArray[np.int64]
Scores = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Segment:
    """Vectors by cell.

    Attributes:
        codec: how they are coded.
        dim: D.
        codes: (n, code bytes) uint8.
        originals: (n, D) float16 or float32 vectors as they are scored in the end; the codes themselves for fp16, fp32.
        codebook: what the codec learnt.
        starts: (C + 1,) int64; cell c holds the vectors ``starts[c]`` to ``starts[c + 1]``.
    """

    codec: str
    dim: int
    codes: NDArray[np.uint8]
    originals: NDArray[Any]
    codebook: NDArray[np.float32]
    starts: Ints

    def __post_init__(self) -> None:
        num_cells = len(self.starts) - 1
        ivf = codecs.ivf(self.codec, self.dim, num_cells, self.codebook)
        lists: Any = faiss.OnDiskInvertedLists(num_cells, codecs.code_bytes(self.codec, self.dim), "")
        lists.read_only, lists.prefetch_nthread = True, 0
        lists.lists.clear()
        one = faiss.OnDiskOneList()
        width = codecs.code_bytes(self.codec, self.dim)
        for start, stop in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            one.size = one.capacity = stop - start
            one.offset = start * width
            lists.lists.push_back(one)
        lists.totsize = self.codes.nbytes
        lists.ptr = faiss.swig_ptr(self.codes.reshape(-1)) if self.codes.size else None
        # FAISS would unmap what it believes to have mapped; the memory is NumPy's.
        weakref.finalize(self, _let_go, lists, self.codes)
        ivf.replace_invlists(lists, False)
        ivf.ntotal = len(self.codes)
        object.__setattr__(self, "_ivf", ivf)
        object.__setattr__(self, "_parameters", {})
        object.__setattr__(self, "_zeros", np.zeros(4096, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.codes)

    def search(
        self, x: Scores, wanted: Ints, top_k: int, rerank: int, *, grouped: bool | None = None
    ) -> tuple[Ints, Scores]:
        """The nearest vectors (B, M) of queries (B, D) in cells (B, K), by number; -1 and -inf where there are no more.

        Args:
            x: contiguous, finite.
            wanted: contiguous, in -1..C-1.
            top_k: M.
            rerank: how many are scored again on the originals, where the codes are not those.
            grouped: see `candidates`.
        """
        if not self.is_coded:
            return self.candidates(x, wanted, top_k, grouped=grouped)
        found, _ = self.candidates(x, wanted, max(top_k, rerank), grouped=grouped)
        return best_of(found, self.scored(x, found), top_k)

    @property
    def is_coded(self) -> bool:
        """Whether what is found by the codes is to be scored again."""
        return self.codec not in _CONVERSION

    def candidates(self, x: Scores, wanted: Ints, num: int, *, grouped: bool | None = None) -> tuple[Ints, Scores]:
        """The nearest (B, num) by their codes, best first, ties by number; arguments as in `search`.

        `grouped` says whether cells may be multiplied at once, which rounds otherwise than a scan; None goes by B. Who
        asks for a part of a batch passes what the whole batch would have had.
        """
        if not len(x) or not wanted.shape[1] or not len(self):
            return np.full((len(x), num), -1, dtype=np.int64), np.full((len(x), num), -np.inf, dtype=np.float32)
        together = not self.is_coded and (len(x) >= GROUPED_FROM if grouped is None else grouped)
        look, most = self._grouped if together else self._scan, num + 1
        while True:
            numbers, scores = look(x, wanted, most)
            flat = scores.reshape(-1)  # across the ends of rows as well: twice as fast, and hardly ever wrong
            if not np.count_nonzero(flat[1:] == flat[:-1]):
                return numbers[:, :num], scores[:, :num]
            if not ((scores[:, num - 1] == scores[:, -1]) & (scores[:, -1] > -np.inf)).any():
                return best_of(numbers, scores, num)
            most *= 4

    def vectors(self, which: Any = slice(None)) -> NDArray[np.float32]:
        """(n, D) vectors as stored (fp16: rounded to it; sq8, pq: the originals, likewise)."""
        return np.asarray(self.originals[which], dtype=np.float32)

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """All vectors in order, a block at a time."""
        for block in codecs.blocks(len(self)):
            yield self.vectors(block)

    def _scan(self, x: Scores, wanted: Ints, top_k: int) -> tuple[Ints, Scores]:
        """Query by query through FAISS."""
        num_queries, num_cells = wanted.shape
        rows = np.empty((num_queries, top_k), dtype=np.int64)
        scores = np.empty((num_queries, top_k), dtype=np.float32)
        # The wrapper's own search_preassigned refuses parameters and reads nprobe from the index: a data race
        # between requests that consider different numbers of cells.
        parameters = self._parameters.get(num_cells)  # type: ignore[attr-defined]
        if parameters is None:
            parameters = faiss.SearchParametersIVF()
            parameters.nprobe = num_cells
            self._parameters[num_cells] = parameters  # type: ignore[attr-defined]
        unused = self._zeros if wanted.size <= 4096 else np.zeros(wanted.size, dtype=np.float32)  # type: ignore[attr-defined]
        pointer = faiss.swig_ptr
        self._ivf.search_preassigned_c(  # type: ignore[attr-defined]
            num_queries, pointer(x), top_k, pointer(wanted), pointer(unused), pointer(scores), pointer(rows), True,
            parameters,
        )  # fmt: skip
        none = rows < 0
        rows = self.starts[rows >> 32] + (rows & 0xFFFFFFFF)
        if none.any():
            rows[none], scores[none] = -1, -np.inf
        return rows, scores

    def _grouped(self, x: Scores, wanted: Ints, top_k: int) -> tuple[Ints, Scores]:
        """One product for every cell that enough queries ask, a scan for the rest."""
        flat = wanted.reshape(-1)
        asked = np.bincount(flat[flat >= 0], minlength=len(self.starts) - 1)
        gain = np.diff(self.starts) * (asked - _CONVERSION[self.codec])
        popular = np.flatnonzero(gain >= _GROUPED_GAIN)
        if not len(popular):
            return self._scan(x, wanted, top_k)
        together = np.zeros(len(self.starts), dtype=bool)  # the last one stands for -1
        together[popular] = True
        theirs = together[wanted]
        rest = np.where(theirs, -1, wanted)
        rows = np.full((*wanted.shape, top_k), -1, dtype=np.int64)
        scores = np.full((*wanted.shape, top_k), -np.inf, dtype=np.float32)
        query, place = np.nonzero(theirs)
        cell = wanted[query, place]
        by_cell = np.argsort(cell, kind="stable")
        query, place, cell = query[by_cell], place[by_cell], cell[by_cell]
        bounds = np.append(np.flatnonzero(np.diff(cell, prepend=-1)), len(cell))
        groups = (
            (int(self.starts[c]), int(self.starts[c + 1]), query[a:b])
            for a, b, c in zip(bounds[:-1].tolist(), bounds[1:].tolist(), cell[bounds[:-1]].tolist(), strict=True)
        )
        for a, (first, found, score) in zip(
            bounds[:-1].tolist(), cell_products(x, self.originals, groups, top_k), strict=True
        ):
            b, num = a + len(found), found.shape[1]
            rows[query[a:b], place[a:b], :num] = first + found
            scores[query[a:b], place[a:b], :num] = score
        scanned, their_scores = self._scan(x, rest, top_k)
        return best_of(
            np.concatenate([scanned, rows.reshape(len(x), -1)], axis=1),
            np.concatenate([their_scores, scores.reshape(len(x), -1)], axis=1),
            top_k,
        )

    def scored(self, x: Scores, found: Ints) -> Scores:
        """(B, n) inner products of queries (B, D) with the originals of vectors (B, n); -inf for -1.

        By einsum: a matrix product of NumPy's rounds by where in the matrix a vector stands.
        """
        scores = np.empty(found.shape, dtype=np.float32)
        for start in range(0, len(found), 64):  # 64 x 32 x 768 candidates are 6 MB
            some = slice(start, start + 64)
            candidates = self.originals[found[some].reshape(-1)].astype(np.float32)
            scores[some] = np.einsum("bnd,bd->bn", candidates.reshape(*found[some].shape, self.dim), x[some])
        return np.where(found < 0, np.float32(-np.inf), scores)


def _let_go(lists: Any, codes: NDArray[np.uint8]) -> None:
    lists.ptr = None
    del codes
