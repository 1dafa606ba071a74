"""Search inside a few geocells: queries a second of every codec, beside what one would use instead.

Contenders are measured in groups that fit into memory, and the fp16 index is in every group: within one they take turns
round by round, so a ratio compares what ran in the same minutes. Everything runs on one thread. `qps`, `p50_ms` and
`p99_ms` are of the process's CPU time, because other work on the machine comes and goes; the same by the clock on the
wall stands beside them. The limit is reading: bytes of the vectors in the asked cells, over the bandwidth at which
NumPy sums the same file in the same rounds, is the least time a query can take.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import threadpoolctl  # type: ignore[import-untyped,unused-ignore]
import torch

from hedwig.benchmark import contenders as who
from hedwig.index import INDEX_FILE, GeocellIndex

__all__ = ["RetrievalFigures", "measure_retrieval"]

TOP_K = 5
Maker = Callable[[who.World, int], who.Contender | None]
FP16, IVF, FLAT = "hedwig fp16", "faiss IVFFlat geocells fp32", "faiss flat"
HNSW_MOST = 1_000_000  # more take tens of minutes to build
_EXHAUSTIVE_CALLS = {1: 3, 64: 1}  # per round; batches above 64 are left out: seconds a call


@dataclass(frozen=True)
class RetrievalFigures:
    """One measurement; ratios are medians over rounds, above 1 where the fp16 index is the faster one."""

    rows: list[dict[str, Any]]
    ratio_to_brute_force: float
    ratio_to_numpy_brute_force: float
    ratio_to_ivfflat: dict[int, float]
    bandwidth_gb_s: float
    share_of_bandwidth_limit: float
    candidates_per_query: float
    open_seconds: float
    open_cpu_seconds: float
    refused_seconds: float
    refused_cpu_seconds: float
    refused_mb: float
    num_vectors: int
    dim: int
    num_cells: int
    probe: int
    clock: str = "CPU time of the process, one thread; wall_ columns: wall clock"
    skipped: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def ratios(self) -> dict[str, float]:
        """What `make bench` shows."""
        return {
            "fp16_vs_faiss_flat": self.ratio_to_brute_force,
            **{f"fp16_vs_ivfflat_fp32_batch_{batch}": ratio for batch, ratio in self.ratio_to_ivfflat.items()},
            "fp16_recall_at_1_in_cells": self.rows[0]["recall_at_1"],
            "share_of_bandwidth_limit": self.share_of_bandwidth_limit,
        }

    def text(self) -> str:
        """For readers."""
        lines = [
            f"{self.num_vectors:,} x {self.dim} in {self.num_cells:,} cells, {self.probe} asked "
            f"({self.candidates_per_query:,.0f} vectors), best {TOP_K}, one thread, CPU time",
            f"  {'method':<30}{'batch':>6}{'queries/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'B/vector':>10}{'recall@1':>10}",
        ]
        lines += [
            f"  {r['method']:<30}{r['batch']:>6}{r['qps']:>12,.0f}{r['p50_ms']:>9.3f}{r['p99_ms']:>9.3f}"
            f"{r['bytes_per_vector']:>10,.0f}{r['recall_at_1']:>10.3f}"
            for r in self.rows
        ]
        ratios = ", ".join(f"{ratio:.2f} at batch {batch}" for batch, ratio in self.ratio_to_ivfflat.items())
        lines += [
            f"  fp16 against FAISS over everything {self.ratio_to_brute_force:,.0f}, against IVFFlat fp32 {ratios}",
            f"  {self.share_of_bandwidth_limit:.2f} of the limit that reading sets at {self.bandwidth_gb_s:.1f} GB/s",
            f"  opened in {self.open_seconds:.2f} s ({self.open_cpu_seconds:.2f} CPU s); one flipped bit refused in "
            f"{self.refused_seconds:.2f} s ({self.refused_cpu_seconds:.2f} CPU s) and {self.refused_mb:.0f} MB",
        ]
        return "\n".join(lines + [f"  left out: {reason}" for reason in self.skipped])


@dataclass
class _Times:
    """What one contender took at one batch size."""

    contender: who.Contender
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    per_round: list[float] = field(default_factory=list)  # CPU seconds a query
    right: int = 0
    num: int = 0

    def row(self, batch: int) -> dict[str, Any]:
        return {
            "method": self.contender.method,
            "batch": batch,
            "qps": batch * len(self.cpu) / sum(self.cpu),
            "p50_ms": 1000 * float(np.percentile(self.cpu, 50)),
            "p99_ms": 1000 * float(np.percentile(self.cpu, 99)),
            "bytes_per_vector": self.contender.bytes_per_vector,
            "recall_at_1": self.right / self.num,
            "num_calls": len(self.cpu),
            "wall_qps": batch * len(self.wall) / sum(self.wall),
            "wall_p50_ms": 1000 * float(np.percentile(self.wall, 50)),
            "wall_p99_ms": 1000 * float(np.percentile(self.wall, 99)),
        }


Times = dict[tuple[str, int], _Times]


def measure_retrieval(
    *,
    num_vectors: int = 240_000,
    num_cells: int = 2000,
    probe: int = 5,
    dim: int = 768,
    batches: tuple[int, ...] = (1, 64, 512),
    num_rounds: int = 5,
    num_queries: int = 1024,
    report: Callable[[str], object] = lambda _: None,
) -> RetrievalFigures:
    """Measure every contender on one synthetic world.

    Args:
        num_vectors: N.
        num_cells: C, of skewed sizes.
        probe: K, cells asked per query.
        dim: D.
        batches: queries at once.
        num_rounds: in each of them every contender of a group has its turn.
        num_queries: Q, different queries; batches are taken from them in turn.
        report: told what is going on.
    """
    with _one_thread(), tempfile.TemporaryDirectory(prefix="hedwig-bench-") as scratch:
        report("making vectors")
        world = who.synthetic(num_vectors, dim, num_cells, probe, num_queries)
        fp16, codes = _index(world, "fp16", Path(scratch) / "fp16"), Path(scratch) / "fp16" / INDEX_FILE
        reference = who.ours(fp16, TOP_K, 2 * dim)
        bandwidth: list[float] = []
        share: list[float] = []
        groups: list[Times] = []
        skipped = []
        every: list[list[Maker]] = [
            [who.brute_force, who.faiss_flat],
            [who.faiss_ivf, who.faiss_ivf_fp16],
            [who.kmeans_ivf],
            [who.hnsw],
            [_codec("sq8", scratch), _codec("pq", scratch)],
            [_codec("fp32", scratch)],
        ]
        for makers in every:
            if makers == [who.hnsw] and num_vectors > HNSW_MOST:
                skipped.append(f"hnswlib: {num_vectors:,} vectors take tens of minutes to build")
                continue
            report(f"building {', '.join(str(getattr(m, '__name__', m)) for m in makers)}")
            made = [contender for maker in makers if (contender := maker(world, TOP_K)) is not None]
            if not made:
                skipped.append("hnswlib: it is not installed")
                continue
            report("measuring")
            times = _measured([reference, *made], world, batches, num_rounds, codes, bandwidth)
            share += [
                world.candidates * 2 * dim / (gb_s * 1e9) / seconds
                for gb_s, seconds in zip(bandwidth[-num_rounds:], times[FP16, 1].per_round, strict=True)
            ]
            groups.append(times)
            del made
            gc.collect()
        opened = _opening(Path(scratch) / "fp16")
    flat, ivf = groups[0], groups[1]
    return RetrievalFigures(
        rows=_rows(groups, batches),
        ratio_to_brute_force=_ratio(flat, FLAT, 1),
        ratio_to_numpy_brute_force=_ratio(flat, "numpy brute force", 1),
        ratio_to_ivfflat={batch: _ratio(ivf, IVF, batch) for batch in batches},
        bandwidth_gb_s=statistics.median(bandwidth),
        share_of_bandwidth_limit=statistics.median(share),
        candidates_per_query=world.candidates,
        open_seconds=opened["open"][0],
        open_cpu_seconds=opened["open"][1],
        refused_seconds=opened["refused"][0],
        refused_cpu_seconds=opened["refused"][1],
        refused_mb=opened["refused"][2],
        num_vectors=num_vectors,
        dim=dim,
        num_cells=num_cells,
        probe=probe,
        skipped=skipped,
    )


def _measured(
    some: list[who.Contender],
    world: who.World,
    batches: tuple[int, ...],
    num_rounds: int,
    codes: Path,
    bandwidth: list[float],
) -> Times:
    """Rounds in which everybody has a turn at every batch size; the first, in which caches fill, does not count."""
    times: Times = {}
    memory = np.memmap(codes, dtype=np.uint64, mode="r")[: 1 << 27]
    for number in range(num_rounds + 1):
        start = time.process_time()
        memory.sum()
        seconds = time.process_time() - start
        if number:
            bandwidth.append(memory.nbytes / seconds / 1e9)
        for batch in batches:
            for contender in some:
                if contender.exhaustive and batch not in _EXHAUSTIVE_CALLS:
                    continue
                calls = _EXHAUSTIVE_CALLS[batch] if contender.exhaustive else max(1, min(256, 1024 // batch))
                kept = times.setdefault((contender.method, batch), _Times(contender))
                before = sum(kept.cpu)
                for call in range(calls):
                    which = np.arange(batch) + (number * calls + call) * batch
                    _one_call(kept, contender, world, which % len(world.queries), count=number > 0)
                if number:
                    kept.per_round.append((sum(kept.cpu) - before) / (calls * batch))
    return times


def _one_call(kept: _Times, contender: who.Contender, world: who.World, which: who.Ints, *, count: bool) -> None:
    queries, cells = world.queries[which], world.asked[which]
    wall, cpu = time.perf_counter(), time.process_time()
    rows = contender.search(queries, cells)
    cpu_seconds, wall_seconds = time.process_time() - cpu, time.perf_counter() - wall
    if count:
        kept.cpu.append(cpu_seconds)
        kept.wall.append(wall_seconds)
        kept.right += int((rows[:, 0] == world.nearest[which]).sum())
        kept.num += len(which)


def _rows(groups: list[Times], batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row per method and batch; the fp16 index has been in every group."""
    merged: Times = {}
    for times in groups:
        for key, found in times.items():
            kept = merged.setdefault(key, _Times(found.contender))
            kept.cpu += found.cpu
            kept.wall += found.wall
            kept.right, kept.num = kept.right + found.right, kept.num + found.num
    methods = list(dict.fromkeys(method for method, _ in merged))
    return [merged[method, batch].row(batch) for method in methods for batch in batches if (method, batch) in merged]


