"""Who is measured beside the geocell index, each as a function from queries and cells to row numbers.

All search the same vectors, sorted by cell. Those that know no cells search everything (brute force, k-means lists, a
graph): their answers count as wrong where the nearest is outside the cells that were asked, for the retriever is told
the cells by a classifier. What a contender needs beside the vectors is made when it is asked for and dropped after.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from hedwig.index import GeocellIndex

__all__ = [
    "Contender",
    "World",
    "brute_force",
    "faiss_flat",
    "faiss_ivf",
    "faiss_ivf_fp16",
    "hnsw",
    "kmeans_ivf",
    "ours",
    "synthetic",
]

KMEANS_SAMPLE, KMEANS_ROUNDS = 65_536, 6
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 16, 100, 64
_BLOCK = 50_000
IN_TOP_CELLS = 0.88  # how often the classifier's cells hold the true one

Ints = NDArray[np.int64]
Search = Callable[[NDArray[np.float32], Ints], Ints]


@dataclass(frozen=True, eq=False)
class World:
    """References sorted by cell, and queries near some of them with the cells that are asked.

    Attributes:
        vectors: (N, D) unit vectors.
        cells: (N,) int64, ascending.
        starts: (C + 1,) where each cell begins.
        queries: (Q, D).
        asked: (Q, K) int64, none twice.
        nearest: (Q,) row of the exactly nearest reference inside the asked cells; -1 where they are empty.
        candidates: mean number of references in the asked cells.
    """

    vectors: NDArray[np.float32]
    cells: Ints
    starts: Ints
    queries: NDArray[np.float32]
    asked: Ints
    nearest: Ints
    candidates: float


@dataclass(frozen=True)
class Contender:
    """One method: its name, what it keeps per vector, and how it answers."""

    method: str
    bytes_per_vector: float
    search: Search
    exhaustive: bool = False  # too slow for as many queries as the others


def synthetic(num: int, dim: int, num_cells: int, probe: int, num_queries: int, seed: int = 0) -> World:
    """Clustered unit vectors in cells of lognormal size (240k in 2,000: median 53, p99 1,000, largest 3,000)."""
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(0, 1.29, num_cells)
    share = sizes / sizes.sum()
    cells = np.sort(rng.choice(num_cells, num, p=share)).astype(np.int64)
    centres = rng.standard_normal((num_cells, dim), dtype=np.float32)
    vectors = np.empty((num, dim), dtype=np.float32)
    for start in range(0, num, _BLOCK):
        block = rng.standard_normal((min(_BLOCK, num - start), dim), dtype=np.float32)
        block += centres[cells[start : start + _BLOCK]]
        vectors[start : start + _BLOCK] = block / np.linalg.norm(block, axis=1, keepdims=True)
    starts = np.searchsorted(cells, np.arange(num_cells + 1)).astype(np.int64)
    some = rng.choice(num, num_queries)
    queries = vectors[some] + float(0.5 / np.sqrt(dim)) * rng.standard_normal((num_queries, dim), dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    asked = np.empty((num_queries, probe), dtype=np.int64)
    for number, true in enumerate(cells[some]):
        others = rng.choice(num_cells, probe + 1, replace=False, p=share)
        others = others[others != true][:probe]
        asked[number] = others
        if rng.random() < IN_TOP_CELLS:
            asked[number, 0] = true
    nearest = np.full(num_queries, -1, dtype=np.int64)
    counts = np.diff(starts)[asked].sum(axis=1)
    for number in np.flatnonzero(counts).tolist():
        rows = np.concatenate([np.arange(starts[c], starts[c + 1]) for c in asked[number]])
        nearest[number] = rows[np.argmax(vectors[rows] @ queries[number])]
    return World(vectors, cells, starts, queries, asked, nearest, float(counts.mean()))


def ours(index: GeocellIndex, top_k: int, bytes_per_vector: float) -> Contender:
    """The geocell index, by its own search."""
    return Contender(
        f"hedwig {index.codec}", bytes_per_vector, lambda x, cells: index.search_rows(x, cells, top_k, num_threads=1)[0]
    )


def brute_force(world: World, top_k: int) -> Contender:
    """One matrix product with every reference, by NumPy."""

    def search(x: NDArray[np.float32], _: Ints) -> Ints:
        scores = (world.vectors @ x[0])[None] if len(x) == 1 else x @ world.vectors.T
        top = np.argpartition(scores, -top_k, axis=1)[:, -top_k:]
        best = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1)
        return np.take_along_axis(top, best, axis=1)

    return Contender("numpy brute force", 4.0 * world.vectors.shape[1], search, exhaustive=True)


def faiss_flat(world: World, top_k: int) -> Contender:
    """FAISS over every reference, with its default settings; `knn` is what IndexFlatIP calls, without its copy."""

    def search(x: NDArray[np.float32], _: Ints) -> Ints:
        rows: Ints = faiss.knn(x, world.vectors, top_k, metric=faiss.METRIC_INNER_PRODUCT)[1]
        return rows

    return Contender("faiss flat", 4.0 * world.vectors.shape[1], search, exhaustive=True)


def faiss_ivf(world: World, top_k: int) -> Contender:
    """IndexIVFFlat whose lists are the geocells, in memory of FAISS's own."""
    dim, num_cells = world.vectors.shape[1], len(world.starts) - 1
    ivf: Any = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, num_cells, faiss.METRIC_INNER_PRODUCT)
    return _filled(ivf, "faiss IVFFlat geocells fp32", 4.0 * dim + 8, world, top_k)


