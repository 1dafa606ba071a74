"""Search in a few geocells against one matrix product with every reference, and whether it finds the same."""

from __future__ import annotations

import numpy as np

from hedwig.benchmark.timing import interleaved

__all__ = ["index_benchmark"]


def index_benchmark(
    num: int = 100_000, dim: int = 256, *, num_cells: int = 1000, num_rounds: int = 5
) -> dict[str, float]:
    """Cell-then-neighbour search by the geocell index (fp16) against one matrix product with every reference."""
    from hedwig.index import GeocellIndex, exact_search

    rng = np.random.default_rng(0)
    sizes = rng.pareto(1.2, num_cells) + 0.2
    cells = rng.choice(num_cells, num, p=sizes / sizes.sum())
    vectors = rng.standard_normal((num, dim), dtype=np.float32) + rng.standard_normal((num_cells, dim))[cells]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    places = np.zeros(num)
    names = [f"{i:08d}" for i in range(num)]
    index = GeocellIndex.build(vectors, cells, names, places, places, num_cells=num_cells)
    some = rng.choice(num, 64, replace=False)
    queries = vectors[some] + 0.1 * rng.standard_normal((64, dim)).astype(np.float32)
    asked = np.column_stack([cells[some], rng.integers(0, num_cells, (64, 4))])
    asked[:, 1:][asked[:, 1:] == asked[:, :1]] = -1

    def one_by_one() -> None:
        for query, some_cells in zip(queries, asked, strict=True):
            index.search(query[None], some_cells[None], 5, num_threads=1)

    def brute_force() -> None:
        for query in queries:
            np.argmax(vectors @ query)

    each = interleaved({"index": one_by_one, "brute_force": brute_force}, num_rounds)
    found, _ = index.search(queries, asked, 1)
    order = np.lexsort((np.array(names), cells))
    exact, _ = exact_search(queries, asked, vectors[order], cells[order], 1)
    return {
        "index_vs_brute_force": each["brute_force"] / each["index"],
        "recall_at_1_in_cells": float((found[:, 0] == exact[:, 0]).mean()),
        "index_ms_per_query": 1000 * each["index"] / len(queries),
    }
