"""The scan of fp16, fp32 and byte vectors by cell, compiled when it is first needed: reading memory is its only limit.

FAISS's loop over half-precision lists takes 127 ns a vector of 768 components where one core reads one in 90 (Sapphire
Rapids, 17 GB/s): it waits for memory that nobody has asked for. This one asks for the line that it will need two
vectors later, which takes 96 ns, and multiplies several queries that ask for the same cell while a stretch of it lies
in the cache, each component turned to fp32 once. `hedwig.index.kernel_code` writes it down for LLVM, which compiles it
for the processor that runs it in a fifth of a second; no compiler need be installed.

The sum over components has one order, whatever the processor's width, the place of the vector or the other queries:
the same query and vector have the same score, bit for bit, alone and in a batch, here and in a shard. Equal scores go
by number. LLVM takes 130 MB of memory, so it is imported only where vectors are opened.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hedwig.index.kernel_code import MOST

__all__ = ["Products", "Scan", "is_available"]

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


class Scan:
    """The scan of one array of vectors; its machine code is made here, so that the first search need not wait for it.

    Args:
        vectors: (n, D) float16, float32 or uint8, contiguous.
        starts: (C + 1,) int64; cell c holds the vectors ``starts[c]`` to ``starts[c + 1]``.
    """

    def __init__(self, vectors: NDArray[Any], starts: Ints) -> None:
        compiled = _compiled(vectors.dtype.name)
        self._one, self._scan, self._score = compiled.one, compiled.scan, compiled.score
        self._kept = vectors, starts  # whose addresses these are
        self._vectors, self._starts = vectors.ctypes.data, starts.ctypes.data
        self._dim, self._num_cells = vectors.shape[1], len(starts) - 1
        self._request = _Request(self._dim)

    def __call__(self, x: Scores, wanted: Ints, top_k: int, *, num_threads: int = 1) -> tuple[Ints, Scores]:
        """The nearest vectors of each query among those of its cells, by inner product in fp32.

        Args:
            x: (B, D) queries, contiguous.
            wanted: (B, K) int64, contiguous, none twice but -1, which is no cell. That they lie in -1..C-1 is for the
                caller to check: what they name is read.
            top_k: M.
            num_threads: at most, each with some of the queries.

        Returns:
            numbers: (B, M) int64, best first, ties by number; -1 where there are no more.
            scores: (B, M); -inf where the number is -1.

        Raises:
            ValueError: arrays of another shape or type.
        """
        if x.shape[1:] != (self._dim,) or wanted.shape[:-1] != x.shape[:1] or (x.dtype, wanted.dtype) != _TYPES:
            raise ValueError(
                f"x must be (B, {self._dim}) float32 and wanted (B, K) int64; got {x.shape} {x.dtype} and "
                f"{wanted.shape} {wanted.dtype}."
            )
        numbers = np.full((len(x), top_k), -1, dtype=np.int64)
        scores = np.full((len(x), top_k), -np.inf, dtype=np.float32)
        if num_threads > 1 and len(x) > 1:
            starts, asked = self._kept[1], wanted[wanted >= 0]
            num_vectors = int((starts[asked + 1] - starts[asked]).sum())
            num_threads = min(num_threads, len(x), num_vectors // _WORTH_A_THREAD)
        if num_threads < 2 or len(x) < 2:
            self._some(x, wanted, numbers, scores)
        else:
            bounds = np.linspace(0, len(x), num_threads + 1).astype(int).tolist()
            parts = [slice(first, stop) for first, stop in pairwise(bounds)]
            with ThreadPoolExecutor(num_threads) as pool:
                list(pool.map(lambda part: self._some(x[part], wanted[part], numbers[part], scores[part]), parts))
        return numbers, scores

    def one(self, query: NDArray[Any], wanted: NDArray[Any], top_k: int) -> tuple[Ints, Scores] | None:
        """The same for one query (1, D) and its cells (1, K), whatever they hold: values are checked here.

        What a scan has read has driven Python's own memory out of the cache, and then every call of NumPy's costs
        microseconds: checks and answers by NumPy took 66 us a search beside 230 of scanning, these take 25.

        Returns:
            As above; None for any other shape, for a query that is not finite or a cell that is not there, and where
            more is asked than this can do: the long way tells what is wrong, or does it.
        """
        if query.shape != (1, self._dim) or wanted.ndim != 2 or wanted.shape[0] != 1 or not 0 < top_k <= MOST:
            return None
        num_asked = wanted.shape[1]
        if num_asked > MOST:
            return None
        request = self._request
        request.query[:], request.cells[:, :num_asked] = query, wanted
        if self._one(self._vectors, self._dim, self._starts, self._num_cells, request.address, num_asked, top_k):
            return None
        return request.numbers[:, :top_k].copy(), request.scores[:, :top_k].copy()

    def scores(self, x: Scores, numbers: Ints) -> Scores:
        """(B, n) inner products of queries (B, D) with the vectors of these numbers (B, n); -inf for -1."""
        x, numbers = np.ascontiguousarray(x), np.ascontiguousarray(numbers)
        found = np.empty(numbers.shape, dtype=np.float32)
        self._score(
            self._vectors, self._dim, numbers.ctypes.data, len(numbers), numbers.shape[1], x.ctypes.data,
            found.ctypes.data,
        )  # fmt: skip
        return found

    def _some(self, x: Scores, wanted: Ints, numbers: Ints, scores: Scores) -> None:
        if len(x) == 1 and wanted.size <= len(_FIRST):
            cells, asking = wanted, _FIRST
        else:  # whoever asks for the same cell stands together
            order = np.argsort(wanted, axis=None, kind="stable")
            cells, asking = wanted.reshape(-1)[order], order // wanted.shape[1]
        self._scan(
            self._vectors, self._dim, self._starts, cells.ctypes.data, asking.ctypes.data, cells.size, x.ctypes.data,
            numbers.shape[1], numbers.ctypes.data, scores.ctypes.data,
        )  # fmt: skip


class Products:
    """The products of a few vectors with every row of a matrix, such as the weights of a layer.

    Args:
        rows: (n, D) float16 or float32, contiguous.
    """

    def __init__(self, rows: NDArray[Any]) -> None:
        self._every = _compiled(rows.dtype.name).every
        self._kept, self._rows, self._shape = rows, rows.ctypes.data, rows.shape

    def __call__(self, x: Scores) -> Scores:
        """(B, n) in fp32; a product is the same bits whatever else is in the batch.

        Raises:
            ValueError: x is not (B, D) float32.
        """
        num, dim = self._shape
        if x.ndim != 2 or x.shape[1] != dim or x.dtype != np.float32:
            raise ValueError(f"x must be (B, {dim}) float32; got {x.shape} {x.dtype}.")
        x = np.ascontiguousarray(x)
        found = np.empty((len(x), num), dtype=np.float32)
        self._every(self._rows, dim, num, len(x), x.ctypes.data, found.ctypes.data)
        return found


class _Request(threading.local):
    """A block of memory that every thread has for itself, as `kernel_code` wants it: an address that is known."""

    def __init__(self, dim: int) -> None:
        block = np.zeros(MOST * 20 + dim * 4, dtype=np.uint8)
        self.address = block.ctypes.data
        self.cells, self.numbers = block[: MOST * 16].view(np.int64).reshape(2, 1, MOST)
        self.scores = block[MOST * 16 : MOST * 20].view(np.float32)[None]
        self.query = block[MOST * 20 :].view(np.float32)[None]


_TYPES = (np.dtype(np.float32), np.dtype(np.int64))
_FIRST: Ints = np.zeros(4096, dtype=np.int64)
_compiling = threading.Lock()


class _Functions(NamedTuple):
    """What `kernel_code` wrote down, to be called."""

    one: Callable[..., int]
    scan: Callable[..., None]
    score: Callable[..., None]
    every: Callable[..., None]


def _compiled(stored: str) -> _Functions:
    """The machine code for vectors of this type; one thread makes it, the others wait."""
    with _compiling:
        return _compile(stored)


@cache
def _compile(stored: str, cpu: str = "") -> _Functions:
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
    _engines.append(engine)
    address, number = ctypes.c_void_p, ctypes.c_int64

    def function(name: str, result: Any, *taken: Any) -> Any:
        return ctypes.CFUNCTYPE(result, *taken)(engine.get_function_address(name))

    return _Functions(
        one=function("one", number, address, number, address, number, address, number, number),
        scan=function(
            "scan", None, address, number, address, address, address, number, address, number, address, address
        ),
        score=function("score", None, address, number, address, number, number, address, address),
        every=function("every", None, address, number, number, number, address, address),
    )


_engines: list[Any] = []  # whose memory the machine code is
