"""A small world of references for the tests of the index, and the naive search that they are held against."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

NUM_CELLS, DIM = 40, 32


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def references(num: int = 3000, dim: int = DIM, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, NUM_CELLS // 2, num) * 2  # odd cells stay empty
    return {
        "vectors": unit(rng.standard_normal((num, dim)) + rng.standard_normal((NUM_CELLS, dim))[cells]),
        "cell_ids": cells,
        "pano_ids": [f"p{i:05d}" for i in rng.permutation(num)],
        "lat": rng.uniform(-80, 80, num),
        "lon": rng.uniform(-180, 180, num),
    }


def naive(queries: np.ndarray, cells: np.ndarray, vectors: np.ndarray, owner: np.ndarray, num: int) -> np.ndarray:
    """The obvious way: per query, all rows of its cells, sorted by cosine."""
    rows = np.full((len(queries), num), -1)
    for b in range(len(queries)):
        members = [n for n in range(len(vectors)) if owner[n] in cells[b] and owner[n] >= 0]
        members.sort(key=lambda n: -float(queries[b] @ vectors[n]))
        rows[b, : len(members[:num])] = members[:num]
    return rows


def some_queries(num: int, dim: int = DIM, num_cells: int = 5, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cells = np.stack([rng.permutation(NUM_CELLS)[:num_cells] for _ in range(num)])
    return unit(rng.standard_normal((num, dim))), cells


def digests(folder: Path) -> dict[str, str]:
    """As a manifest lists them."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }
