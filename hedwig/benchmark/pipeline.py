"""The embedding job against the bare model loop on the same decoded batches, and what Ray costs beside them.

`TimedEmbedder` embeds each batch twice inside the worker: once as the job does, and once more as the bare loop would,
the frames being there already. So the two meet the same load and clock, batch by batch. What the second pass takes is
left out of the job's time. Efficiency is the bare loop's seconds over the job's, from the first batch to the last, the
job's being everything from one batch to the next: reading, decoding, slicing, embedding, Ray. Ray's own CPU is that of
all processes below this one, less what the workers used inside their stages.

Memory is what the processes have for themselves, and what lies in /dev/shm, where Ray keeps its objects: the most of it
until a twentieth of the panoramas were embedded, and the most of all. A job that keeps what it has read shows there.

Where other workers decode, they go on while the second pass runs, so that what they took themselves, shared among
them, is a second bound from below of the job's time: too few of them show as an efficiency below 1 all the same.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hedwig.embed import Embedder
from hedwig.panorama import PanoramaSlicer, Slicing
from hedwig.schema import PANORAMAS
from hedwig.sources import ImageReader
from hedwig.storage import join, read_table, write_bytes, write_table

__all__ = [
    "LateReader", "PipelineFigures", "Sample", "StartClock", "TimedEmbedder", "TimedSlicer", "figures_of",
    "measure_pipeline", "tree_cpu_s",
]  # fmt: skip

Batch = dict[str, NDArray[Any]]
CLOCKS = ("began_s", "cut_s", "cut_cpu_s", "ended_s", "bare_s", "used_cpu_s")
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6
OBJECTS = "/dev/shm"  # noqa: S108 -- chosen by Ray, only looked at


class Sample(NamedTuple):
    """What all processes of the job had used at one moment.

    Attributes:
        at_s: since the epoch.
        cpu_s: by then.
        memory_mb: then.
    """

    at_s: float
    cpu_s: float
    memory_mb: float


class StartClock:
    """First stage of the job: notes when a batch began, as seconds since the epoch, and the CPU used by then."""

    reads = ("pano_id",)
    writes = ("began_s", "began_cpu_s")

    def __call__(self, batch: Batch) -> Batch:
        """(B,) float64 each, the same in all rows."""
        size = len(batch["pano_id"])
        return {**batch, "began_s": np.full(size, time.time()), "began_cpu_s": np.full(size, time.process_time())}


class LateReader(ImageReader):
    """An `ImageReader` of a storage that answers late.

    Args:
        latency_s: before an image is read.
        **options: of `ImageReader`.
    """

    def __init__(self, *, latency_s: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self._latency_s = latency_s

    def _fetch(self, row: Any) -> tuple[Any, str | None]:
        time.sleep(self._latency_s)
        return super()._fetch(row)


class TimedSlicer:
    """Second-last stage: a `PanoramaSlicer` that notes when its batch was cut, and the CPU from its begin to there.

    Args:
        slicing: of `PanoramaSlicer`.
        num_threads: of `PanoramaSlicer`.
    """

    reads = (*PanoramaSlicer.reads, "began_cpu_s")
    reads_if_there = PanoramaSlicer.reads_if_there
    writes = (*PanoramaSlicer.writes, "cut_s", "cut_cpu_s")

    def __init__(self, *, slicing: Slicing, num_threads: int) -> None:
        self._slicer = PanoramaSlicer(slicing=slicing, num_threads=num_threads)

    def __call__(self, batch: Batch) -> Batch:
        """Seconds (B,) float64: of the end, since the epoch, and of CPU."""
        out = self._slicer(batch)
        used = time.process_time() - batch["began_cpu_s"]
        return {**out, "cut_s": np.full(len(used), time.time()), "cut_cpu_s": used}


class TimedEmbedder:
    """Last stage of the job: an `Embedder` that does its work twice and notes what the second time took.

    Args:
        **options: of `Embedder`.
    """

    reads = Embedder.reads
    writes = (*Embedder.writes, "ended_s", "bare_s", "used_cpu_s")

    def __init__(self, **options: Any) -> None:
        self._embedder = Embedder(**options)

    def __call__(self, batch: Batch) -> Batch:
        """Seconds (B,) float64: of the end, of the second pass, and of CPU for both passes."""
        began_cpu = time.process_time()
        out = self._embedder(batch)
        began = time.perf_counter()
        self._embedder(batch)
        bare_s, used = time.perf_counter() - began, time.process_time() - began_cpu
        clocks = {"bare_s": bare_s, "ended_s": time.time(), "used_cpu_s": used}
        return {**out, **{name: np.full(len(batch["frames"]), value) for name, value in clocks.items()}}


@dataclass(frozen=True)
class PipelineFigures:
    """The figures of one job; see the module's text.

    Attributes:
        efficiency: bare loop's seconds over the job's in the steady state, 1 at best.
        startup_s: from the call to the first batch's begin, the model being loaded by then.
        panoramas_per_s: in the steady state, without the second pass.
        bare_panoramas_per_s: of the second pass alone.
        ray_cpu_ms_per_panorama: CPU of all processes in the steady state outside the workers' stages; None where they
            are not below this one, on a cluster, as is what follows of memory.
        decode_cpu_ms_per_panorama: CPU of reading, decoding and slicing.
        num_panoramas: all of them.
        num_steady: those between the end of the first batch and the end of the last.
        batch_size: rows of a batch.
        model: name of the encoder.
        early_memory_mb: the most memory of all processes until a twentieth of the panoramas were embedded.
        peak_memory_mb: the most until the end.
        decode_workers: that did nothing else; 0 where the actor decodes.
    """

    efficiency: float
    startup_s: float
    panoramas_per_s: float
    bare_panoramas_per_s: float
    ray_cpu_ms_per_panorama: float | None
    decode_cpu_ms_per_panorama: float
    num_panoramas: int
    num_steady: int
    batch_size: int
    model: str
    early_memory_mb: float | None
    peak_memory_mb: float | None
    decode_workers: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For readers."""
        lines = []
        if self.ray_cpu_ms_per_panorama is not None:
            lines.append(f"  Ray's own CPU: {self.ray_cpu_ms_per_panorama:.2f} ms per panorama")
        if self.early_memory_mb is not None and self.peak_memory_mb is not None:
            lines.append(
                f"  memory: at most {self.early_memory_mb:,.0f} MB until {-(-self.num_panoramas // 20):,} of them were "
                f"embedded, {self.peak_memory_mb:,.0f} MB until all were"
            )
        return "\n".join(
            [
                f"{self.model}: {self.panoramas_per_s:.4g} panoramas/s end to end, {self.bare_panoramas_per_s:.4g} by "
                f"the bare model loop on the same batches of {self.batch_size}: efficiency {self.efficiency:.3f}",
                f"  the first batch began after {self.startup_s:.1f} s; {self.num_steady} of {self.num_panoramas} "
                "panoramas measured after it",
                f"  reading and slicing: {self.decode_cpu_ms_per_panorama:.2f} ms of CPU per panorama "
                + (f"in {self.decode_workers} workers apart" if self.decode_workers else "in the actor"),
                *lines,
            ]
        )


