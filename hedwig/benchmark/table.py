"""Writing vectors as our tables do against the defaults of pyarrow."""

from __future__ import annotations

from typing import Any

import numpy as np

from hedwig.benchmark.timing import interleaved

__all__ = ["table_benchmark"]


def table_benchmark(num: int = 50_000, dim: int = 768, *, num_rounds: int = 3) -> dict[str, float]:
    """Writing vectors as plain Parquet lists, as our tables do, against pyarrow's default (dictionary, snappy)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(np.random.default_rng(0).standard_normal(num * dim, dtype=np.float32))
    table = pa.table({"v": pa.FixedSizeListArray.from_arrays(flat, dim)})

    def write(**options: Any) -> None:
        pq.write_table(table, pa.BufferOutputStream(), **options)

    each = interleaved(
        {"plain": lambda: write(use_dictionary=False, compression="NONE"), "default": lambda: write()}, num_rounds
    )
    return {"plain_write_vs_default": each["default"] / each["plain"]}
