"""Near duplicates among images: two 64-bit hashes, and the pairs within a few bits of each other without N² work.

`perceptual_hash` is the usual DCT hash: it survives recompression, resizing and brightness, and sees a turned panorama
as another picture. `roll_hash` is for panoramas: it keeps only magnitudes along the horizon, so the same panorama
starting at another heading has the same hash. A hash says "the same picture", not "the same place": consecutive
panoramas of one drive are 18 or more bits apart in `roll_hash`, and stay.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from hedwig.panorama.resample import resize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["duplicate_groups", "near_duplicates", "perceptual_hash", "roll_hash"]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
_SIDE_PX, _TURN_PX = 32, 64
_CHUNK = 4_000_000  # pairs compared at a time: 100 MB


def perceptual_hash(image: NDArray[np.uint8]) -> np.uint64:
    """64 bits: the 8x8 lowest DCT coefficients of the 32x32 grey image against their median (without the mean).

    Source: C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2.1.

    Args:
        image: (H, W, 3) uint8.
    """
    from scipy.fft import dctn

    low = dctn(_grey(image, _SIDE_PX), norm="ortho")[:8, :8].ravel()
    return _packed(low > np.median(low[1:]))


def roll_hash(image: NDArray[np.uint8]) -> np.uint64:
    """64 bits of a panorama that do not change when it is turned about the vertical.

    The grey image of 32x64 px is transformed by a DCT down the columns and a DFT along the rows; turning changes only
    phases, so the magnitudes of the 8 lowest vertical and horizontal frequencies (without the mean) remain. A bit says
    whether the logarithm of one exceeds what its row and column together let expect.

    Args:
        image: (H, W, 3) uint8; 360 degrees wide.
    """
    from scipy.fft import dct

    rows = dct(_grey(image, _TURN_PX), axis=0, norm="ortho")[:8]
    levels = np.log1p(np.abs(np.fft.rfft(rows, axis=1))[:, 1:9])
    expected = levels.mean(axis=0) + levels.mean(axis=1)[:, None] - levels.mean()
    return _packed((levels > expected).ravel())


def near_duplicates(hashes: NDArray[np.uint64], max_bits: int = 8) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Pairs of hashes that differ in at most `max_bits` bits.

    The bits are cut into max_bits // 2 + 1 bands. Two hashes that near differ by at most one bit in at least one band
    (pigeonhole; Norouzi, Punjani and Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012), so it
    suffices to compare those that share a band up to one bit: 100,000 random hashes take seconds, not hours.

    Args:
        hashes: (N,) uint64.
        max_bits: 0 to 16.

    Returns:
        (M, 2) int64 row numbers, the smaller first, sorted; (M,) uint8 numbers of differing bits. Equal hashes are
        paired with the first of them only, so that ten thousand empty tiles are ten thousand pairs and not 50 million.

    Raises:
        ValueError: not a (N,) uint64 array, or max_bits out of range.
    """
    if hashes.ndim != 1 or hashes.dtype != np.uint64:
        raise ValueError(f"hashes must be a (N,) uint64 array, got {hashes.dtype} {hashes.shape}.")
    if not 0 <= max_bits <= 16:
        raise ValueError(f"max_bits is {max_bits}; it must lie in 0 to 16 of the 64 bits.")
    distinct, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    later = np.flatnonzero(first[group] != np.arange(len(hashes)))
    pairs = [np.stack([first[group[later]], later], axis=1)]
    for left, right in _candidates(distinct, max_bits):
        near = np.bitwise_count(distinct[left] ^ distinct[right]) <= max_bits
        pairs.append(np.sort(np.stack([first[left[near]], first[right[near]]], axis=1), axis=1))
    found = np.unique(np.concatenate(pairs), axis=0).astype(np.int64)
    return found, np.bitwise_count(hashes[found[:, 0]] ^ hashes[found[:, 1]])


def duplicate_groups(pairs: NDArray[np.int64], num: int) -> NDArray[np.int64]:
    """(num,) int64: for each row the first row that it hangs together with through pairs; itself where there is none.

    Args:
        pairs: (M, 2) row numbers.
        num: How many rows there are.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), dtype=np.int8), (pairs[:, 0], pairs[:, 1])), shape=(num, num))
    labels = connected_components(graph, directed=False)[1]
    first = np.full(num, num, dtype=np.int64)
    np.minimum.at(first, labels, np.arange(num))
    groups: NDArray[np.int64] = first[labels]
    return groups


def _candidates(hashes: NDArray[np.uint64], max_bits: int) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Pairs of row numbers, left < right, that agree in some band up to one bit; a pair may come several times."""
    num_bands = max_bits // 2 + 1
    edges = np.linspace(0, 64, num_bands + 1).astype(int)
    for low, high in itertools.pairwise(edges):
        keys = (hashes >> np.uint64(low)) & np.uint64(2 ** int(high - low) - 1)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        flips = [0, *(1 << bit for bit in range(high - low))] if max_bits else [0]
        for flip in flips:
            probe = keys ^ np.uint64(flip)
            begin = np.searchsorted(ordered, probe, side="left")
            count = np.searchsorted(ordered, probe, side="right") - begin
            yield from _expanded(order, begin, count)


def _expanded(
    order: NDArray[np.intp], begin: NDArray[np.intp], count: NDArray[np.intp]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Every row with every member of its bucket, in chunks; each pair once."""
    total = np.cumsum(count)
    start = 0
    while start < len(count):
        done = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, done + _CHUNK, side="right")))
        sizes = count[start:stop]
        left = np.repeat(np.arange(start, stop), sizes)
        within = np.arange(len(left)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        right = order[np.repeat(begin[start:stop], sizes) + within]
        keep = left < right
        yield left[keep], right[keep]
        start = stop


def _grey(image: NDArray[np.uint8], width_px: int) -> NDArray[np.float32]:
    """(32, width_px) grey levels."""
    image = np.require(image, requirements=["C", "W"])
    grey: NDArray[np.float32] = resize(image, _SIDE_PX, width_px) @ _LUMA
    return grey


def _packed(bits: NDArray[np.bool_]) -> np.uint64:
    return np.uint64(np.packbits(bits).view(">u8")[0])