def measure_pipeline(
    job: Callable[[str, str, list[tuple[Any, dict[str, Any]]], pa.Schema], None],
    images: Sequence[bytes],
    folder: str,
    *,
    stages: Sequence[tuple[Any, dict[str, Any]]],
    model: str,
    num_panoramas: int,
    batch_size: int,
    decode_workers: int = 0,
    here: bool = True,
    **options: Any,
) -> PipelineFigures:
    """Embed a listing of `num_panoramas` rows and read the clocks.

    Args:
        job: what runs stages over a table: called with the source's folder, the result's, the stages (class and
            arguments) and the schema of the result.
        images: files to embed; rows repeat them.
        folder: where to work.
        stages: reading and slicing, before the encoder; the last is a `TimedSlicer`.
        model: name of the encoder.
        num_panoramas: N.
        batch_size: of the job, for the record and the encoder.
        decode_workers: that the job has beside its actor.
        here: whether all processes of the job are below this one, so that they can be watched.
        **options: of `Embedder`.
    """
    paths = [join(folder, "images", f"{i}.jpg") for i in range(len(images))]
    for path, content in zip(paths, images, strict=True):
        write_bytes(path, content)
    rows = [
        {"pano_id": f"{i:08d}", "projection": "equirectangular", "split": "train", "image_uri": paths[i % len(paths)]}
        for i in range(num_panoramas)
    ]
    table = pa.Table.from_pylist(rows, schema=PANORAMAS)
    table = table.append_column("caption", pa.array([f"a street, number {i % 97}" for i in range(num_panoramas)]))
    write_table(join(folder, "source", "part-00000.parquet"), table)
    schema = pa.schema([("pano_id", pa.string()), *((name, pa.float64()) for name in CLOCKS)])
    whole = [(StartClock, {}), *stages, (TimedEmbedder, {"encoder_name": model, "batch_size": batch_size, **options})]
    began_s = time.time()
    with _Watch() as watch:
        job(join(folder, "source"), join(folder, "result"), whole, schema)
    clocks = read_table(join(folder, "result"))
    columns = {name: clocks[name].to_numpy() for name in CLOCKS}
    return figures_of(
        columns,
        watch.samples if here else (),
        began_s=began_s,
        batch_size=batch_size,
        model=model,
        decode_workers=decode_workers,
    )


