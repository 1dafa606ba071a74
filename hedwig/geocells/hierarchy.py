"""The coarser levels above the cells: country ⊃ admin-1 ⊃ cell, or merged clusters where there is no admin.

A parent is named by a path, so a finer name begins with the coarser one ("FR", "FR/Bretagne", "FR/Bretagne/01") and
the levels are nested by construction. A cell that reaches across a border has the parent of most of its panoramas.
Clusters come from halving the cells across their longest axis until each level has its share: the same cells give the
same names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedwig.geo import unit_vectors

__all__ = ["MAX_LEVELS", "MIN_LEVELS", "Level", "parent_names"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Strings = NDArray[np.object_]

MIN_LEVELS, MAX_LEVELS = 2, 4  # the cells are one of them
CLUSTER_CELLS = 8  # cells in a cluster below an admin-1 area, at most


@dataclass(frozen=True)
class Level:
    """One coarser level of C cells.

    Attributes:
        column: its column in the table of cells.
        names: (P,) object array of str, the parents in sorted order.
        parent: (C,) int64, row in `names` of each cell's parent.
    """

    column: str
    names: Strings
    parent: Ints

    @classmethod
    def of(cls, column: str, values: ArrayLike) -> Level:
        """The level that a column (C,) of names describes."""
        names, parent = np.unique(np.asarray(values).astype(str), return_inverse=True)
        return cls(column, names.astype(object), parent.reshape(-1).astype(np.int64))


def parent_names(country: ArrayLike, admin1: ArrayLike, lat: ArrayLike, lon: ArrayLike, levels: int) -> list[Strings]:
    """Names of the parents, coarsest first: levels - 1 arrays (C,) of str.

    With 2 levels the parents are countries, with 3 countries and admin-1 areas, with 4 also clusters of up to 8
    neighbouring cells within an admin-1 area. Where no cell has a country they are nested clusters of about
    C^(1/levels), C^(2/levels) ... parts; where none has an admin-1, clusters take its place.

    Args:
        country: codes (C,), "" unknown.
        admin1: names (C,), "" unknown.
        lat: degrees (C,) of the cells' means.
        lon: degrees (C,).
        levels: 2 to 4, the cells included.

    Raises:
        ValueError: another number of levels.
    """
    if not MIN_LEVELS <= levels <= MAX_LEVELS:
        raise ValueError(f"A hierarchy of geocells has {MIN_LEVELS} to {MAX_LEVELS} levels, not {levels}.")
    countries, areas = np.asarray(country).astype(str), np.asarray(admin1).astype(str)
    vectors = unit_vectors(lat, lon).reshape(-1, 3)
    names: list[Strings] = []
    if (countries != "").any():
        names.append(countries.astype(object))
        if levels > 2 and (areas != "").any():
            names.append(np.array([f"{c}/{a}" for c, a in zip(countries, areas, strict=True)], dtype=object))
        while len(names) < levels - 1:
            left = levels - 1 - len(names)
            names.append(_clusters_within(names[-1], vectors, CLUSTER_CELLS**left))
        return names
    for level in range(1, levels):
        parts = len(vectors) ** (level / levels)
        bits = _bisection(vectors, max(1, round(float(np.log2(max(parts, 1.0))))))
        names.append(np.array([f"cluster {path}" for path in bits], dtype=object))
    return names


def _clusters_within(parents: Strings, vectors: Floats, most: int) -> Strings:
    """Names (C,) of clusters of at most `most` cells inside each parent."""
    result = parents.copy()
    for name in np.unique(parents.astype(str)):
        cells = np.flatnonzero(parents == name)
        depth = max(0, int(np.ceil(np.log2(len(cells) / most))))
        result[cells] = [f"{name}/{path or '0'}" for path in _bisection(vectors[cells], depth)]
    return result


def _bisection(vectors: Floats, depth: int) -> list[str]:
    """Path of `depth` bits of each of (C, 3) vectors; a group of one cell is not halved further."""
    paths = [""] * len(vectors)
    groups = [np.arange(len(vectors))]
    for _ in range(depth):
        halves: list[Ints] = []
        for rows in groups:
            centred = vectors[rows] - vectors[rows].mean(axis=0)
            axis = np.linalg.eigh(centred.T @ centred)[1][:, -1]
            axis = axis * np.sign(axis[np.argmax(np.abs(axis))])  # eigenvectors have no sign of their own
            order = rows[np.argsort(centred @ axis, kind="stable")]
            cut = (len(order) + 1) // 2
            for bit, half in (("0", order[:cut]), ("1", order[cut:])):
                for row in half:
                    paths[row] += bit
                halves += [half] if len(half) else []
        groups = halves
    return paths