def _ratio(times: Times, method: str, batch: int) -> float:
    """Median over rounds: how many times as fast as `method` the fp16 index was."""
    pairs = zip(times[method, batch].per_round, times[FP16, batch].per_round, strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def _codec(codec: Any, scratch: str) -> Callable[[who.World, int], who.Contender]:
    def make(world: who.World, top_k: int) -> who.Contender:
        folder = Path(scratch) / codec
        index = _index(world, codec, folder)
        per_vector = (folder / INDEX_FILE).stat().st_size / len(world.vectors)
        return who.ours(index, top_k, per_vector)

    make.__name__ = codec
    return make


def _index(world: who.World, codec: Any, folder: Path) -> GeocellIndex:
    """The world built as a stream and opened from disk, as it is served."""

    def batches() -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(world.vectors), 65_536):
            some = slice(start, start + 65_536)
            names = [f"{n:09d}" for n in range(start, start + len(world.vectors[some]))]
            places = np.zeros(len(names))
            yield world.vectors[some], world.cells[some], names, places, places

    return GeocellIndex.build_streamed(batches(), folder, num_cells=len(world.starts) - 1, codec=codec)


def _opening(folder: Path) -> dict[str, tuple[float, ...]]:
    """Seconds to open, median of three; seconds and resident memory to refuse the last byte with one bit flipped."""
    wall, cpu = [], []
    for _ in range(3):
        start, spent = time.perf_counter(), time.process_time()
        GeocellIndex.open(folder)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - spent)
    with (folder / INDEX_FILE).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    gc.collect()
    before, start, spent = _resident_mb(), time.perf_counter(), time.process_time()
    try:
        GeocellIndex.open(folder)
    except ValueError:
        seconds, cpu_seconds, grown = time.perf_counter() - start, time.process_time() - spent, _resident_mb() - before
    else:
        raise RuntimeError("An index with a flipped bit was opened; this is a bug, please report it.")
    return {
        "open": (statistics.median(wall), statistics.median(cpu)),
        "refused": (seconds, cpu_seconds, max(0.0, grown)),
    }


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


@contextmanager
def _one_thread() -> Iterator[None]:
    """FAISS, BLAS and torch on one thread each."""
    before, torch_before = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    try:
        with threadpoolctl.threadpool_limits(1):
            yield
    finally:
        faiss.omp_set_num_threads(before)
        torch.set_num_threads(torch_before)
