"""Writing and reading vectors as our tables hold them, against lists of numbers in the same file format.

Files are written into a stream that only counts, and read from memory, so that no disk decides. ``binary`` is
`hedwig.storage.write_parquet` and `hedwig.vectors`, ``list`` a fixed-size list stored as plain as Parquet can,
``default`` the same list with pyarrow's own settings (dictionary, snappy). Each is read to an (N, D) array.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hedwig.benchmark.timing import interleaved

__all__ = ["table_benchmark"]


def table_benchmark(
    num: int = 50_000, dim: int = 768, *, dtype: str = "float32", num_rounds: int = 3
) -> dict[str, float]:
    """Ratios of CPU seconds to write and to read `num` vectors of `dim` components, and the sizes of the files.

    Args:
        num: N.
        dim: D.
        dtype: float32 or float16.
        num_rounds: medians are over so many.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hedwig.schema import vector_field
    from hedwig.storage import write_parquet
    from hedwig.vectors import read_vectors, vector_array

    values = np.random.default_rng(0).standard_normal((num, dim), dtype=np.float32).astype(dtype)
    field = vector_field("v", dim, dtype)
    binary = pa.Table.from_arrays([vector_array(values, field)], schema=pa.schema([field]))
    lists = pa.table({"v": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dim)})
    plain = {"use_dictionary": False, "compression": "NONE"}

    sinks = {"list": pa.BufferOutputStream(), "default": pa.BufferOutputStream(), "binary": pa.BufferOutputStream()}
    pq.write_table(lists, sinks["list"], **plain)
    pq.write_table(lists, sinks["default"])
    write_parquet(binary, sinks["binary"])
    files = {name: sink.getvalue() for name, sink in sinks.items()}

    def read_binary() -> NDArray[np.generic]:
        return read_vectors(pq.read_table(pa.BufferReader(files["binary"]), use_threads=False), "v")

    def read_lists(name: str) -> NDArray[np.generic]:
        column = pq.read_table(pa.BufferReader(files[name]), use_threads=False)["v"]
        chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
        return (chunks[0] if len(chunks) == 1 else np.concatenate(chunks)).reshape(-1, dim)

    each = interleaved(
        {
            "write_binary": lambda: write_parquet(binary, pa.MockOutputStream()),
            "write_list": lambda: pq.write_table(lists, pa.MockOutputStream(), **plain),
            "write_default": lambda: pq.write_table(lists, pa.MockOutputStream()),
            "read_binary": read_binary,
            "read_list": lambda: read_lists("list"),
            "read_default": lambda: read_lists("default"),
        },
        num_rounds,
    )
    size = values.nbytes
    return {
        "write_ratio_to_list": each["write_list"] / each["write_binary"],
        "read_ratio_to_list": each["read_list"] / each["read_binary"],
        "write_ratio_to_default": each["write_default"] / each["write_binary"],
        "read_ratio_to_default": each["read_default"] / each["read_binary"],
        "write_mb_per_cpu_s": size / each["write_binary"] / 1e6,
        "read_mb_per_cpu_s": size / each["read_binary"] / 1e6,
        "bytes_ratio_to_list": files["binary"].size / files["list"].size,
        "equal": float(np.array_equal(read_binary(), values) and np.array_equal(read_lists("list"), values)),
    }
