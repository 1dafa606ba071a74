"""How a vector is kept: fp16, fp32, one byte per component (sq8) or one byte per eight of them (pq).

fp16 is the default: it reads half the bytes of fp32 and reading is the limit, and its answers are those of fp32. sq8
and pq are for indices that do not fit into memory: what they find is scored again on the fp16 originals, which lie in
a file of their own and of which only the candidates are read. Cell centres are not in the embedding space, so nothing
is coded as a residual. Formulas are FAISS's (`ScalarQuantizer` QT_8bit, `ProductQuantizer`).

What a codec learns does not depend on the order of arrival: sq8 keeps the extremes of every component, pq runs k-means
on rows at even distances in the index's own order, by one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import faiss
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BLOCK_ROWS",
    "PQ_SAMPLE",
    "Codec",
    "blocks",
    "check_codec",
    "code_bytes",
    "codebook_shape",
    "encode",
    "fit",
    "is_coded",
    "ivf",
    "sampled",
]

Codec = Literal["fp16", "fp32", "sq8", "pq"]
BLOCK_ROWS = 4096  # rows coded at a time, always from the first: a matrix product may round by its shape
PQ_SAMPLE = 16_384  # 64 a centroid, as many as FAISS asks for at least (39)
_PQ_CENTROIDS = 256
_PQ_ROUNDS = 12


def check_codec(codec: str) -> None:
    """Refuse an unknown codec by name."""
    if codec not in get_args(Codec):
        raise ValueError(f"Unknown codec {codec!r}; use one of {', '.join(get_args(Codec))}.")


def is_coded(codec: str) -> bool:
    """Whether originals lie beside the codes, and what is found by the codes is scored again on them."""
    return codec in ("sq8", "pq")


def code_bytes(codec: str, dim: int) -> int:
    """Bytes of one coded vector."""
    return {"fp16": 2 * dim, "fp32": 4 * dim, "sq8": dim, "pq": _num_parts(dim)}[codec]


def codebook_shape(codec: str, dim: int) -> tuple[int, ...]:
    """Of what was learnt, float32: sq8 (2, D) least and span; pq (parts, 256, D / parts) centroids; else nothing."""
    if codec == "sq8":
        return (2, dim)
    return (_num_parts(dim), _PQ_CENTROIDS, dim // _num_parts(dim)) if codec == "pq" else (0,)


def sampled(codec: str, num_rows: int) -> NDArray[np.int64]:
    """Which rows, in the index's order, `fit` needs: at even distances for pq, none for the others."""
    num = min(num_rows, PQ_SAMPLE) if codec == "pq" else 0
    return np.linspace(0, max(0, num_rows - 1), num).astype(np.int64)


def fit(
    codec: str, sample: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The codebook of `codebook_shape`.

    Args:
        codec: for fp16 and fp32 there is nothing to learn.
        sample: (n, D) vectors for pq.
        low: (D,) least of every component over all vectors, for sq8.
        high: (D,) largest, likewise.
    """
    dim = len(low)
    if codec == "sq8":
        return np.stack([low, high - low]).astype(np.float32)
    if codec != "pq":
        return np.empty(0, dtype=np.float32)
    quantiser = faiss.ProductQuantizer(dim, _num_parts(dim), 8)
    quantiser.cp.niter, quantiser.cp.verbose = _PQ_ROUNDS, False
    quantiser.cp.min_points_per_centroid = 1
    if len(sample) < _PQ_CENTROIDS:  # k-means wants a row for every centroid
        sample = np.resize(sample, (_PQ_CENTROIDS, dim)) if len(sample) else np.zeros((_PQ_CENTROIDS, dim), np.float32)
    with _one_thread():
        quantiser.train(np.ascontiguousarray(sample, dtype=np.float32))
    centroids: NDArray[np.float32] = faiss.vector_to_array(quantiser.centroids)
    return centroids.reshape(codebook_shape(codec, dim)).copy()


def encode(codec: str, vectors: NDArray[np.float32], codebook: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(n, code_bytes) uint8 codes of (n, D) vectors."""
    if codec in ("fp16", "fp32"):
        stored = np.ascontiguousarray(vectors, dtype=np.float16 if codec == "fp16" else np.float32)
        flat: NDArray[np.uint8] = stored.view(np.uint8).reshape(len(vectors), code_bytes(codec, vectors.shape[1]))
        return flat
    if codec == "sq8":
        least, span = codebook
        share = np.divide(vectors - least, span, out=np.zeros_like(vectors), where=span > 0)
        return np.asarray(np.clip(share, 0, 1) * 255).astype(np.uint8)
    quantiser = faiss.ProductQuantizer(vectors.shape[1], len(codebook), 8)
    faiss.copy_array_to_vector(codebook.reshape(-1), quantiser.centroids)
    with _one_thread():
        codes: NDArray[np.uint8] = quantiser.compute_codes(np.ascontiguousarray(vectors))
    return codes


def ivf(codec: str, dim: int, num_cells: int, codebook: NDArray[np.float32]) -> Any:
    """An empty FAISS index of this codec with `num_cells` lists, and a coarse quantiser that stays empty."""
    quantiser = faiss.IndexFlatIP(dim)  # the classifier does its work
    metric = faiss.METRIC_INNER_PRODUCT
    index: Any
    if codec == "fp32":
        index = faiss.IndexIVFFlat(quantiser, dim, num_cells, metric)
    elif codec == "pq":
        index = faiss.IndexIVFPQ(quantiser, dim, num_cells, _num_parts(dim), 8, metric)
        faiss.copy_array_to_vector(np.ascontiguousarray(codebook).reshape(-1), index.pq.centroids)
    else:
        kind = faiss.ScalarQuantizer.QT_fp16 if codec == "fp16" else faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(quantiser, dim, num_cells, kind, metric, False)
        if codec == "sq8":
            faiss.copy_array_to_vector(np.ascontiguousarray(codebook).reshape(-1), index.sq.trained)
    index.by_residual = False
    index.is_trained = True
    return index


def blocks(num_rows: int) -> Iterator[slice]:
    """Slices of `BLOCK_ROWS` rows."""
    for start in range(0, num_rows, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, num_rows))


def _num_parts(dim: int) -> int:
    """The most parts of at least eight components that divide D; of less for a D below eight."""
    return next(parts for parts in range(max(1, dim // 8), 0, -1) if dim % parts == 0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads of a matrix product may round differently: one makes the same bytes everywhere on one machine."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
