"""Resampling of queries with replacement, for every interval that has no formula; equal seeds give equal draws.

A resampling is kept as how often each row was drawn: every mean becomes one matrix product and the median one scan of
cumulative counts, so a thousand resamplings of ten statistics cost about as much as drawing the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["percentile_interval", "resample", "resampled_median"]

Floats = NDArray[np.float64]

_CHUNK_ELEMENTS = 1 << 20  # one resampling matrix of 8 MiB stays in the cache while ten statistics read it


def resampled_median(ordered: Floats, cumulative: Floats) -> Floats:
    """(R,) medians of R resamplings of (N,) ascending errors, given the (R, N) cumulative counts of each row."""
    num_rows = len(ordered)
    middle = [ordered[(cumulative <= position).sum(axis=1)] for position in ((num_rows - 1) // 2, num_rows // 2)]
    return np.asarray((middle[0] + middle[1]) / 2)


def percentile_interval(
    statistics: Callable[[Floats], Floats], num_rows: int, num_bootstrap: int, seed: int
) -> tuple[Floats, Floats]:
    """2.5 and 97.5 percentiles, (S,) each, of `statistics`: (R, N) counts of how often a row was drawn -> (R, S)."""
    low, high = np.quantile(resample(statistics, num_rows, num_bootstrap, seed), [0.025, 0.975], axis=0)
    return low, high


def resample(statistics: Callable[[Floats], Floats], num_rows: int, num_bootstrap: int, seed: int) -> Floats:
    """(num_bootstrap, S) `statistics` of as many resamplings; see `percentile_interval`."""
    if num_bootstrap < 1:
        raise ValueError(f"num_bootstrap must be at least 1, got {num_bootstrap}.")
    return np.concatenate([statistics(counts) for counts in _resamplings(num_rows, num_bootstrap, seed)])


def _resamplings(num_rows: int, num_bootstrap: int, seed: int) -> Iterator[Floats]:
    """Chunks (R, N) of counts; counts instead of drawn rows turn every mean into a GEMM and the median into a scan."""
    rng = np.random.default_rng(seed)
    per_chunk = max(1, _CHUNK_ELEMENTS // num_rows)
    for start in range(0, num_bootstrap, per_chunk):
        num_drawn = min(per_chunk, num_bootstrap - start)
        rows = rng.integers(0, num_rows, size=(num_drawn, num_rows))
        rows += np.arange(num_drawn)[:, None] * num_rows
        counts = np.bincount(rows.ravel(), minlength=num_drawn * num_rows)
        yield counts.reshape(num_drawn, num_rows).astype(np.float64)
