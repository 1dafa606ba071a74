"""PIGEON's refinement: the references of a cell fall into clusters, and the query goes to the cluster it resembles.

Inside each cell OPTICS groups the references by where they are (min_samples 3, xi 0.15 in PIGEON, Haas et al. 2024;
100 and 0.1 in PIGEOTTO), noise is left out, and a cluster's prototype is the mean of its vectors. A cell where OPTICS
sees no cluster is one. A query takes the cell with the largest p(cell) x softmax(-distance to its nearest prototype /
1.6), and within the winning cluster the *nearest* member: the released code takes the farthest there. An answer more
than 1000 km from the most probable cell's centroid is not believed; that cell's own nearest prototype answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hedwig.geo import EARTH_RADIUS_KM, unit_vectors
from hedwig.geocells.admin import OPTICS_CAP, optics_order
from hedwig.index import GeocellIndex

__all__ = ["PROTOTYPES_FILE", "Prototypes"]

PROTOTYPES_FILE = "prototypes.safetensors"
NEAREST_KM = 1e-5  # PIGEON's stand-in for no distance at all, which has no ratio to another

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Clusters of an index's references, each inside one geocell.

    Attributes:
        vectors: (P, D) mean vector of each cluster; not of unit norm.
        cell_ids: (P,) int32, ascending.
        clusters: (N,) int32, row of `vectors` that each reference belongs to, in index order; -1 is noise.
        num_cells: C, geocells, empty ones included.
    """

    vectors: NDArray[np.float32]
    cell_ids: NDArray[np.int32]
    clusters: NDArray[np.int32]
    num_cells: int

    def __post_init__(self) -> None:
        num, cells = len(self.vectors), self.cell_ids
        fits = self.vectors.ndim == 2 and cells.shape == (num,) and self.clusters.ndim == 1
        if not fits or (np.diff(cells) < 0).any() or (num and not 0 <= cells[0] <= cells[-1] < self.num_cells):
            raise ValueError("The prototypes do not fit together; run `hedwig index` again.")
        if len(self.clusters) and not -1 <= self.clusters.min() <= self.clusters.max() < num:
            raise ValueError("A reference belongs to a prototype that is not there; run `hedwig index` again.")
        object.__setattr__(self, "_starts", np.searchsorted(cells, np.arange(self.num_cells + 1)))
        object.__setattr__(self, "_squares", (self.vectors.astype(np.float64) ** 2).sum(axis=1))

    @classmethod
    def build(cls, index: GeocellIndex, *, min_samples: int = 3, xi: float = 0.15) -> Prototypes:
        """Cluster the references of each cell by place; the same index gives the same prototypes.

        Args:
            index: the references; where each has several vectors, their mean counts.
            min_samples: how many references make a cluster, at least 2.
            xi: how steep its edge is, in (0, 1).
        """
        if min_samples < 2 or not 0 < xi < 1:
            raise ValueError(f"prototype_min_samples={min_samples} must be at least 2 and prototype_xi={xi} in (0, 1).")
        if not index.is_compact:
            raise ValueError(
                "Prototypes need an index without additions and removals; build them of its `compacted()`."
            )
        vectors = index.vectors()
        if vectors.ndim == 3:
            vectors = vectors.mean(axis=1)
        km = EARTH_RADIUS_KM * unit_vectors(index.lat, index.lon)  # straight through the Earth: arcs, inside a cell
        clusters = np.full(len(index), -1, dtype=np.int32)
        means: list[NDArray[np.float32]] = []
        cells: list[int] = []
        starts = np.searchsorted(index.cell_ids, np.arange(index.num_cells + 1))
        for cell in range(index.num_cells):
            for block in _blocks(km, np.arange(starts[cell], starts[cell + 1])):
                groups = _groups(km[block], min_samples, xi)
                for group in range(groups.max() + 1):
                    members = block[groups == group]
                    clusters[members] = len(means)
                    means.append(vectors[members].mean(axis=0, dtype=np.float64).astype(np.float32))
                    cells.append(cell)
        stacked = np.stack(means) if means else np.empty((0, index.dim), dtype=np.float32)
        return cls(stacked, np.array(cells, dtype=np.int32), clusters, index.num_cells)

    def nearest(self, query: NDArray[np.float32], cells: Ints) -> tuple[Ints, Floats]:
        """The nearest prototype (K,) in each of the cells (K,) and its L2 distance from a query (D,).

        -1 and inf where the cell is -1 or has no prototype.
        """
        best, distance = np.full(len(cells), -1, dtype=np.int64), np.full(len(cells), np.inf)
        starts: Ints = self._starts  # type: ignore[attr-defined]
        squares: Floats = self._squares  # type: ignore[attr-defined]
        size = float(query.astype(np.float64) @ query)
        for k, cell in enumerate(cells.tolist()):
            start, stop = (int(starts[cell]), int(starts[cell + 1])) if cell >= 0 else (0, 0)
            if start < stop:
                away = size + squares[start:stop] - 2 * (self.vectors[start:stop] @ query).astype(np.float64)
                best[k] = start + int(away.argmin())
                distance[k] = np.sqrt(max(float(away.min()), 0.0))
        return best, distance

    def save(self, folder: Path) -> None:
        """Write ``prototypes.safetensors``."""
        arrays = {"vectors": self.vectors, "cell_ids": self.cell_ids, "clusters": self.clusters}
        save_file({**arrays, "num_cells": np.array([self.num_cells], dtype=np.int64)}, folder / PROTOTYPES_FILE)

    @classmethod
    def load(cls, folder: Path) -> Prototypes:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there are none.
            ValueError: these are not prototypes.
        """
        path = folder / PROTOTYPES_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; set retrieve.refine=prototype and run `hedwig index` again.")
        try:
            found = load_file(path)
            return cls(found["vectors"], found["cell_ids"], found["clusters"], int(found["num_cells"][0]))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} holds no prototypes ({error}); run `hedwig index` again.") from error


def _blocks(km: Floats, members: Ints) -> Iterator[Ints]:
    """The members, halved across their widest axis until OPTICS, which is quadratic, can have them."""
    if len(members) <= OPTICS_CAP:
        if len(members):
            yield members
        return
    axis = int(np.ptp(km[members], axis=0).argmax())
    along = members[np.argsort(km[members, axis], kind="stable")]
    for half in (along[: len(along) // 2], along[len(along) // 2 :]):
        yield from _blocks(km, np.sort(half))


def _groups(km: Floats, min_samples: int, xi: float) -> Ints:
    """Group (n,) of each point by OPTICS, -1 for noise; all in one where it finds none."""
    one = np.zeros(len(km), dtype=np.int64)
    if len(km) <= min_samples:
        return one
    order, reachability, predecessor = optics_order(km, min_samples)
    from sklearn.cluster import cluster_optics_xi  # takes two seconds to import, and few need it

    labels, _ = cluster_optics_xi(
        reachability=np.maximum(reachability, NEAREST_KM),
        predecessor=predecessor,
        ordering=order,
        min_samples=min_samples,
        xi=xi,
    )
    groups = np.asarray(labels, dtype=np.int64)
    return groups if groups.max() >= 0 else one
