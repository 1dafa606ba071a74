"""The search on a GPU: one gathered product in torch for a group of queries.

The vectors of all cells that a group of queries asks are gathered and multiplied with all of these queries at once;
what a query did not ask for is masked. That computes more than is needed and reads every vector once, which is what a
GPU is limited by. faiss-gpu is not used: it would copy the lists into a form of its own. It has been run on the CPU
device only, against `exact_search`; its speed is not known.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GatheredProduct"]

GROUP_QUERIES = 64  # a group of the gathered product
Ints = NDArray[np.int64]
Scores = NDArray[np.float32]


class GatheredProduct:
    """The vectors of a segment on a device of torch, searched by gathered products.

    Args:
        vectors: (n, D) float16 or float32, sorted by cell.
        starts: (C + 1,) int64, see `Segment`.
        device: a device of torch.
    """

    def __init__(self, vectors: NDArray[Any], starts: Ints, device: str) -> None:
        self.device = device
        self._vectors = _shared(vectors).to(device)
        self._starts = starts

    def search(self, x: Scores, wanted: Ints, top_k: int) -> tuple[Ints, Scores]:
        """As `Segment.search`, exact for the stored vectors."""
        rows = np.full((len(x), top_k), -1, dtype=np.int64)
        scores = np.full((len(x), top_k), -np.inf, dtype=np.float32)
        for first in range(0, len(x), GROUP_QUERIES):
            some = slice(first, first + GROUP_QUERIES)
            found, score = self._group(x[some], wanted[some], top_k)
            rows[some, : found.shape[1]], scores[some, : found.shape[1]] = found, score
        rows[np.isneginf(scores)] = -1
        return rows, scores

    def _group(self, x: Scores, wanted: Ints, top_k: int) -> tuple[Ints, Scores]:
        import torch

        cells = np.unique(wanted[wanted >= 0])
        sizes = self._starts[cells + 1] - self._starts[cells]
        if not sizes.sum():
            return np.empty((len(x), 0), dtype=np.int64), np.empty((len(x), 0), dtype=np.float32)
        # Number i of cell c is row starts[c] + i: counted through, shifted by where each cell begins.
        begins = np.cumsum(sizes) - sizes
        numbers = np.arange(sizes.sum()) + np.repeat(self._starts[cells] - begins, sizes)
        asks = np.zeros((len(x), len(cells)), dtype=bool)
        query, place = np.nonzero(wanted >= 0)
        asks[query, np.searchsorted(cells, wanted[query, place])] = True
        with torch.inference_mode():
            gathered = self._vectors[torch.from_numpy(numbers).to(self.device)]
            queries = torch.from_numpy(x).to(self.device)
            scores = queries @ gathered.float().T
            owner = torch.from_numpy(np.repeat(np.arange(len(cells)), sizes)).to(self.device)
            scores.masked_fill_(~torch.from_numpy(asks).to(self.device)[:, owner], -torch.inf)
            best, which = scores.topk(min(top_k, len(numbers)), dim=1)
        return numbers[which.cpu().numpy()], best.cpu().numpy()


def _shared(vectors: NDArray[Any]) -> Any:
    """A tensor on the same memory; torch warns of arrays that it must not write, and nobody here writes."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(vectors)
