"""Whitened embeddings: every direction counts alike, so that what all panoramas share stops deciding who is similar.

Backbone embeddings lie in a narrow cone: a common mean and a few directions (sky, road, season) make up most of every
cosine. The mean of the training vectors is taken off, their principal axes are scaled to equal variance (Jégou & Chum,
ECCV 2012), and the result goes back to unit norm. Axes of little variance are mostly noise; the covariance is
therefore shrunk towards a multiple of the identity first, by default as much as Ledoit & Wolf (2004) find best. It is
fitted on references only, once, and a query is treated by the very same numbers, row by row, so that it does not
depend on who else is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

__all__ = ["WHITENING_FILE", "Whitening"]

WHITENING_FILE = "whitening.safetensors"
MAX_FIT_ROWS = 100_000  # evenly spaced; a covariance of a thousand dimensions is known well by then


@dataclass(frozen=True, eq=False)
class Whitening:
    """x -> (x - mean) matrix, at unit norm.

    Attributes:
        mean: (D,) of the references.
        matrix: (D, D') principal axes divided by their standard deviations, widest axis first.
    """

    mean: NDArray[np.float32]
    matrix: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.matrix.ndim != 2 or len(self.mean) != len(self.matrix):
            raise ValueError(f"mean must be (D,) and matrix (D, D'); got {self.mean.shape} and {self.matrix.shape}.")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.matrix).all()):
            raise ValueError("A whitening must be finite; run `hedwig index` again.")

    @classmethod
    def fit(cls, vectors: ArrayLike, *, dim: int | None = None, shrinkage: float | None = None) -> Whitening:
        """Learn from (N, D) references, or (N, V, D) those of every frame.

        Args:
            vectors: in an order that is always the same for the same references; sums depend on it in the last digit.
            dim: D', how many axes to keep; None keeps all.
            shrinkage: 0 trusts the covariance, 1 replaces it by a multiple of the identity; None is Ledoit and Wolf's.

        Raises:
            ValueError: fewer than two vectors, more axes than dimensions, a shrinkage out of [0, 1].
        """
        x = np.asarray(vectors, dtype=np.float64)
        x = x.reshape(-1, x.shape[-1])
        x = x[:: max(1, -(-len(x) // MAX_FIT_ROWS))]
        width = x.shape[1]
        if len(x) < 2 or not (dim is None or 1 <= dim <= width):
            raise ValueError(
                f"Whitening needs at least two references and whiten_dim in 1..{width}; got {len(x)}, {dim}."
            )
        if not (shrinkage is None or 0 <= shrinkage <= 1):
            raise ValueError(f"whiten_shrinkage must lie in [0, 1] or be left out, got {shrinkage}.")
        mean = x.mean(axis=0)
        x = x - mean
        if shrinkage is None:
            from sklearn.covariance import ledoit_wolf_shrinkage

            shrinkage = float(ledoit_wolf_shrinkage(x, assume_centered=True))
        covariance = x.T @ x / len(x)
        average = np.trace(covariance) / width
        if average <= 0:
            raise ValueError(f"All {len(x)} references are equal; there is nothing to whiten.")
        values, axes = np.linalg.eigh((1 - shrinkage) * covariance + shrinkage * average * np.eye(width))
        values, axes = values[::-1][:dim], axes[:, ::-1][:, :dim]
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])  # else LAPACK's choice
        deviations = np.sqrt(np.maximum(values, 1e-12 * average))  # without shrinkage an axis may have no variance
        return cls(mean.astype(np.float32), (axes / deviations).astype(np.float32))

    def __call__(self, vectors: ArrayLike) -> NDArray[np.float32]:
        """(..., D) to (..., D') of unit norm; a vector equal to the mean becomes zeros.

        Raises:
            ValueError: vectors of another width.
        """
        x = np.asarray(vectors, dtype=np.float32)
        if x.ndim < 2 or x.shape[-1] != len(self.mean):
            raise ValueError(f"vectors must be (B, ..., {len(self.mean)}), got {x.shape}; another encoder made them?")
        y = np.empty((*x.shape[:-1], self.matrix.shape[1]), dtype=np.float32)
        for b in range(len(x)):  # one product for all rows rounds otherwise than one for each
            y[b] = (x[b] - self.mean) @ self.matrix
        norms = np.linalg.norm(y, axis=-1, keepdims=True)
        return np.asarray(y / np.where(norms > 0, norms, 1), dtype=np.float32)

    def save(self, folder: Path) -> None:
        """Write ``whitening.safetensors``."""
        save_file({"mean": self.mean, "matrix": np.ascontiguousarray(self.matrix)}, folder / WHITENING_FILE)

    @classmethod
    def load(cls, folder: Path) -> Whitening:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a whitening.
        """
        path = folder / WHITENING_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; run `hedwig index` again.")
        try:
            found = load_file(path)
            return cls(found["mean"], found["matrix"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a whitening ({error}); run `hedwig index` again.") from error