def faiss_ivf_fp16(world: World, top_k: int) -> Contender:
    """The same with the halves that our index has."""
    dim, num_cells = world.vectors.shape[1], len(world.starts) - 1
    kind, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    ivf: Any = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, num_cells, kind, metric, False)
    return _filled(ivf, "faiss IVF geocells fp16", 2.0 * dim + 8, world, top_k)


def _filled(ivf: Any, method: str, bytes_per_vector: float, world: World, top_k: int) -> Contender:
    ivf.is_trained = True
    for start in range(0, len(world.vectors), _BLOCK):
        block, cells = world.vectors[start : start + _BLOCK], world.cells[start : start + _BLOCK]
        numbers = np.arange(start, start + len(block))
        ivf.add_core(len(block), faiss.swig_ptr(block), faiss.swig_ptr(numbers), faiss.swig_ptr(cells))

    def search(x: NDArray[np.float32], cells: Ints) -> Ints:
        ivf.nprobe = cells.shape[1]
        rows: Ints = ivf.search_preassigned(x, top_k, cells, np.zeros(cells.shape, dtype=np.float32))[1]
        return rows

    return Contender(method, bytes_per_vector, search)


def kmeans_ivf(world: World, top_k: int) -> Contender:
    """IndexIVFFlat with as many k-means lists as there are cells, and as many of them searched."""
    dim, num_lists = world.vectors.shape[1], len(world.starts) - 1
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 20  # else FAISS 1.15 trains seven times as long
    try:
        ivf: Any = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, num_lists, faiss.METRIC_INNER_PRODUCT)
        ivf.cp.niter, ivf.cp.min_points_per_centroid = KMEANS_ROUNDS, 1
        step = max(1, len(world.vectors) // KMEANS_SAMPLE)
        ivf.train(np.ascontiguousarray(world.vectors[::step][:KMEANS_SAMPLE]))
        for start in range(0, len(world.vectors), _BLOCK):
            ivf.add(world.vectors[start : start + _BLOCK])
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
    ivf.nprobe = world.asked.shape[1]

    def search(x: NDArray[np.float32], _: Ints) -> Ints:
        rows: Ints = ivf.search(x, top_k)[1]
        return rows

    return Contender("faiss IVFFlat k-means", 4.0 * dim + 8, search)


def hnsw(world: World, top_k: int) -> Contender | None:
    """A graph over every reference by hnswlib; None where that is not installed."""
    if importlib.util.find_spec("hnswlib") is None:
        return None
    import hnswlib  # type: ignore[import-not-found,import-untyped,unused-ignore]

    num, dim = world.vectors.shape
    graph = hnswlib.Index(space="ip", dim=dim)
    graph.init_index(max_elements=num, M=HNSW_LINKS, ef_construction=HNSW_BUILD, random_seed=0)
    graph.add_items(world.vectors, np.arange(num))  # by all cores: only the search is measured
    graph.set_num_threads(1)
    graph.set_ef(HNSW_SEARCH)

    def search(x: NDArray[np.float32], _: Ints) -> Ints:
        rows: Ints = graph.knn_query(x, top_k)[0].astype(np.int64)
        return rows

    return Contender("hnswlib", 4.0 * dim + 8.0 * HNSW_LINKS + 16, search)
