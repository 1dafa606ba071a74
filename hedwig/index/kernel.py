"""The scan of fp16 and fp32 vectors by cell, compiled when it is first needed: reading memory is its only limit.

FAISS's loop over half-precision lists takes 127 ns a vector of 768 components where one core reads one in 90 (Sapphire
Rapids, 17 GB/s): it waits for memory that nobody has asked for. This one asks for the line that it will need two
vectors later, which takes 96 ns, and multiplies several queries that ask for the same cell while a stretch of it lies
in the cache, each component turned to fp32 once. `hedwig.index.kernel_code` writes it down for LLVM, which compiles it
for the processor that runs it in a fifth of a second; no compiler need be installed.

The sum over components has one order, whatever the processor's width, the place of the vector or the other queries:
the same query and vector have the same score, bit for bit, alone and in a batch, here and in a shard. Equal scores go
by number. LLVM takes 90 MB of memory, so it is imported only by those that search.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["is_available", "prepare", "scan"]

_WORTH_A_THREAD = 1 << 14  # vectors to be scanned, some 1.5 ms

Ints = NDArray[np.int64]
Scores = NDArray[np.float32]


@cache
def is_available() -> bool:
    """Whether this processor turns halves to floats and adds products by itself; without, the scan would be slow."""
    import llvmlite.binding as llvm

    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    features = llvm.get_host_cpu_features()
    return bool(features.get("f16c") and features.get("fma") and features.get("avx2"))


def prepare(stored: str) -> None:
    """Compile the scan of vectors of this type now, so that the first search need not wait for it."""
    _compiled(stored)


def scan(
    vectors: NDArray[Any], starts: Ints, x: Scores, wanted: Ints, top_k: int, *, num_threads: int = 1
) -> tuple[Ints, Scores]:
    """The nearest vectors of each query among those of its cells, by inner product in fp32.

    Args:
        vectors: (n, D) float16 or float32, contiguous.
        starts: (C + 1,) int64; cell c holds the vectors ``starts[c]`` to ``starts[c + 1]``.
        x: (B, D) queries, contiguous.
        wanted: (B, K) int64 in -1..C-1; -1 is no cell. Nothing here checks it.
        top_k: M.
        num_threads: at most, each with some of the queries.

    Returns:
        numbers: (B, M) int64, best first, ties by number; -1 where there are no more.
        scores: (B, M); -inf where the number is -1.
    """
    numbers = np.full((len(x), top_k), -1, dtype=np.int64)
    scores = np.full((len(x), top_k), -np.inf, dtype=np.float32)
    run = _compiled(vectors.dtype.name)

    def some(first: int, stop: int) -> None:
        cells = wanted[first:stop].reshape(-1)
        if stop - first == 1:
            asking = np.zeros(len(cells), dtype=np.int64)
        else:  # whoever asks for the same cell stands together
            order = np.argsort(cells, kind="stable")
            cells, asking = cells[order], order // wanted.shape[1]
        run(
            vectors.ctypes.data, vectors.shape[1], starts.ctypes.data, cells.ctypes.data, asking.ctypes.data,
            len(cells), x[first:stop].ctypes.data, top_k, numbers[first:stop].ctypes.data,
            scores[first:stop].ctypes.data,
        )  # fmt: skip

    num_threads = min(num_threads, len(x))
    if num_threads > 1:
        asked = wanted[wanted >= 0]
        num_threads = min(num_threads, int((starts[asked + 1] - starts[asked]).sum()) // _WORTH_A_THREAD)
    if num_threads < 2:
        some(0, len(x))
    else:
        bounds = np.linspace(0, len(x), num_threads + 1).astype(int).tolist()
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(some, bounds[:-1], bounds[1:]))
    return numbers, scores


_compiling = threading.Lock()


def _compiled(stored: str) -> Callable[..., None]:
    """The machine code for vectors of this type; one thread makes it, the others wait."""
    with _compiling:
        return _compile(stored)


@cache
def _compile(stored: str, cpu: str = "") -> Callable[..., None]:
    """For vectors of a type, and for another processor of this machine's family where a test asks for one."""
    import llvmlite.binding as llvm

    from hedwig.index.kernel_code import module_of

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu or llvm.get_host_cpu_name(), features="" if cpu else llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(str(module_of(stored)))
    module.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    kind = ctypes.CFUNCTYPE(None, pointer, number, pointer, pointer, pointer, number, pointer, number, pointer, pointer)
    function: Any = kind(engine.get_function_address("scan"))
    function.engine = engine  # whose memory the code is
    return function  # type: ignore[no-any-return]
