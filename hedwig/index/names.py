"""A million names as they lie in Arrow: read when they are asked for, not all at once.

`to_pylist` of a million names takes a third of a second and 100 MB at every opening; a search shows five of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

__all__ = ["Names"]

_FEW = 256  # from here on Arrow's own take is faster


class Names:
    """A read-only sequence of str that takes what NumPy would: a number, a slice, an array of numbers or booleans.

    Args:
        column: the names, without nulls.
    """

    def __init__(self, column: pa.ChunkedArray | pa.Array) -> None:
        chunked = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
        whole = chunked.cast(pa.large_string()).combine_chunks()
        self.column: pa.LargeStringArray = whole.combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole
        _, offsets, text = self.column.buffers()
        start = self.column.offset
        num = len(self.column)
        self._offsets: NDArray[np.int64] = (
            np.frombuffer(offsets, dtype=np.int64)[start : start + num + 1] if num else np.zeros(1, dtype=np.int64)
        )
        self._text = memoryview(text) if text is not None else memoryview(b"")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 65_536):
            yield from self.column.slice(start, 65_536).to_pylist()

    def __getitem__(self, which: Any) -> Any:
        """A str for one number; an object array of the same shape for several."""
        if isinstance(which, int | np.integer):
            number = int(which)
            if not -len(self) <= number < len(self):
                raise IndexError(f"There are {len(self)} names and none has the number {number}.")
            return self._name(number % len(self))
        if isinstance(which, slice):
            which = np.arange(len(self))[which]
        numbers = np.asarray(which)
        if numbers.dtype == np.bool_:
            numbers = np.flatnonzero(numbers)
        if numbers.size and not -len(self) <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"There are {len(self)} names; got {numbers.min()} to {numbers.max()}.")
        return self.at(np.where(numbers < 0, numbers + len(self), numbers))

    def at(self, rows: NDArray[Any]) -> NDArray[np.object_]:
        """Object array of the shape of `rows`: the name of each, None for -1."""
        found = np.empty(rows.size, dtype=object)
        if rows.size <= _FEW:
            name = self._name
            found[:] = [name(row) if row >= 0 else None for row in rows.reshape(-1).tolist()]
        else:
            flat = rows.reshape(-1)
            found[:] = self.column.take(pa.array(flat, mask=flat < 0)).to_pylist()
        return found.reshape(rows.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        whole = np.empty(len(self), dtype=object)
        whole[:] = self.column.to_pylist()
        return whole if dtype is None else whole.astype(dtype)

    def __eq__(self, other: object) -> Any:
        return np.asarray(self) == other

    __hash__ = None  # type: ignore[assignment]  # as an array

    def tolist(self) -> list[str]:
        """All of them."""
        return list(self.column.to_pylist())

    def lookup(self, names: ArrayLike) -> NDArray[np.int64]:
        """(n,) int64 numbers of the last occurrence of each of `names`; -1 for who is not there."""
        asked = pa.array(np.asarray(names, dtype=object).tolist(), pa.large_string())
        numbers = np.full(len(asked), -1, dtype=np.int64)
        where = pa.compute.index_in(self.column, asked).to_numpy(zero_copy_only=False)
        here = np.flatnonzero(np.isfinite(where.astype(np.float64)))
        numbers[where[here].astype(np.int64)] = here
        return numbers

    def _name(self, number: int) -> str:
        return str(self._text[self._offsets[number] : self._offsets[number + 1]], "utf-8")
