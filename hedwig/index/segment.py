"""Coded vectors sorted by cell, and the search among those of a few cells.

fp16, fp32 and sq8 are scanned by `hedwig.index.kernel`, pq by FAISS, and so is everything on a processor for which
there is no kernel. Neither owns what it scans: the lists of a FAISS IVF index are made to point into one flat array,
mapped from disk or in memory, so opening copies nothing and FAISS parses nothing. FAISS answers with (list, offset)
pairs; the row is `starts[list] + offset`, and no array of ids exists.

Equal scores go by number, also where only some of them are among the best: FAISS keeps whom it met first, so one more
than was asked for is looked at, and where that one ties, more. What is found in some cells by one process and in
others by another is then, put together, what one process finds in all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from hedwig.index import codecs, kernel
from hedwig.index.exact import best_of

__all__ = ["Segment"]

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
    _by_code: kernel.Scan | None = field(init=False, repr=False)
    _by_original: kernel.Scan | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        codes = originals = None
        if kernel.is_available():
            originals = kernel.Scan(self.originals, self.starts)
            codes = kernel.Scan(self.codes, self.starts) if self.codec == "sq8" else originals
        object.__setattr__(self, "_by_original", originals)
        object.__setattr__(self, "_by_code", None if self.codec == "pq" else codes)

    def __len__(self) -> int:
        return len(self.codes)

    def search(self, x: Scores, wanted: Ints, top_k: int, rerank: int) -> tuple[Ints, Scores]:
        """The nearest vectors (B, M) of queries (B, D) in cells (B, K), by number; -1 and -inf where there are no more.

        Args:
            x: contiguous, finite.
            wanted: contiguous, in -1..C-1.
            top_k: M.
            rerank: how many are scored again on the originals, where the codes are not those.
        """
        if not self.is_coded:
            return self.candidates(x, wanted, top_k)
        found, _ = self.candidates(x, wanted, max(top_k, rerank))
        return best_of(found, self.scored(x, found), top_k)

    def search_one(self, query: Any, cells: Any, top_k: int) -> tuple[Ints, Scores] | None:
        """As `search` for one query (1, D), which need not be checked; None where the long way is to be gone."""
        scan = self._by_original
        if scan is None or self.is_coded or type(query) is not np.ndarray or type(cells) is not np.ndarray:
            return None
        return scan.one(query, cells, top_k)

    @property
    def is_coded(self) -> bool:
        """Whether what is found by the codes is to be scored again."""
        return codecs.is_coded(self.codec)

    def candidates(self, x: Scores, wanted: Ints, num: int) -> tuple[Ints, Scores]:
        """The nearest (B, num) by their codes, best first, ties by number; arguments as in `search`.

        Their scores compare with others of the same query: those of sq8 lack what all its candidates have in common.
        """
        if not len(x) or not wanted.shape[1] or not len(self):
            return np.full((len(x), num), -1, dtype=np.int64), np.full((len(x), num), -np.inf, dtype=np.float32)
        if self._by_code is not None:
            if self.codec == "sq8":  # of a component least + span (code + 1/2) / 255 only the code is the vector's
                x = x * (self.codebook[1] / np.float32(255))
            return self._by_code(x, wanted, num, num_threads=faiss.omp_get_max_threads())
        most = num + 1
        while True:
            numbers, scores = self._scan(x, wanted, most)
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
        parameters = faiss.SearchParametersIVF()
        parameters.nprobe = num_cells
        unused = np.zeros(wanted.size, dtype=np.float32)
        pointer = faiss.swig_ptr
        self._ivf.search_preassigned_c(
            num_queries, pointer(x), top_k, pointer(wanted), pointer(unused), pointer(scores), pointer(rows), True,
            parameters,
        )  # fmt: skip
        none = rows < 0
        rows = self.starts[rows >> 32] + (rows & 0xFFFFFFFF)
        if none.any():
            rows[none], scores[none] = -1, -np.inf
        return rows, scores

    @cached_property
    def _ivf(self) -> Any:
        """The index of FAISS whose lists are the cells."""
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
        return ivf

    def scored(self, x: Scores, found: Ints) -> Scores:
        """(B, n) inner products of queries (B, D) with the originals of vectors (B, n); -inf for -1.

        Without a kernel by einsum: a matrix product of NumPy's rounds by where in the matrix a vector stands.
        """
        if self._by_original is not None:
            return self._by_original.scores(x, found)
        scores = np.empty(found.shape, dtype=np.float32)
        for start in range(0, len(found), 64):  # 64 x 32 x 768 candidates are 6 MB
            some = slice(start, start + 64)
            candidates = self.originals[found[some].reshape(-1)].astype(np.float32)
            scores[some] = np.einsum("bnd,bd->bn", candidates.reshape(*found[some].shape, self.dim), x[some])
        return np.where(found < 0, np.float32(-np.inf), scores)


def _let_go(lists: Any, codes: NDArray[np.uint8]) -> None:
    lists.ptr = None
    del codes