def figures_of(
    clocks: dict[str, NDArray[np.float64]],
    samples: Sequence[Sample],
    *,
    began_s: float,
    batch_size: int,
    model: str,
    decode_workers: int = 0,
) -> PipelineFigures:
    """The figures of one actor's clocks, and of those that decode for it.

    Args:
        clocks: (N,) each of ``began_s, cut_s, cut_cpu_s``, the same in all rows that were cut together, and of
            ``ended_s, bare_s, used_cpu_s``, the same in all that were embedded together.
        samples: taken while the job ran; none where its processes could not be watched.
        began_s: when it was called.
        batch_size: as set.
        model: name.
        decode_workers: that did nothing else; 0 where the actor decodes.

    Raises:
        ValueError: there were fewer than two batches.
    """
    ends, first, counts = np.unique(clocks["ended_s"], return_index=True, return_counts=True)
    if len(ends) < 2:
        raise ValueError(f"{len(clocks['ended_s'])} panoramas are {len(ends)} batch; take more, or smaller batches.")
    bare_s, used_s = clocks["bare_s"][first[1:]], clocks["used_cpu_s"][first[1:]]
    num = int(counts[1:].sum())
    job_s = ends[-1] - ends[0] - bare_s.sum()
    begins, cut = np.unique(clocks["began_s"], return_index=True)
    cut_s, cut_cpu_s = clocks["cut_s"][cut], clocks["cut_cpu_s"][cut]
    if decode_workers:
        job_s = max(job_s, (cut_s - begins).sum() * num / len(clocks["ended_s"]) / decode_workers)
    inside = np.clip(np.minimum(cut_s, ends[-1]) - np.maximum(begins, ends[0]), 0, None) / (cut_s - begins)
    ray_cpu_ms = early_mb = peak_mb = None
    if samples:
        at, cpu_s, memory_mb = np.array(samples).T
        all_cpu_s = np.interp(ends[-1], at, cpu_s) - np.interp(ends[0], at, cpu_s)
        ray_cpu_ms = float(1000 * (all_cpu_s - used_s.sum() - (inside * cut_cpu_s).sum()) / num)
        early = at <= np.sort(clocks["ended_s"])[-(-len(clocks["ended_s"]) // 20) - 1]
        early_mb, peak_mb = float(memory_mb[early].max(initial=memory_mb[0])), float(memory_mb.max())
    return PipelineFigures(
        efficiency=float(bare_s.sum() / job_s),
        startup_s=float(clocks["began_s"].min() - began_s),
        panoramas_per_s=float(num / job_s),
        bare_panoramas_per_s=float(num / bare_s.sum()),
        ray_cpu_ms_per_panorama=ray_cpu_ms,
        decode_cpu_ms_per_panorama=float(1000 * cut_cpu_s.sum() / len(clocks["ended_s"])),
        num_panoramas=len(clocks["ended_s"]),
        num_steady=num,
        batch_size=batch_size,
        model=model,
        early_memory_mb=early_mb,
        peak_memory_mb=peak_mb,
        decode_workers=decode_workers,
    )


class _Watch:
    """Samples this process and all below it twice a second while the block runs."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._seen: dict[tuple[int, int], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            now = tree_cpu_s(os.getpid())
            self._seen.update(now)  # those that have ended keep their last value
            memory_mb = _own_memory_mb(pid for pid, _ in now) + _shared_memory_mb()
            self.samples.append(Sample(time.time(), sum(self._seen.values()), memory_mb))
            if self._stop.wait(0.5):
                return


def tree_cpu_s(root: int) -> dict[tuple[int, int], float]:
    """CPU seconds of a process and its descendants, by pid and start time, from /proc."""
    stats: dict[int, tuple[int, int, float]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as stream:
                fields = stream.read().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue  # it ended meanwhile
        stats[int(entry)] = (int(fields[1]), int(fields[19]), (int(fields[11]) + int(fields[12])) * TICK_S)
    found, below = {}, [root]
    while below:
        pid = below.pop()
        if pid in stats:
            found[(pid, stats[pid][1])] = stats[pid][2]
            below += [child for child, (parent, _, _) in stats.items() if parent == pid]
    return found


def _own_memory_mb(pids: Iterable[int]) -> float:
    """Resident memory that processes share with no file and nobody else's memory, from /proc."""
    pages = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm", encoding="ascii") as stream:
                _, resident, shared = stream.read().split()[:3]
        except (OSError, ValueError):
            continue  # it ended meanwhile
        pages += int(resident) - int(shared)
    return pages * PAGE_MB


def _shared_memory_mb() -> float:
    return shutil.disk_usage(OBJECTS).used / 1e6 if os.path.isdir(OBJECTS) else 0.0
